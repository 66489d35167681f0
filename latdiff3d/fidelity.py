"""How close a reconstruction comes to its volume: PSNR, SSIM, MS-SSIM, and the error inside each label.

Volumes are (C, D, H, W) in [0, 1]. Padding is reconstructed for nothing and flatters, so either `valid` says which
voxels count, or what is given has been cut to them: `volume[own_voxels(valid)]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric

WINDOW = 11  # voxels; SSIM's Gaussian window of Wang et al. 2004, sigma 1.5
# Wang, Simoncelli and Bovik 2003, from the finest scale to the coarsest.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class LabelError(NamedTuple):
    """What a reconstruction misses inside one label."""

    absolute: np.ndarray  # (C,), the sum of absolute differences
    num_voxels: int


def own_voxels(valid: np.ndarray) -> tuple[slice, slice, slice, slice]:
    """Return where a volume (C, D, H, W) is its own and not padding.

    Args:
        valid: (1, D, H, W), above 0 on the volume's own voxels, which fill a box.

    Raises:
        ValueError: no voxel is valid, or they fill no box.
    """
    inside = valid[0] > 0
    others = ((1, 2), (0, 2), (0, 1))
    spans = [np.flatnonzero(inside.any(axis=axes)) for axes in others]
    if not all(len(span) for span in spans):
        raise ValueError("No valid voxel to measure on.")
    depth, height, width = (slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    if not inside[depth, height, width].all():
        raise ValueError("The valid voxels fill no box; pad and crop `valid` as the image.")
    return slice(None), depth, height, width


def psnr(image: np.ndarray, reconstruction: np.ndarray, valid: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB for a data range of 1, over a volume's own voxels.

    Padding is reconstructed for nothing and would add several dB, hence `valid`.

    Args:
        image: (C, D, H, W) in [0, 1].
        reconstruction: the same shape.
        valid: (D, H, W) or (1, D, H, W), above 0 where a voxel counts, in every channel.

    Returns:
        -10 log10 of the mean squared error; infinity where nothing differs.

    Raises:
        ValueError: the shapes differ, or no voxel is valid.
    """
    if image.shape != reconstruction.shape:
        raise ValueError(f"An image of {image.shape} and a reconstruction of {reconstruction.shape}.")
    counted = np.broadcast_to(valid > 0, image.shape)
    if not counted.any():
        raise ValueError("No valid voxel to measure on.")
    error = np.mean((image[counted].astype(np.float64) - reconstruction[counted]) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(image: np.ndarray, reconstruction: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Return MONAI's structural similarity for a data range of 1, per channel.

    The window is 11 voxels wide and lies wholly inside the volume; along an axis that is shorter, it is as wide as the
    largest odd number of voxels that fits.

    Args:
        image: (C, D, H, W).
        reconstruction: the same shape.
        device: where to compute; 128³ voxels take 2 s on two cores.

    Returns:
        (C,), at most 1.
    """
    windows = [min(WINDOW, size - (size + 1) % 2) for size in image.shape[1:]]
    return _each_channel(SSIMMetric(spatial_dims=3, win_size=windows), image, reconstruction, device)


def num_scales(shape: Sequence[int]) -> int:
    """Return how many of MS-SSIM's five scales a volume of `shape` (D, H, W) holds, each half as fine as the last.

    At each, its smallest side holds SSIM's window, so that n scales take 11 · 2ⁿ⁻¹ voxels; and MONAI asks for
    11 (n − 1)².
    """
    smallest = min(shape)
    fits = [n for n in range(1, 6) if smallest // 2 ** (n - 1) >= WINDOW and smallest // max(1, n - 1) ** 2 >= WINDOW]
    return max(fits, default=0)


def ms_ssim(image: np.ndarray, reconstruction: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Return MONAI's multi-scale structural similarity for a data range of 1, per channel.

    With as many scales as the volume holds, and the paper's weights of these, made to sum to 1: a volume of 22 voxels
    has two scales, one of 44 three, of 99 four, of 176 all five.

    Args:
        image: (C, D, H, W).
        reconstruction: the same shape.
        device: where to compute.

    Returns:
        (C,), in [0, 1].

    Raises:
        ValueError: a side of less than 22 voxels, which holds no second scale.
    """
    scales = num_scales(image.shape[1:])
    if scales < 2:
        raise ValueError(f"MS-SSIM needs {2 * WINDOW} voxels along each axis; the volume is {image.shape[1:]}.")
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    metric = MultiScaleSSIMMetric(spatial_dims=3, weights=weights.tolist())
    return _each_channel(metric, image, reconstruction, device)


def errors_by_label(image: np.ndarray, reconstruction: np.ndarray, mask: np.ndarray) -> dict[int, LabelError]:
    """Return the absolute error inside each label that occurs; label 0 is what lies outside all others.

    Args:
        image: (C, D, H, W).
        reconstruction: the same shape.
        mask: (1, D, H, W) of whole numbers.
    """
    difference = np.abs(image.astype(np.float64) - reconstruction)
    errors = {}
    for label in np.unique(mask):
        inside = mask[0] == label
        errors[int(label)] = LabelError(difference[:, inside].sum(1), int(inside.sum()))
    return errors


def _each_channel(
    metric: SSIMMetric | MultiScaleSSIMMetric, image: np.ndarray, other: np.ndarray, device: torch.device | str
) -> np.ndarray:
    # MONAI averages over channels but not over a batch.
    batches = [torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))[:, None].to(device) for v in (other, image)]
    # TF32 keeps 10 bits of a product: too few for variances that are differences of near-equal means.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        values = metric(*batches)  # (C, 1)
    return torch.as_tensor(values)[:, 0].double().cpu().numpy()  # (C,)
