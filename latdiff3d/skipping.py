"""Cases that cannot be trained on are left out where `skip_bad_cases` allows it: named, counted, before training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from latdiff3d.checks import header_problems, require_sound_headers
from latdiff3d.distributed import shared
from latdiff3d.errors import InputError, place_error, root_input_error
from latdiff3d.layouts import Case


def sound_cases(cases: Sequence[Case], num_channels: int, skip_bad_cases: bool) -> list[Case]:
    """Return `cases`, whose headers are sound unless bad ones are to be skipped, which `usable_splits` then does.

    Raises:
        InputError: see `checks.require_sound_headers`.
    """
    return list(cases) if skip_bad_cases else require_sound_headers(cases, num_channels)


def usable_splits(
    splits: Mapping[str, Sequence[Case]],
    preprocessing: Callable[[Any], Any],
    num_channels: int,
    skip_bad_cases: bool,
) -> dict[str, list[Case]]:
    """Return the splits without the cases that cannot be read or are not what they must be; all of them by default.

    Every volume is read once for it, the ranks each reading a share.

    Args:
        splits: from `datalist.split_cases`.
        preprocessing: what a case goes through before any crop.
        num_channels: see `checks.header_problems`.
        skip_bad_cases: leave bad ones out, and say so.

    Raises:
        InputError: when no case to train or validate on is left.
    """
    if not skip_bad_cases:
        return {split: list(cases) for split, cases in splits.items()}
    usable: dict[str, list[Case]] = {}
    for split, cases in splits.items():
        found = shared(range(len(cases)), partial(_numbered, cases, preprocessing, num_channels))
        problems = [found[number] for number in range(len(cases))]
        usable[split] = [case for case, problem in zip(cases, problems, strict=True) if problem is None]
        for problem in filter(None, problems):
            print(f"skipped: {problem}", flush=True)
        if len(usable[split]) < len(cases):
            print(f"{len(cases) - len(usable[split])} of {len(cases)} {split} cases are skipped", flush=True)
    for split in ("train", "val"):
        if not usable[split]:
            raise InputError(f"none of the {len(splits[split])} {split} cases can be used; see above what is wrong.")
    return usable


def problem_of(case: Case, preprocessing: Callable[[Any], Any], num_channels: int) -> str | None:
    """Return what is wrong with a case, None if nothing is."""
    if problems := header_problems(case, num_channels):
        return problems[0]
    try:
        preprocessing(dict(case))
    except Exception as error:
        mistake = root_input_error(error) or place_error(error)
        if mistake is None:
            raise
        return str(mistake)
    return None


def _numbered(cases: Sequence[Case], preprocessing: Callable[[Any], Any], num_channels: int, number: int) -> str | None:
    return problem_of(cases[number], preprocessing, num_channels)
