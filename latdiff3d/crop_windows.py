"""How large a crop's window may be and where it lies around a foreground, in voxels or in latent cells."""

from collections.abc import Sequence

import numpy as np
from monai.config import NdarrayOrTensor
from monai.transforms.utils import generate_spatial_bounding_box

from latdiff3d.errors import InputError

Box = tuple[np.ndarray, np.ndarray]  # first and end voxel (exclusive) of a region, (3,) each


def check_divisible(crop_to: Sequence[int], factor: int, what: str) -> None:
    """Raise an InputError that names the nearest size unless every size of `crop_to` is a multiple of `factor`.

    Args:
        crop_to: sizes in voxels.
        factor: what the networks halve a volume by in all.
        what: where the factor comes from, as "the autoencoder's 4 × the U-Net's 4".
    """
    if all(size > 0 and size % factor == 0 for size in crop_to):
        return
    nearest = [max(1, int(size / factor + 0.5)) * factor for size in crop_to]
    raise InputError(f"crop_to {list(crop_to)} is not divisible by {factor} ({what}); the nearest that is: {nearest}.")


def foreground_box(image: NdarrayOrTensor) -> Box:
    """Return first and end voxel (exclusive) of what is above 0 in any channel of `image` (C, D, H, W)."""
    first, end = generate_spatial_bounding_box(image, allow_smaller=True)
    return np.array(first), np.array(end)


def centred_start(box: Box, roi_size: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return where a window of `roi_size` around the middle of the foreground's `box` begins.

    Args:
        box: see `foreground_box`; in any unit that the others are in, voxels or latent cells.
        roi_size: (3,), of the window.
        size: (3,), of the volume, at least that.
    """
    lowest, highest = _range_of_starts(box, roi_size)
    return np.clip((lowest + highest) // 2, 0, size - roi_size)


def random_start(box: Box, roi_size: np.ndarray, size: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
    """Return where a window inside the foreground's `box`, or around all of it, begins; see `centred_start`."""
    ends = [np.clip(end, 0, size - roi_size) for end in _range_of_starts(box, roi_size)]
    return np.array([random_state.randint(low, high + 1) for low, high in zip(*ends, strict=True)])


def _range_of_starts(box: Box, roi_size: np.ndarray) -> np.ndarray:
    """Return the window's first and last start per axis: inside the foreground's box, or all of the box inside."""
    first, end = box
    return np.sort([first, end - roi_size], axis=0)
