"""How far, in mm, the surface that a segmenter sees lies from that of the mask."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from torch.nn import functional as F


class SurfaceDistances(NamedTuple):
    """Of each label but the background, (K − 1,) each, in mm; NaN where the mask or the prediction lacks the label.

    Attributes:
        hd95: the 95th percentile of the Hausdorff distance.
        assd: the average symmetric surface distance.
    """

    hd95: np.ndarray
    assd: np.ndarray


def surface_distances(
    prediction: torch.Tensor, mask: torch.Tensor, own: torch.Tensor, num_classes: int, spacing_mm: np.ndarray
) -> SurfaceDistances:
    """Return MONAI's surface distances between a prediction and a mask, both (1, D, H, W) of labels 0 … K − 1.

    Args:
        own: of the same shape, 1 on the volume's own voxels; the others are background in both.
        num_classes: K.
        spacing_mm: (3,).
    """
    seen, truth = (
        F.one_hot((labels * (own > 0)).long()[0], num_classes).movedim(-1, 0)[None]  # (1, K, D, H, W)
        for labels in (prediction, mask)
    )
    spacing = [float(size) for size in spacing_mm]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is all 0")  # told by NaN
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")  # of what MONAI itself passes
        hd95 = compute_hausdorff_distance(seen, truth, percentile=95, spacing=spacing)
        assd = compute_average_surface_distance(seen, truth, symmetric=True, spacing=spacing)
    return SurfaceDistances(*(_finite(values[0].double().numpy()) for values in (hd95, assd)))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
