"""Say what is wrong with a case before it is trained on: sentences from its headers, then from its voxels."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_numpy

from latdiff3d.datalist import raise_first
from latdiff3d.errors import InputError
from latdiff3d.layouts import Case
from latdiff3d.readers import Header, file_label, read_header, shape_problem, size_text

# Two grids whose corners lie closer than this are one: float32 headers round a 250 mm field of view to 1e-5 mm.
GRID_TOLERANCE_MM = 1e-2


def require_sound_headers(cases: Sequence[Case], num_channels: int) -> list[Case]:
    """Return `cases` as a list, or raise an InputError with the first problem of their headers."""
    with ThreadPoolExecutor() as pool:
        problems = [p for found in pool.map(partial(header_problems, num_channels=num_channels), cases) for p in found]
    raise_first(problems)
    return list(cases)


def header_problems(case: Case, num_channels: int) -> list[str]:
    """List what is wrong with a case's headers; no voxel is read.

    Args:
        case: as `datalist.read_cases` lists it; a missing image or mask is not looked at.
        num_channels: channels the networks expect: that many 3D files, or one 4D file with that many volumes.
    """
    images, masks = list(case.get("image", [])), [case["mask"]] if "mask" in case else []
    problems = []
    if images and len(images) not in (1, num_channels):
        problems.append(f"{case['case']} has {len(images)} image files; expected {num_channels} or one 4D file.")
    grids: list[tuple[str, Header]] = []
    for path in images + masks:
        try:
            header = read_header(path)
        except InputError as error:
            problems.append(str(error))
            continue
        channels = num_channels if path not in masks and len(images) == 1 else 1
        wrong = shape_problem(path, header.shape, channels) or affine_problem(path, header.affine)
        if wrong:
            problems.append(wrong)
        if len(header.shape) >= 3 and not affine_problem(path, header.affine):
            grids.append((path, header))
    for path, header in grids[1:]:
        wrong = grid_problem(path, header, *grids[0])
        if wrong:
            problems.append(wrong)
    return problems


def grid_problem(path: str, header: Header, other_path: str, other: Header) -> str | None:
    """Say how far the grid of `path` is off that of `other_path`, or return None where both are one."""
    if header.shape[:3] != other.shape[:3]:
        return (
            f"{file_label(path)} ({size_text(header.shape[:3])}) and {file_label(other_path)} "
            f"({size_text(other.shape[:3])}) have different shapes; expected one grid. Resample one onto the other."
        )
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in header.shape[:3]))])  # (8, 4)
    offset_mm = np.linalg.norm(corners @ (header.affine - other.affine).T, axis=1).max()
    if offset_mm > GRID_TOLERANCE_MM:
        return (
            f"{file_label(path)} lies off {file_label(other_path)}: their affines put a corner {offset_mm:.3g} mm "
            "apart; expected one grid. Resample one onto the other, or correct its header."
        )
    return None


def voxel_problems(
    image: NdarrayOrTensor | None,
    mask: NdarrayOrTensor | None,
    labels: Sequence[int] | None,
    names: Sequence[str],
    mask_name: str,
) -> list[str]:
    """List what is wrong with a case's voxels.

    Args:
        image: (C, D, H, W), intensities as the files have them.
        mask: (1, D, H, W), integer labels of any dtype.
        labels: the labels the configuration knows; None accepts any.
        names: the file of each channel, for the sentences.
        mask_name: the file of the mask, for the sentences.
    """
    problems = []
    if image is not None:
        for name, channel in zip(names, convert_to_numpy(image), strict=True):
            problems += _intensity_problems(channel, name)
    if mask is not None:
        problems += _label_problems(convert_to_numpy(mask), labels, mask_name)
    return problems


def _intensity_problems(channel: np.ndarray, name: str) -> list[str]:
    finite = np.isfinite(channel)
    problems = []
    if not finite.all():
        num_nan = int(np.isnan(channel).sum())
        num_infinite = int(channel.size - finite.sum() - num_nan)
        counts = " and ".join(f"{n} {what}" for n, what in ((num_nan, "NaN"), (num_infinite, "infinite")) if n)
        problems.append(f"{name} has {counts} of {channel.size} voxels; expected finite ones. Repair or drop the case.")
    values = channel if finite.all() else channel[finite]
    if values.size and values.min() == values.max():
        problems.append(
            f"{name} is {values.min():g} in every voxel; expected an image. Copy it again or drop the case."
        )
    return problems


def _label_problems(mask: np.ndarray, labels: Sequence[int] | None, name: str) -> list[str]:
    values, counts = np.unique(mask, return_counts=True)
    is_integer = np.isfinite(values) & (values == np.round(values))
    problems = []
    if not is_integer.all():
        problems.append(
            f"{name} has {int(counts[~is_integer].sum())} voxels whose labels are no integers "
            f"({_some(values[~is_integer])}); expected a label map. Was it resampled linearly, or is it an image?"
        )
    unknown = [int(value) for value in values[is_integer] if labels is not None and int(value) not in labels]
    if labels is not None and unknown:
        hint = ""
        if (unknown == [3] and 4 in labels) or (unknown == [4] and 3 in labels):
            hint = " BraTS writes {0, 1, 2, 4}, Decathlon's BrainTumour {0, 1, 2, 3} with 1 and 2 swapped."
        problems.append(
            f"{name} has labels {{{_some(unknown)}}}; this configuration knows {{{_some(labels, len(labels))}}}. "
            f"Map or drop it: rewrite the label in the file, add it to labels, or leave the case out.{hint}"
        )
    return problems


def affine_problem(path: str, affine: np.ndarray) -> str | None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Relative to the voxel's size, so that micrometres are no error; 1e-6 is 6e-5 degrees from flat.
    if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 * sizes.prod():
        return None
    rows = affine[:3, :3].round(3).tolist()
    return f"{file_label(path)} has a singular affine ({rows}): its voxels have no volume. Correct its header."


def _some(values: Any, limit: int = 8) -> str:
    shown = ", ".join(f"{value:g}" for value in list(values)[:limit])
    return shown + (", …" if len(values) > limit else "")
