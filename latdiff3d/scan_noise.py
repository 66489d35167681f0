"""How noisy a scan is, and noise of that strength for what an autoencoder has smoothed."""

import nibabel as nib
import numpy as np

MAD_OF_A_NORMAL = 0.6745  # the median absolute value of a unit normal
FEWEST = 64  # differences that a strength may be told from


def noise_level(channel: np.ndarray, where: np.ndarray) -> float:
    """Return the standard deviation of white noise in a channel (D, H, W), 0 where there is too little to tell from.

    By the median absolute third difference, one along each axis, over √8 (as Donoho and Johnstone 1994 tell noise from
    the finest wavelets, 10.1093/biomet/81.3.425). Edges, ramps and slow changes have next to none of it.

    Args:
        where: (D, H, W); the 2 × 2 × 2 voxels of a difference must all lie in it.
    """
    differences = channel.astype(np.float64)
    inside = where
    for axis in range(3):
        differences = np.diff(differences, axis=axis)
        inside = np.logical_and(*(np.take(inside, range(*ends), axis) for ends in _pairs(inside.shape[axis])))
    found = np.abs(differences[inside])
    return float(np.median(found) / MAD_OF_A_NORMAL / np.sqrt(8)) if found.size >= FEWEST else 0.0


def unit_noise(num_channels: int, shape: tuple[int, ...], affine: np.ndarray, seed: int) -> np.ndarray:
    """Return standard normal noise (C, D, H, W) on a grid, the same in the world whatever the order of its axes.

    Args:
        shape: (D, H, W).
        affine: (4, 4), voxel to RAS mm.
        seed: of the noise.
    """
    orientation = nib.io_orientation(affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation)
    ras_shape = np.empty(3, int)
    ras_shape[orientation[:, 0].astype(int)] = shape
    generator = np.random.default_rng(seed)
    return np.stack([nib.apply_orientation(generator.standard_normal(ras_shape), turn) for _ in range(num_channels)])


def _pairs(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, length - 1), (1, length)
