"""What `latdiff3d sample` and inference/sample.py do."""

import sys
from collections.abc import Sequence
from pathlib import Path

from latdiff3d import preflight, sample_folders
from latdiff3d.config import parse_settings
from latdiff3d.covariates import parse_covariates
from latdiff3d.errors import SOME_LEFT_OUT, InputError
from latdiff3d.memory import gigabytes
from latdiff3d.sampling_jobs import Request
from latdiff3d.synthesis import Model

WHOLE_MEMORY = "6GB"  # for whole volumes


def sample(
    model: str,
    out: Path,
    *,
    mask: Path | None,
    num_samples: int,
    seed: int,
    steps: int | None,
    gpus: str | None,
    guidance: float | None,
    sampler: str | None,
    covariates: Sequence[str] | None,
    picture: bool,
    gif: bool,
    like: str | None,
    int16: bool,
    label_map: str | None,
    data: Path | None = None,
    split: str = "val",
    grid: str = "mask",
    settings: Sequence[str] | None = None,
    whole: bool = False,
    memory: str | None = None,
) -> None:
    """Sample as `latdiff3d sample` and `inference/sample.py` ask, and say where the volumes are.

    What an earlier call has made in the same way is kept.

    Raises:
        InputError: for a user's mistake, and where no mask can be used.
        SystemExit: with `SOME_LEFT_OUT`, after the others are done, where some masks cannot.
    """
    require_counts(num_samples, seed)
    if mask is not None and data is not None:
        raise InputError("--mask and --data are both given; expected one of them.")
    if memory is not None and not whole:
        raise InputError(f"--memory is {memory!r}, which only whole volumes keep to; add --whole, or leave it out.")
    memory_gb = gigabytes(memory or WHOLE_MEMORY)
    request = Request(mask, data, split, num_samples, seed, grid, parse_covariates(covariates or []))
    loaded = Model.load(model, steps, gpus, guidance, sampler, parse_settings(settings or []))
    if label_map is not None:
        loaded = loaded.with_label_map(preflight.parse_label_map(label_map))
    if whole:
        loaded = loaded.for_whole_masks(memory_gb)
    writing = sample_folders.Writing(picture, gif, sample_folders.reference_for(loaded, like), int16)
    work = request.work(loaded, out, writing)
    for _ in sample_folders.make(loaded, work.left, out):
        pass
    print(work.said(out))
    if work.refused:
        print(f"{len(work.refused)} of {work.num_masks} masks are left out; each is named above.", file=sys.stderr)
        raise SystemExit(SOME_LEFT_OUT)


def require_counts(num_samples: int, seed: int) -> None:
    """Refuse numbers of volumes and seeds that are none, with an InputError."""
    if num_samples < 1 or seed < 0:
        raise InputError(f"{num_samples} volumes from seed {seed}; expected at least 1, from a seed of at least 0.")
