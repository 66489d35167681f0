"""What is asked for, a mask, a folder or a split's cases → the volumes that are to be made, without those there are."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from latdiff3d import distributed
from latdiff3d.errors import InputError
from latdiff3d.model_cases import cases_of_split, known_of
from latdiff3d.sample_folders import DEFAULTS, Job, Writing, is_made, jobs_for, masks_at
from latdiff3d.synthesis import Model


class Work(NamedTuple):
    """The volumes that a request comes to.

    Attributes:
        jobs: one for each volume that can be made.
        left: those of them that are not there yet.
        refused: of each mask that no volume can be made for, by its file, what is wrong with it.
        num_masks: the refused ones included.
    """

    jobs: Sequence[Job]
    left: Sequence[Job]
    refused: Mapping[str, str]
    num_masks: int

    def said(self, out: str | Path) -> str:
        """Return the sentence that says where the volumes are, once those of `left` are made too."""
        before = len(self.jobs) - len(self.left)
        there = f"; {before} of them were there" if before else ""
        return f"{len(self.jobs)} synthetic cases are in {out}, such as {Path(out) / self.jobs[0].name}{there}"


@dataclass(frozen=True)
class Request:
    """What is to be sampled, whatever the model.

    Attributes:
        mask: a file or a folder; None for the masks of a split of `data`, or for a model without masks.
        data: a data set's folder; None for none.
        split: train, val or test.
        num_samples: for each mask, or in all for an unconditional model.
        seed: of the first.
        grid: "mask", the mask file's own, or "crop", the model's.
        known: covariates by name, the same for all; a split's cases have their own beside them.

    Raises:
        InputError: for another grid.
    """

    mask: str | Path | None = None
    data: str | Path | None = None
    split: str = "val"
    num_samples: int = 1
    seed: int = 0
    grid: str = "mask"
    known: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.grid not in ("mask", "crop"):
            raise InputError(f"grid is {self.grid!r}; expected mask or crop.")

    def work(self, model: Model, out: str | Path, writing: Writing = DEFAULTS) -> Work:
        """Look at every mask, print what is wrong with some of them, and return what is to be made.

        Args:
            model: from `Model.load`.
            out: the folder, where what is made already is looked for.
            writing: see `sample_folders.Job`.

        Raises:
            InputError: as `masks_at`, `cases_of_split` and `jobs_for`, or where no mask can be used.
        """
        masks, known = self._masks(model)
        on_mask_grid = self.grid == "mask"
        jobs, refused = jobs_for(model, masks, self.num_samples, self.seed, on_mask_grid, known, writing)
        if len(masks) == len(refused) == 1:
            raise InputError(*refused.values())
        for line in refused.values() if distributed.rank() == 0 else ():
            print(f"error: {line}", file=sys.stderr, flush=True)
        if not jobs:
            raise InputError(f"none of the {len(masks)} masks can be used; each is named above.")
        return Work(jobs, [job for job in jobs if not is_made(job, out)], refused, len(masks))

    def _masks(self, model: Model) -> tuple[list[str | Path], list[dict[str, Any]]]:
        """Return the masks and the covariates of each, or without masks those of the only job."""
        if self.data is not None:
            cases = cases_of_split(model, self.data, self.split)
            return [case["mask"] for case in cases], [known_of(model, case) | dict(self.known) for case in cases]
        masks: list[str | Path] = [] if self.mask is None else [*masks_at(self.mask)]
        return masks, [dict(self.known)] * max(len(masks), 1)
