"""List a data set's complete cases, and say which patient is in which split."""

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from latdiff3d.errors import InputError
from latdiff3d.layouts import BRATS_MODALITIES, Case, survey_cases

COARSE = "coarse"  # the key of a case's bool: whether of its mask no more is known than that some label is above 0
SPLITS = ("train", "val", "test")


def read_cases(
    folder: str | Path,
    layout: str = "auto",
    modalities: Sequence[str] = BRATS_MODALITIES,
    mask_required: bool = True,
    patient_pattern: str | None = None,
) -> list[Case]:
    """List the cases of a data set, sorted by name.

    Args:
        folder: the data set's folder, or a `.json` datalist.
        layout: a key of `layouts.LAYOUTS`, or "auto" to find which one it is.
        modalities: file name endings of the BraTS layout, in channel order; the other layouts have their own order.
        mask_required: whether a case without a mask is an error; if not, its "mask" is absent.
        patient_pattern: a regular expression for the case name whose first group is the patient; scans of one patient
            stay in one split. Without it, a datalist's own "patient" or else the case name is the patient.

    Returns:
        Dicts of "case", "patient", "image" (one path per modality, or one path of a 3D or multi-channel 4D file) and
        "mask" (a path).

    Raises:
        InputError: no such folder, no or more than one layout in it, or the first case that is incomplete.
    """
    found = survey_cases(folder, layout, modalities, mask_required, patient_pattern)
    raise_first([problem for one in found for problem in one.problems])
    return [one.case for one in found]


def split_cases(
    cases: Sequence[Case],
    folder: str | Path,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    num_fine_cases: int | None = None,
) -> dict[str, list[Case]]:
    """Put every case into "train", "val" or "test", all scans of a patient into the same one.

    `train.list`, `val.list` and `test.list` in `folder` decide where they exist (one case a line, # starts a comment;
    a case in no list is left out). Else a datalist's own validation section does. Else a seeded hash of the patient
    does, so that a case that is added moves no other; a datalist's own test section stays the test set.

    With `num_fine_cases` each case says under `COARSE` whether its mask is taken for a coarse one: the training cases
    after so many, in the order of train.list or else in the sorted one, are; those of the other splits never.

    Raises:
        InputError: a listed case that is missing, a case or a patient in two splits, an empty train or val.
    """
    if not (val_fraction > 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise InputError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no split to train or validate on; "
            "expected val_fraction above 0 and a sum below 1."
        )
    root = Path(folder).expanduser()
    if not root.exists():
        raise InputError(f"{root} does not exist; expected the folder of train.list and val.list, or of the data set.")
    folder_of_lists = root.parent if root.is_file() else root
    lists = {split: file for split in SPLITS if (file := folder_of_lists / f"{split}.list").is_file()}
    fractions = (val_fraction, test_fraction)
    if lists:
        split_of = _splits_from_lists(cases, lists)
    elif any(case.get("section") == "val" for case in cases):
        split_of = {case["case"]: case["section"] for case in cases}
    else:
        split_of = _splits_from_hash(cases, fractions, seed)
    _refuse_leaks(cases, split_of)
    splits: dict[str, list[Case]] = {split: [] for split in SPLITS}
    for case in cases:
        if case["case"] in split_of:
            splits[split_of[case["case"]]].append({key: value for key, value in case.items() if key != "section"})
    if num_fine_cases is not None:
        in_order = [name for name, split in split_of.items() if split == "train"]
        coarse = set(in_order[num_fine_cases:])
        for case in (case for split in splits.values() for case in split):
            case[COARSE] = case["case"] in coarse
    if not splits["train"] or not splits["val"]:
        advice = f"Name cases in {folder_of_lists}/train.list and val.list."
        if not lists:
            advice = _advise_seed(cases, fractions) or advice
        raise InputError(
            f"{root}: {len(cases)} case(s) of {len({case['patient'] for case in cases})} patient(s) gave "
            f"{len(splits['train'])} to train and {len(splits['val'])} to val; both need at least one. {advice}"
        )
    return splits


def raise_first(problems: Sequence[str]) -> None:
    """Raise an InputError of the first problem that says how many more there are; do nothing without one."""
    if problems:
        more = f" (and {len(problems) - 1} more; `latdiff3d doctor DIR` lists them all)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)


def _splits_from_lists(cases: Sequence[Case], lists: dict[str, Path]) -> dict[str, str]:
    known = [case["case"] for case in cases]
    split_of: dict[str, str] = {}
    for split, file in lists.items():
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
            name = line.split("#", 1)[0].strip()
            if not name:
                continue
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise InputError(
                    f"{file}, line {number} names {name}, which is none of the {len(known)} cases there are{hint}. "
                    "Correct the line or take it out."
                )
            if split_of.setdefault(name, split) != split:
                raise InputError(f"{name} is in {split_of[name]}.list and in {file}; a case belongs to one split.")
    return split_of


def _splits_from_hash(cases: Sequence[Case], fractions: tuple[float, float], seed: int) -> dict[str, str]:
    val_fraction, test_fraction = fractions
    split_of = {}
    for case in cases:
        place = int(hashlib.sha256(f"{seed}:{case['patient']}".encode()).hexdigest()[:16], 16) / 16**16  # in [0, 1)
        if case.get("section") == "test" or val_fraction <= place < val_fraction + test_fraction:
            split_of[case["case"]] = "test"
        else:
            split_of[case["case"]] = "val" if place < val_fraction else "train"
    return split_of


def _refuse_leaks(cases: Sequence[Case], split_of: dict[str, str]) -> None:
    first_of: dict[str, str] = {}
    for case in cases:
        name, split = case["case"], split_of.get(case["case"])
        if split is None:
            continue
        first = first_of.setdefault(case["patient"], name)
        if split_of[first] != split:
            raise InputError(
                f"patient {case['patient']} is in two splits: {first} in {split_of[first]}, {name} in {split}. "
                "Put all scans of a patient into one."
            )


def _advise_seed(cases: Sequence[Case], fractions: tuple[float, float]) -> str | None:
    for seed in range(1000):
        if {"train", "val"} <= set(_splits_from_hash(cases, fractions, seed).values()):
            return f"The split seed {seed} fills both, or name cases in train.list and val.list."
    return None
