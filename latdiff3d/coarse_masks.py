"""Masks of which no more is known than that some label is above 0: a class of their own beside the fine ones."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from latdiff3d.datalist import COARSE
from latdiff3d.errors import InputError
from latdiff3d.layouts import Case
from latdiff3d.transforms import CoarseMaskd


class CoarseCased(MapTransform):
    """Put `label`, for "which one is not known", wherever the mask of a coarse case is above 0.

    Args:
        keys: masks.
        label: K, behind the mapped labels 0 … K − 1.
        flag_key: where a case says whether it is coarse; one that says nothing is fine.
    """

    backend = CoarseMaskd.backend

    def __init__(
        self, keys: KeysCollection, label: int, flag_key: str = COARSE, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label = label
        self.flag_key = flag_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if d.get(self.flag_key, False):
            for key in self.key_iterator(d):
                mask = convert_to_tensor(d[key], track_meta=True)
                d[key] = (mask > 0).to(mask.dtype) * self.label
        return d


def num_labels(labels: Sequence[int], mask_mode: str, num_fine_cases: int | None) -> int:
    """Return how many labels masks are known by: those of `labels`, or 2 where all masks are coarse."""
    return len(labels) if mask_mode == "fine" or num_fine_cases is not None else 2


def num_classes(labels: Sequence[int], mask_mode: str, num_fine_cases: int | None) -> int:
    """Return how many classes the condition has: one more than labels where some masks are coarse."""
    return num_labels(labels, mask_mode, num_fine_cases) + (num_fine_cases is not None)


def coarse_label(labels: Sequence[int], num_fine_cases: int | None) -> int:
    """Return the label of what is above 0 in a coarse mask: 1, or where fine masks have that one, their number K."""
    return 1 if num_fine_cases is None else len(labels)


def check_num_fine_cases(num_fine_cases: int | None, mask_mode: str, conditioning: str, cases: Sequence[Case]) -> None:
    """Refuse a number of fine cases that changes nothing.

    Args:
        num_fine_cases: of the training cases, or None for all.
        mask_mode: "fine" or "coarse".
        conditioning: as `conditioning.condition_for` takes it.
        cases: the training cases.

    Raises:
        InputError: all masks are coarse anyway, or not looked at, or all fine.
    """
    if num_fine_cases is None:
        return
    if mask_mode != "fine":
        raise InputError(
            f"num_fine_cases is {num_fine_cases}, but mask_mode {mask_mode} makes all masks coarse; set one of them."
        )
    if conditioning == "none":
        raise InputError(f"num_fine_cases is {num_fine_cases}, but conditioning none takes no mask; set one of them.")
    if num_fine_cases >= len(cases):
        raise InputError(
            f"num_fine_cases is {num_fine_cases}, of {len(cases)} training cases; expected fewer than there are, or "
            "null where all are fine."
        )


def fine_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the cases whose labels are known."""
    return [case for case in cases if not case.get(COARSE, False)]
