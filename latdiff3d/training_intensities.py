"""What the scans' intensities were like that a model was trained on: a range a modality, which travels with it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Compose

from latdiff3d.distributed import shared
from latdiff3d.errors import InputError
from latdiff3d.intensities import IntensityRange, Reference, reference
from latdiff3d.layouts import Case
from latdiff3d.transforms import ScaleForegroundd

MOST_SCANS = 32  # that are read for it: medians of more would hardly differ, and data sets may be large


def summary(cases: Sequence[Case], transforms: Sequence[Callable[..., Any]]) -> dict[str, Any] | None:
    """Return the median range of the cases' scans, of up to `MOST_SCANS` evenly chosen ones, each rank reading a share.

    Args:
        cases: of the training set.
        transforms: the model's preprocessing, which takes an image alone as well.

    Returns:
        "num_scans" and "ranges", of each modality what 0, 1 and the background are: "low" and "high", medians, and
        "background", the median where most scans have one, or None. None if the preprocessing maps no percentiles.

    Raises:
        InputError: a scan cannot be read.
    """
    preprocessing = Compose(transforms)
    if not any(isinstance(transform, ScaleForegroundd) for transform in preprocessing.flatten().transforms):
        return None
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(len(cases), MOST_SCANS)).round().astype(int)).tolist()
    found = shared(chosen, lambda number: reference([str(file) for file in cases[number]["image"]], preprocessing))
    return {
        "num_scans": len(chosen),
        "ranges": [_median(ranges) for ranges in zip(*(found[number].ranges for number in chosen), strict=True)],
    }


def training_reference(said: Mapping[str, Any] | None, place: object) -> Reference:
    """Return the training set's range, to which volumes can be mapped, of what `summary` returned.

    Args:
        said: as it stands in a checkpoint; None where there is none.
        place: the checkpoint, for the sentence.

    Raises:
        InputError: where there is none.
    """
    if said is None:
        raise InputError(
            f"{place} does not say what its training scans' intensities were: it is of an earlier version, or maps no "
            "percentiles; give --like SCAN, one of them."
        )
    return Reference([], [IntensityRange(**each) for each in said["ranges"]], said["num_scans"])


def _median(ranges: Sequence[IntensityRange]) -> dict[str, float | None]:
    backgrounds = [each.background for each in ranges if each.background is not None]
    return {
        "low": float(np.median([each.low for each in ranges])),
        "high": float(np.median([each.high for each in ranges])),
        "background": float(np.median(backgrounds)) if len(backgrounds) > len(ranges) / 2 else None,
    }
