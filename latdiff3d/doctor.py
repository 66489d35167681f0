"""Read a data set and tell all that is wrong with it at once, with a table of what it holds."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from monai.utils import convert_to_numpy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from latdiff3d.checks import affine_problem, header_problems, voxel_problems
from latdiff3d.datalist import SPLITS, split_cases
from latdiff3d.errors import InputError
from latdiff3d.layouts import BRATS_MODALITIES, Found, survey_cases
from latdiff3d.readers import Header, channel_labels, file_label, read_header, read_volume, size_text


class CaseRow(NamedTuple):
    """What a case's files hold; shapes, spacings and orientations list each distinct one, the image's first."""

    case: str
    shapes: list[tuple[int, ...]]
    spacings_mm: list[tuple[float, ...]]
    orientations: list[str]
    labels: dict[float, int]  # label → voxels
    intensities: list[tuple[float, float]]  # (min, max) of each channel


def examine(
    folder: str | Path,
    layout: str = "auto",
    modalities: Sequence[str] = BRATS_MODALITIES,
    labels: Sequence[int] | None = None,
    num_channels: int | None = None,
    mask_required: bool = True,
    patient_pattern: str | None = None,
) -> tuple[list[CaseRow], list[str]]:
    """Read every file of a data set; return a row for each case and all that is wrong.

    Args:
        folder, layout, modalities, mask_required, patient_pattern: as of `datalist.read_cases`.
        labels: the labels the configuration knows; None accepts any integer.
        num_channels: channels of a case; None takes what most of the cases have.
    """
    try:
        found = survey_cases(folder, layout, modalities, mask_required, patient_pattern)
    except InputError as error:
        return [], [str(error)]
    examine_one = partial(_examine, num_channels=num_channels or _usual_channels(found), labels=labels)
    rows, problems = [], []
    with ThreadPoolExecutor() as pool:
        console = Console(stderr=True)
        for row, wrong in track(pool.map(examine_one, found), "Reading", len(found), transient=True, console=console):
            rows.append(row)
            problems += wrong
    return rows, problems + _list_problems(found, folder)


def print_report(rows: Sequence[CaseRow], problems: Sequence[str], console: Console | None = None) -> bool:
    """Print the table of cases and then every problem; return whether the data set is sound."""
    console = console or Console()
    if rows:
        table = Table("case", "shape", "mm", "axes", "label: voxels", "intensity", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            cells = (
                [row.case],
                [size_text(shape) for shape in row.shapes],
                [size_text(f"{size:.4g}" for size in spacing) for spacing in row.spacings_mm],
                row.orientations,
                [f"{label:g}: {count}" for label, count in list(row.labels.items())[:10]],
                [f"{low:.4g} … {high:.4g}" for low, high in row.intensities],
            )
            table.add_row(*(Text("\n".join(cell), overflow="fold") for cell in cells))
        console.print(table)
    for problem in problems:
        console.print(Text(f"✗ {problem}"), soft_wrap=True)
    verdict = f"{len(problems)} problem(s)" if problems else "no problem found"
    console.print(f"{len(rows)} case(s), {verdict}.", highlight=False)
    return not problems


def _examine(found: Found, num_channels: int, labels: Sequence[int] | None) -> tuple[CaseRow, list[str]]:
    case, problems = found.case, list(found.problems)
    images = list(case.get("image", []))
    # Where a file is missing that is said already; its siblings are still held against each other.
    problems += header_problems(case, len(images) if problems and len(images) > 1 else num_channels)
    row = CaseRow(case["case"], [], [], [], {}, [])
    for path in [*images, *([case["mask"]] if "mask" in case else [])]:
        try:
            header = read_header(path)
            _describe_grid(row, header)
            volume = convert_to_numpy(read_volume(path))  # (C, D, H, W)
        except InputError as error:
            if str(error) not in problems:
                problems.append(str(error))
            continue
        if path == case.get("mask"):
            problems += voxel_problems(None, volume, labels, [], file_label(path))
            values, counts = np.unique(volume, return_counts=True)
            row.labels.update(zip(values.tolist(), counts.tolist(), strict=True))
        else:
            problems += voxel_problems(volume, None, None, channel_labels(path, len(volume)), "")
            row.intensities.extend((float(channel.min()), float(channel.max())) for channel in volume)
    return row, problems


def _describe_grid(row: CaseRow, header: Header) -> None:
    if len(header.shape) < 3:
        return
    spacing_mm = tuple(round(float(size), 4) for size in np.linalg.norm(header.affine[:3, :3], axis=0))
    codes = nibabel.aff2axcodes(header.affine) if not affine_problem("", header.affine) else "?"
    described: tuple[tuple[list[Any], Any], ...] = (
        (row.shapes, header.shape),
        (row.spacings_mm, spacing_mm),
        (row.orientations, "".join(code or "?" for code in codes)),
    )
    for seen, value in described:
        if value not in seen:
            seen.append(value)


def _usual_channels(found: Sequence[Found]) -> int:
    counts: Counter[int] = Counter()
    for case, problems in found:
        if problems:
            continue
        try:
            shape = read_header(case["image"][0]).shape
        except InputError:  # header_problems says it
            continue
        counts[len(case["image"]) if len(case["image"]) > 1 else (*shape, 1, 1, 1, 1)[3]] += 1
    return counts.most_common(1)[0][0] if counts else 1


def _list_problems(found: Sequence[Found], folder: str | Path) -> list[str]:
    root = Path(folder).expanduser()
    root = root.parent if root.is_file() else root
    if not any((root / f"{split}.list").is_file() for split in SPLITS):
        return []
    try:
        split_cases([one.case for one in found], folder)
    except InputError as error:
        return [str(error)]
    return []
