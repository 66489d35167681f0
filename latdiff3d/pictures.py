"""A sample's pictures beside its files, in any orientation of these: planes with the mask's outline, and a sweep."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from latdiff3d.figures import LABEL_COLOURS, cut_plane, label_colours, overlay

SWEEP_PIXELS = 192  # a tile is enlarged by a whole number to at most about this
SWEEP_MS = 80  # that a slice is shown
NUM_GREYS = 240  # of a GIF's 256 colours; the rest are the labels'
CAPTION_PIXELS = 14


def write_pictures(
    folder: Path,
    case: str,
    volume: np.ndarray,
    affine: np.ndarray,
    mask: np.ndarray | None,
    modalities: Sequence[str],
    picture: bool = True,
    gif: bool = False,
) -> list[Path]:
    """Write `<case>.png`, see `figures.overlay`, and `<case>.gif`, see `sweep`, into `folder`.

    Args:
        volume: (C, D, H, W) in [0, 1].
        affine: (4, 4), voxel to RAS mm; pictures are turned to the nearest RAS axes.
        mask: (D, H, W), whole-number labels; None: no outlines.
        modalities: C names.
        picture, gif: which of the two.

    Returns:
        what was written.
    """
    paths = []
    orientation = nib.io_orientation(affine)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    spacing_mm = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    volume = np.stack([nib.apply_orientation(channel, orientation) for channel in volume])
    mask = None if mask is None else nib.apply_orientation(mask, orientation)
    if picture:
        paths.append(overlay(folder / f"{case}.png", volume, mask, modalities, spacing_mm, f"SYNTHETIC  {case}"))
    if gif:
        paths.append(sweep(folder / f"{case}.gif", volume, mask, spacing_mm))
    return paths


def sweep(
    path: str | Path, volume: np.ndarray, mask: np.ndarray | None, spacing_mm: tuple[float, float, float]
) -> Path:
    """Write a GIF that goes through the axial slices from the feet up, channels side by side, the mask outlined.

    Args:
        volume: (C, D, H, W) in [0, 1], RAS.
        mask: (D, H, W), whole-number labels; None: no outlines.
        spacing_mm: of the voxels; pixels are square.

    Returns:
        The path.
    """
    num_slices = volume.shape[3]
    extents = np.multiply(volume.shape[1:3], spacing_mm[:2]) / min(spacing_mm[:2])  # in pixels, before any zoom
    zoom = max(1, int(SWEEP_PIXELS // extents.max()))
    width, height = (max(1, round(float(extent) * zoom)) for extent in extents)
    values = [] if mask is None else list(label_colours([mask]))
    palette = [level * 255 // (NUM_GREYS - 1) for level in range(NUM_GREYS) for _ in range(3)]
    palette += [part for colour in LABEL_COLOURS for part in ImageColor.getrgb(colour)[:3]]
    frames = []
    for index in range(num_slices):
        labels = None if mask is None else _enlarged(cut_plane(mask, 0, index), width, height)
        tiles = []
        for channel in volume:
            grey = _enlarged(cut_plane(channel, 0, index), width, height).clip(0, 1)
            tile = np.round(grey * (NUM_GREYS - 1)).astype(np.uint8)
            for number, value in enumerate(values):
                inside = labels == value
                tile[inside & ~ndimage.binary_erosion(inside)] = NUM_GREYS + number % len(LABEL_COLOURS)
            tiles.append(tile)
        strip = np.concatenate(tiles, axis=1)
        frame = Image.fromarray(np.pad(strip, ((CAPTION_PIXELS, 0), (0, 0))))
        frame.putpalette(palette)
        ImageDraw.Draw(frame).text((2, 1), f"SYNTHETIC {index + 1}/{num_slices}", fill=NUM_GREYS - 1)
        frames.append(frame)
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=SWEEP_MS, loop=0)
    return Path(path)


def _enlarged(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a plane (rows, columns) at another size, each pixel that of the nearest voxel."""
    rows = np.minimum((np.arange(height) + 0.5) * plane.shape[0] / height, plane.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * plane.shape[1] / width, plane.shape[1] - 1).astype(int)
    return plane[np.ix_(rows, columns)]
