"""Diversity, a section of an evaluation: whether samples differ, of one mask and across masks, as real volumes do."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latdiff3d.bootstrap import mean_interval
from latdiff3d.fidelity import ms_ssim, num_scales, own_voxels
from latdiff3d.html_page import captioned, notes, table, with_interval
from latdiff3d.plain_figures import rounded
from latdiff3d.quality_pictures import preview_png

SAMPLES = "samples"
NUM_SHOWN = 4
ROWS = {"of_a_mask": "samples for one mask", "across_masks": "samples for neighbouring masks", "real": "real cases"}

Volume = Callable[[int], np.ndarray]


def measure(
    real: Volume, made: Callable[[int, int], np.ndarray], own: Volume, num_cases: int, num_samples: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return how alike volumes are, by MS-SSIM, and a picture of several for one mask.

    Args:
        real: of a case's number, its volume (C, D, H, W).
        made: of a sample's number and a case's, the volume for that mask.
        own: of a case's number, the own voxels of its volumes (1, D, H, W).
        num_cases: N, at least 2; each is compared with the next, the last with the first.
        num_samples: S; without a second there is none to compare with for the same mask.
    """
    of_a_mask, across, of_real = [], [], []
    for case in range(num_cases):
        following = (case + 1) % num_cases
        here, shared = own(case), own(case) * own(following)
        pairs = itertools.combinations(range(num_samples), 2)
        of_a_mask.append(_mean([likeness(made(a, case), made(b, case), here) for a, b in pairs]))
        across.append(_mean([likeness(made(s, case), made(s, following), shared) for s in range(num_samples)]))
        of_real.append(likeness(real(case), real(following), shared))
    alike = {"of_a_mask": of_a_mask, "across_masks": across, "real": of_real}
    figures = {
        "num_cases": num_cases,
        "num_samples": num_samples,
        **{
            name: {"ms_ssim": rounded(_mean(values)), "interval": mean_interval(np.array(values))}
            for name, values in alike.items()
        },
    }
    shown = [made(sample, 0) for sample in range(min(num_samples, NUM_SHOWN))]
    return figures, {SAMPLES: preview_png([real(0), *shown], ["real", *(f"sample {k}" for k in range(len(shown)))])}


def likeness(one: np.ndarray, other: np.ndarray, own: np.ndarray) -> float:
    """Return MS-SSIM of two volumes (C, D, H, W) where both are their own, the mean over channels.

    Args:
        own: (1, D, H, W), 1 there; a box. NaN where that is too small for two scales, 22 voxels along each axis.
    """
    if not own.any():
        return float("nan")
    box = own_voxels(own)
    if num_scales(one[box].shape[1:]) < 2:
        return float("nan")
    return float(ms_ssim(one[box], other[box]).mean())


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    rows = [[name, with_interval(figures[key]["ms_ssim"], figures[key]["interval"], 3)] for key, name in ROWS.items()]
    return (
        table(["", "MS-SSIM"], rows)
        + captioned(pictures[SAMPLES], "A real volume, and samples for its mask from other noise")
        + notes(
            [
                "Higher is more alike. Where samples across masks are more alike than real cases, the model makes one "
                "volume again and again. For one mask no real case says what is right; 1 is no variety at all.",
                "A dash: fewer than two samples for a mask, or volumes of less than 22 voxels along an axis.",
            ]
        )
    )


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a model card says of it."""
    values = {key: figures[key]["ms_ssim"] for key in ROWS}
    if values["across_masks"] is None or values["real"] is None:
        return "Volumes are too small for MS-SSIM, by which their diversity would be told."
    said = ", ".join(
        f"{with_interval(value, figures[key]['interval'], 3)} between {ROWS[key]}"
        for key, value in values.items()
        if value is not None
    )
    return f"MS-SSIM, lower for more diverse volumes, is {said}."
