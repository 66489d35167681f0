"""What the masks were like that a model was trained on: a few numbers, which travel in its checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from latdiff3d.datalist import COARSE
from latdiff3d.distributed import shared
from latdiff3d.layouts import Case


class Measures(NamedTuple):
    """A mask on a grid in RAS order: its size (3,) in voxels, spacing (3,) in mm, and each class's volume in mm³."""

    size: list[int]
    spacing_mm: list[float]
    volume_mm3: list[float]


def measured(mask: MetaTensor, num_classes: int) -> Measures:
    """Measure a mask (1, D, H, W) of whole numbers 0 … K − 1, K being `num_classes`."""
    spacing_mm = np.linalg.norm(np.asarray(mask.affine, dtype=float)[:3, :3], axis=0)
    counts = torch.bincount(mask.as_tensor().flatten().long(), minlength=num_classes)
    return Measures(list(mask.shape[1:]), spacing_mm.tolist(), (counts.numpy() * spacing_mm.prod()).tolist())


def summary(cases: Sequence[Case], transforms: Sequence[Callable[..., Any]], num_classes: int) -> dict[str, Any]:
    """Return the ranges of the cases' masks on the model's grid, the ranks each reading a share of them.

    Args:
        cases: of the training set.
        transforms: the model's preprocessing, which takes a mask alone as well.
        num_classes: K, of the mapped masks.

    Returns:
        "num_cases"; "num_empty", of masks of class 0 alone; "size" in voxels and "spacing_mm", [lowest, highest] of
        (3,) each, in RAS order; "volume_mm3", for each class [lowest, highest] over the masks that hold it, or None.

    Raises:
        InputError: a mask cannot be read.
    """
    preprocessing = Compose(transforms)

    def measure(number: int) -> Measures:
        case = cases[number]
        mask = preprocessing({"mask": case["mask"], COARSE: case.get(COARSE, False)})["mask"]
        return measured(mask, num_classes)

    found = shared(range(len(cases)), measure)
    masks = [found[number] for number in range(len(cases))]
    volumes = np.array([mask.volume_mm3 for mask in masks])  # (N, K)
    return {
        "num_cases": len(masks),
        "num_empty": int((volumes[:, 1:] == 0).all(1).sum()),
        "size": _ends([mask.size for mask in masks]),
        "spacing_mm": _ends([mask.spacing_mm for mask in masks]),
        "volume_mm3": [_ends(of_class[of_class > 0]) for of_class in volumes.T],
    }


def _ends(values: Any) -> list[Any] | None:
    """Return the lowest and the highest along the first axis, None where there is nothing."""
    array = np.asarray(values)
    return [array.min(0).tolist(), array.max(0).tolist()] if len(array) else None
