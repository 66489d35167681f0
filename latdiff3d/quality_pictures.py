"""What the quality page draws: the power spectra, and a case as real, reconstructed and error."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latdiff3d.figures import overlay, slices_preview

ERROR_GAIN = 3  # by which errors are brightened


@dataclass(frozen=True)
class Spectra:
    """Energy per voxel and frequency in shells, over all cases; see spectrum.shell_energies."""

    real: np.ndarray  # (C, NUM_SHELLS + 1); NaN in a shell that holds no frequency of any case
    autoencoder: np.ndarray  # the same shape
    block_pca: np.ndarray


@dataclass(frozen=True)
class Example:
    """A case to look at, cut to its own voxels."""

    name: str
    psnr_db: float
    real: np.ndarray  # (C, D, H, W) in [0, 1]
    reconstruction: np.ndarray


def slices_png(example: Example) -> bytes:
    """Return the PNG of a case: three planes of each channel, real, reconstructed and the brightened error."""
    error = np.abs(example.real - example.reconstruction) * ERROR_GAIN
    names = ("real", "reconstructed", f"error x {ERROR_GAIN}")  # PIL's own font has no ×
    return preview_png((example.real, example.reconstruction, error), names)


def preview_png(images: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Return the PNG of `figures.slices_preview`: three planes of each channel, a line an image (C, D, H, W)."""
    with tempfile.TemporaryDirectory() as folder:
        return slices_preview(Path(folder) / "slices.png", images, names).read_bytes()


def outlined_png(
    volume: np.ndarray, mask: np.ndarray, modalities: Sequence[str], spacing_mm: np.ndarray, title: str
) -> bytes:
    """Return the PNG of `figures.overlay`: a volume (C, D, H, W) and, over it, the outline of its mask (D, H, W)."""
    depth, height, width = (float(size) for size in spacing_mm)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outlined.png"
        return overlay(path, volume, mask, modalities, (depth, height, width), title).read_bytes()
