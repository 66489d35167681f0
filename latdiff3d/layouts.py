"""Find the files that make one case, in each layout that a data set may have."""

import json
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from latdiff3d.dicom_masks import SUFFIX
from latdiff3d.errors import InputError

# {"case": str, "patient": str, "image": list[str], "mask": str}; "section" until `datalist.split_cases` has used it;
# what a datalist says besides, as "covariates", until `covariates.described` has.
Case = dict[str, Any]

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
MASK_SUFFIXES = (*VOLUME_SUFFIXES, SUFFIX)
BRATS_MODALITIES = ("flair", "t1", "t1ce", "t2")
LAYOUTS = {
    "brats": "folders <case>/ with <case>_flair.nii.gz, …, <case>_seg.nii.gz",
    "decathlon": "dataset.json",
    "json": "datalist.json, or the path of a .json file itself",
    "folders": "images/ beside masks/ or labels/",
}

_OWN_KEYS = ("image", "label", "mask", "case", "patient")  # of an entry; others are covariates
_SECTIONS = {"training": "train", "validation": "val", "test": "test"}  # MONAI's datalist names → ours
_PAIR_FOLDERS = ("images", "masks", "labels")


class Found(NamedTuple):
    """A case with the files of it that exist, and one sentence for each thing its layout lacks."""

    case: Case
    problems: list[str]


def survey_cases(
    folder: str | Path,
    layout: str = "auto",
    modalities: Sequence[str] = BRATS_MODALITIES,
    mask_required: bool = True,
    patient_pattern: str | None = None,
) -> list[Found]:
    """List the cases as `datalist.read_cases` does, incomplete ones too, each with what it lacks.

    Raises:
        InputError: what keeps every case from being read: the folder or the layout.
    """
    root = Path(folder).expanduser()
    if layout == "auto":
        layout = find_layout(root)
    elif layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; expected auto, {', '.join(LAYOUTS)}.")
    elif not root.exists():
        raise InputError(f"{root} does not exist; expected a data set's folder or a .json datalist.")
    elif root.is_file() and layout in ("brats", "folders"):
        raise InputError(f"{root} is a file; the layout {layout} is a folder with {LAYOUTS[layout]}.")
    if layout == "brats":
        found = list(_brats_cases(root, modalities, mask_required))
    elif layout == "folders":
        found = list(_folder_cases(root, mask_required))
    else:
        found = list(_json_cases(_json_file(root, layout), mask_required))
    if not found:
        raise InputError(f"{root} holds no case in the layout {layout}; expected {LAYOUTS[layout]}.")
    _refuse_twins([one.case["case"] for one in found], root)
    for one in found:
        _name_patient(one, patient_pattern)
    return sorted(found, key=lambda one: one.case["case"])


def files_of(case: Case) -> list[str]:
    """Return the paths of a case's files, the mask's last."""
    return [str(path) for path in case["image"]] + ([str(case["mask"])] if "mask" in case else [])


def find_layout(root: Path) -> str:
    """Return the one layout of `LAYOUTS` that `root` has; raise an InputError that says what was looked for."""
    if not root.exists():
        raise InputError(f"{root} does not exist; expected a data set's folder or a .json datalist.")
    if root.is_file():
        if root.suffix != ".json":
            raise InputError(f"{root} is a file, but no .json datalist; expected a data set's folder or a .json file.")
        return "json"
    matches = {
        "brats": any(_is_brats_folder(folder) for folder in _subfolders(root)),
        "decathlon": (root / "dataset.json").is_file(),
        "json": (root / "datalist.json").is_file(),
        "folders": (root / "images").is_dir() and any((root / name).is_dir() for name in ("masks", "labels")),
    }
    layouts = [layout for layout, is_there in matches.items() if is_there]
    if len(layouts) > 1:
        reasons = "; ".join(f"{layout} ({LAYOUTS[layout]})" for layout in layouts)
        raise InputError(f"{root} has more than one layout: {reasons}. Say which with layout.")
    if not layouts:
        looked_for = "; ".join(f"{layout}: {what}" for layout, what in LAYOUTS.items())
        raise InputError(f"{root} {_holding(root)}; none of the known layouts was found. Looked for {looked_for}.")
    return layouts[0]


def volume_stem(file: str | Path) -> str:
    """Return a volume's or a mask's file name without its suffix: `a/case_1.nii.gz` → `case_1`."""
    name = Path(file).name
    suffix = next((suffix for suffix in MASK_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def scan_files(place: str | Path, modalities: Sequence[str]) -> list[str]:
    """Return the files of one scan that a command line names.

    Args:
        place: a file, with all channels; files joined by commas, in the order of `modalities`; or a folder that holds a
            `*_<modality>` file for each.
        modalities: of the model.

    Raises:
        InputError: a file or a modality is missing, or there are several of one.
    """
    path = Path(place)
    if path.is_dir():
        volumes = sorted(file for file in path.iterdir() if file.name.lower().endswith(VOLUME_SUFFIXES))
        found = [[str(file) for file in volumes if f"_{volume_stem(file)}".endswith(f"_{m}")] for m in modalities]
        for modality, files in zip(modalities, found, strict=True):
            if len(files) != 1:
                raise InputError(f"{path} has {len(files)} files *_{modality}; expected one for each modality.")
        return [files[0] for files in found]
    files = [str(place)] if path.is_file() else str(place).split(",")
    if missing := [file for file in files if not Path(file).is_file()]:
        raise InputError(f"there is no scan at {missing[0]}; expected a file, files joined by commas, or a folder.")
    if len(files) not in (1, len(modalities)):
        raise InputError(
            f"{place} are {len(files)} files; expected one with all channels, or one each of {', '.join(modalities)}."
        )
    return files


def scan_name(place: str | Path, modalities: Sequence[str]) -> str:
    """Return the name of a scan of `scan_files`: its folder's, or its first file's without a modality at its end."""
    if Path(place).is_dir():
        return Path(place).resolve().name
    stem = volume_stem(place if Path(place).is_file() else str(place).split(",")[0])
    return next((stem.removesuffix(f"_{name}") for name in modalities if stem.endswith(f"_{name}")), stem)


# BraTS folders


def _brats_cases(root: Path, modalities: Sequence[str], mask_required: bool) -> Iterator[Found]:
    for folder in _subfolders(root):
        name = folder.name
        files, problems = _volumes_by_stem(folder)
        case: Case = {"case": name, "image": []}
        missing = []
        for part in (*modalities, "seg"):
            # BraTS 2021 joins with _, BraTS 2023 with -.
            file = files.get(f"{name}_{part}") or files.get(f"{name}-{part}")
            if file is None and (part != "seg" or mask_required):
                missing.append(f"{name}_{part}.nii.gz")
            elif file is not None and part == "seg":
                case["mask"] = str(file)
            elif file is not None:
                case["image"].append(str(file))
        if missing:
            problems.append(
                f"{name} lacks {', '.join(missing)}: {folder} {_holding(folder)}. "
                "Add what is missing, or move the folder out of the data set."
            )
        yield Found(case, problems)


def _is_brats_folder(folder: Path) -> bool:
    if folder.name in _PAIR_FOLDERS:
        return False
    return any(file.name.startswith((f"{folder.name}_", f"{folder.name}-")) for file in _volumes(folder))


# A pair of folders


def _folder_cases(root: Path, mask_required: bool) -> Iterator[Found]:
    if not (root / "images").is_dir():
        raise InputError(f"{root} has no images/; it {_holding(root)}. The layout folders is {LAYOUTS['folders']}.")
    mask_folders = [folder for name in ("masks", "labels") if (folder := root / name).is_dir()]
    if len(mask_folders) > 1:
        raise InputError(f"{root} has both masks/ and labels/; expected one of them. Move the other away.")
    if not mask_folders and mask_required:
        raise InputError(f"{root} has images/ but neither masks/ nor labels/; it {_holding(root)}.")
    images, problems = _volumes_by_stem(root / "images")
    masks: dict[str, Path] = {}
    for folder in mask_folders:
        masks, mask_problems = _volumes_by_stem(folder)
        problems += mask_problems
    for name in sorted(images.keys() | masks.keys()):
        case: Case = {"case": name, "image": []}
        if name in images:
            case["image"] = [str(images[name])]
        else:
            problems.append(_unmatched(masks[name], root / "images"))
        if name in masks:
            case["mask"] = str(masks[name])
        elif mask_required:
            problems.append(_unmatched(images[name], mask_folders[0]))
        yield Found(case, problems)
        problems = []


def _unmatched(file: Path, others: Path) -> str:
    near = get_close_matches(volume_stem(file), [volume_stem(other) for other in _volumes(others)], n=1)
    hint = f" (the nearest name there is {near[0]})" if near else ""
    return (
        f"{file.parent.name}/{file.name} has no file of the same name in {others}{hint}. "
        "Pairs are matched by name: rename, add or move one of them."
    )


# JSON datalists


def _json_file(root: Path, layout: str) -> Path:
    if root.is_file():
        return root
    file = root / ("dataset.json" if layout == "decathlon" else "datalist.json")
    if not file.is_file():
        raise InputError(f"{file} does not exist; {root} {_holding(root)}. The layout {layout} is {LAYOUTS[layout]}.")
    return file


def _json_cases(file: Path, mask_required: bool) -> Iterator[Found]:
    for section, entries in _json_sections(file).items():
        for number, listed in enumerate(entries):
            where = f"{file.name}, {section} entry {number}"
            entry = {"image": listed} if isinstance(listed, str) else listed
            if not isinstance(entry, dict) or not entry.get("image"):
                raise InputError(f'{where}: found {json.dumps(listed)[:80]}; expected {{"image": …, "label": …}}.')
            # Decathlon lists its test images without masks: they are nothing to train or measure on.
            if section == "test" and mask_required and not _listed_mask(entry):
                continue
            yield _json_case(entry, where, file.parent, _SECTIONS[section], mask_required)


def _json_case(entry: dict[str, Any], where: str, root: Path, section: str, mask_required: bool) -> Found:
    listed = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    images = [root / image for image in listed]
    case: Case = {"case": str(entry.get("case") or volume_stem(images[0])), "section": section}
    if "patient" in entry:
        case["patient"] = str(entry["patient"])
    if others := {key: value for key, value in entry.items() if key not in _OWN_KEYS}:
        case["covariates"] = others
    problems = []
    case["image"] = [str(image) for image in images if image.is_file()]
    mask = _listed_mask(entry)
    if mask and (root / mask).is_file():
        case["mask"] = str(root / mask)
    absent = [str(path) for path in [*images, *([root / mask] if mask else [])] if not path.is_file()]
    if absent:
        there = [*case["image"], *([case["mask"]] if "mask" in case else [])]
        problems.append(
            f"{case['case']} ({where}) lists {', '.join(absent)}, which is not there; of this case "
            f"{', '.join(there) or 'nothing'} is. Copy the missing file, or take the entry out."
        )
    if mask is None and mask_required:
        problems.append(f'{case["case"]} ({where}) has no "label" or "mask"; it has {", ".join(entry)}. Add its mask.')
    return Found(case, problems)


def _listed_mask(entry: Any) -> str | None:
    return (entry.get("label") or entry.get("mask")) if isinstance(entry, dict) else None


def _json_sections(file: Path) -> dict[str, list[Any]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}.") from error
    if isinstance(listed, list):
        return {"training": listed}
    sections = {section: listed[section] for section in _SECTIONS if section in listed}
    if not sections:
        raise InputError(f"{file} has the keys {', '.join(listed)}; expected one of {', '.join(_SECTIONS)}, or a list.")
    for section, entries in sections.items():
        if not isinstance(entries, list):
            raise InputError(f"{file}: {section} is a {type(entries).__name__}; expected a list of cases.")
    return sections


# Names


def _refuse_twins(names: Sequence[str], root: Path) -> None:
    twins = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twins:
        raise InputError(
            f"{root} names {len(twins)} case(s) more than once, {twins[0]} first; a case needs a name of its own. "
            'In a datalist, give each entry a "case".'
        )


def _name_patient(found: Found, pattern: str | None) -> None:
    case = found.case
    if "patient" in case:
        return
    case["patient"] = case["case"]
    if pattern is None:
        return
    try:
        match = re.search(pattern, case["case"])
    except re.error as error:
        raise InputError(f"patient_pattern {pattern!r} is no regular expression: {error}.") from error
    if match is None:
        found.problems.append(f"patient_pattern {pattern!r} does not match the case {case['case']}.")
    elif not match.re.groups:
        raise InputError(f"patient_pattern {pattern!r} has no group; expected the patient in (…).")
    else:
        case["patient"] = match.group(1)


# Files


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _volumes(folder: Path) -> list[Path]:
    # macOS leaves ._x.nii.gz beside x.nii.gz; they are no volumes.
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.lower().endswith(VOLUME_SUFFIXES) and not path.name.startswith(".")
    )


def _volumes_by_stem(folder: Path) -> tuple[dict[str, Path], list[str]]:
    files: dict[str, Path] = {}
    problems = []
    for file in _volumes(folder):
        twin = files.setdefault(volume_stem(file), file)
        if twin != file:
            problems.append(f"{folder} has both {twin.name} and {file.name}; expected one. Move the other away.")
    return files, problems


def _holding(folder: Path) -> str:
    if not folder.is_dir():
        return "is no folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return "is empty"
    return f"holds {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
