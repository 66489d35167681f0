"""Say what is wrong with a case before it is trained on: sentences from its headers, then from its voxels."""

import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from monai.config import NdarrayOrTensor
from monai.data import ImageReader, MetaTensor
from monai.transforms import LoadImage
from monai.utils import convert_to_numpy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from latdiff3d.datalist import (
    BRATS_MODALITIES,
    SPLITS,
    VOLUME_SUFFIXES,
    Case,
    Found,
    raise_first,
    split_cases,
    survey_cases,
)
from latdiff3d.errors import InputError

# Two grids whose corners lie closer than this are one: float32 headers round a 250 mm field of view to 1e-5 mm.
GRID_TOLERANCE_MM = 1e-2
CHANNEL_FILES = "channel_files"  # the metadata key of the file each channel came from

_NIFTI_SUFFIXES = (".nii.gz", ".nii")
# What nibabel, gzip and SimpleITK raise on a file that is no whole volume.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
)


class Header(NamedTuple):
    """What a file says of its grid: shape (D, H, W) or (D, H, W, C), and the (4, 4) affine from voxels to RAS mm."""

    shape: tuple[int, ...]
    affine: np.ndarray


class CaseRow(NamedTuple):
    """What a case's files hold; shapes, spacings and orientations list each distinct one, the image's first."""

    case: str
    shapes: list[tuple[int, ...]]
    spacings_mm: list[tuple[float, ...]]
    orientations: list[str]
    labels: dict[float, int]  # label → voxels
    intensities: list[tuple[float, float]]  # (min, max) of each channel


# What is wrong


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
        wrong = _shape_problem(path, header.shape, channels) or _affine_problem(path, header.affine)
        if wrong:
            problems.append(wrong)
        if len(header.shape) >= 3 and not _affine_problem(path, header.affine):
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
            f"{file_label(path)} ({_times(header.shape[:3])}) and {file_label(other_path)} "
            f"({_times(other.shape[:3])}) have different shapes; expected one grid. Resample one onto the other."
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


def _shape_problem(path: str, shape: tuple[int, ...], num_channels: int) -> str | None:
    name = f"{file_label(path)} is {len(shape)}D ({_times(shape)})"
    if len(shape) not in (3, 4):
        return f"{name}; expected a 3D volume, or a 4D one with its channels last."
    found = shape[3] if len(shape) == 4 else 1
    if found == num_channels:
        return None
    if num_channels == 1:
        return f"{name}: axis 3 holds {found} volumes; expected one 3D volume. Split it, or name {found} modalities."
    if found == 1:
        return f"{name}: one volume; expected {num_channels} channels. List a file for each, or correct modalities."
    return f"{name}: axis 3 holds {found} volumes; expected {num_channels} channels there."


def _affine_problem(path: str, affine: np.ndarray) -> str | None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Relative to the voxel's size, so that micrometres are no error; 1e-6 is 6e-5 degrees from flat.
    if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 * sizes.prod():
        return None
    rows = affine[:3, :3].round(3).tolist()
    return f"{file_label(path)} has a singular affine ({rows}): its voxels have no volume. Correct its header."


# The whole data set


def doctor(
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
    examine = partial(_examine, num_channels=num_channels or _usual_channels(found), labels=labels)
    rows, problems = [], []
    with ThreadPoolExecutor() as pool:
        console = Console(stderr=True)
        for row, wrong in track(pool.map(examine, found), "Reading", len(found), transient=True, console=console):
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
                [_times(shape) for shape in row.shapes],
                [_times(f"{size:.4g}" for size in spacing) for spacing in row.spacings_mm],
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
            problems += voxel_problems(volume, None, None, _channel_labels(path, len(volume)), "")
            row.intensities.extend((float(channel.min()), float(channel.max())) for channel in volume)
    return row, problems


def _describe_grid(row: CaseRow, header: Header) -> None:
    if len(header.shape) < 3:
        return
    spacing_mm = tuple(round(float(size), 4) for size in np.linalg.norm(header.affine[:3, :3], axis=0))
    codes = nibabel.aff2axcodes(header.affine) if not _affine_problem("", header.affine) else "?"
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


# Reading


def read_header(path: str) -> Header:
    """Read a volume's shape and affine without its voxels.

    Raises:
        InputError: the file is missing, has an unknown suffix, or its header is damaged.
    """
    _require_volume_file(path)
    try:
        if path.lower().endswith(_NIFTI_SUFFIXES):
            nifti: Any = nibabel.load(path)
            return Header(tuple(int(size) for size in nifti.shape), np.asarray(nifti.affine, dtype=np.float64))
        reader = sitk.ImageFileReader()
        reader.SetFileName(path)
        reader.ReadImageInformation()
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    num_components = reader.GetNumberOfComponents()
    return Header(reader.GetSize() + ((num_components,) if num_components > 1 else ()), _ras_affine(reader))


def read_volume(path: str) -> MetaTensor:
    """Read a volume as float32 (C, D, H, W), with C = 1 for a 3D file; the metadata names its file.

    Raises:
        InputError: as `read_header`, or the file is truncated, or neither 3D nor 4D.
    """
    _require_volume_file(path)
    loader = LoadImage(image_only=True)
    loader.register(SimpleITKReader())
    try:
        volume = loader(path)  # (D, H, W) or (D, H, W, C)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    if volume.ndim not in (3, 4):
        raise InputError(str(_shape_problem(path, tuple(volume.shape), 1)))
    voxels = volume.as_tensor()
    channels = voxels[None] if voxels.ndim == 3 else voxels.movedim(3, 0)  # (C, D, H, W)
    meta = {  # a fixed set of keys, so that files of different formats collate
        "filename_or_obj": path,
        CHANNEL_FILES: _channel_labels(path, len(channels)),
        "original_affine": np.asarray(volume.affine),
        "spatial_shape": np.array(channels.shape[1:]),
        "original_channel_dim": 0,
        "space": "RAS",
    }
    return MetaTensor(channels.contiguous().to(torch.float32), affine=volume.affine, meta=meta)


class SimpleITKReader(ImageReader):
    """Read for MONAI's LoadImage what nibabel does not: MHA, MHD and NRRD."""

    def verify_suffix(self, filename: Any) -> bool:
        paths = filename if isinstance(filename, (list, tuple)) else [filename]
        return all(str(path).lower().endswith(VOLUME_SUFFIXES[2:]) for path in paths)

    def read(self, data: Any, **kwargs: Any) -> sitk.Image:
        return sitk.ReadImage(str(data[0] if isinstance(data, (list, tuple)) else data), **kwargs)

    def get_data(self, img: sitk.Image) -> tuple[np.ndarray, dict[str, Any]]:
        voxels = sitk.GetArrayFromImage(img)  # (W, H, D) or (W, H, D, C): the last spatial axis first
        num_spatial = img.GetDimension()
        voxels = voxels.transpose(*reversed(range(num_spatial)), *range(num_spatial, voxels.ndim))
        affine = _ras_affine(img)
        return voxels, {"affine": affine, "original_affine": affine.copy(), "original_channel_dim": float("nan")}


def file_label(path: str | Path) -> str:
    """Name a file in a sentence: with its folder, since an image and its mask often share a name."""
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _require_volume_file(path: str) -> None:
    if not path.lower().endswith(VOLUME_SUFFIXES):
        advice = " Convert a DICOM series to NIfTI first." if Path(path).is_dir() else ""
        raise InputError(f"{path} is no volume that can be read; expected {', '.join(VOLUME_SUFFIXES)}.{advice}")
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist.")


def _damaged(path: str, error: BaseException) -> InputError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return InputError(f"{path} is truncated or damaged: {reason}. Download or copy it again.")


def _ras_affine(image: Any) -> np.ndarray:
    num_axes = image.GetDimension()
    num_spatial = min(num_axes, 3)
    direction = np.reshape(image.GetDirection(), (num_axes, num_axes))[:num_spatial, :num_spatial]
    affine = np.eye(4)
    affine[:num_spatial, :num_spatial] = direction * np.array(image.GetSpacing()[:num_spatial])
    affine[:num_spatial, 3] = image.GetOrigin()[:num_spatial]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS


def _channel_labels(path: str, num_channels: int) -> list[str]:
    label = file_label(path)
    return [label] if num_channels == 1 else [f"{label} (channel {channel})" for channel in range(num_channels)]


def _times(sizes: Any) -> str:
    return "×".join(str(size) for size in sizes)


def _some(values: Any, limit: int = 8) -> str:
    shown = ", ".join(f"{value:g}" for value in list(values)[:limit])
    return shown + (", …" if len(values) > limit else "")
