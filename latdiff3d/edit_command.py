"""What `latdiff3d edit` does."""

from collections.abc import Sequence
from pathlib import Path

from latdiff3d import edit_folders, preflight, sample_folders
from latdiff3d.config import parse_settings
from latdiff3d.covariates import parse_covariates
from latdiff3d.sampling_command import require_counts
from latdiff3d.synthesis import Model


def edit(
    model: str,
    image: str,
    mask: Path,
    region: Path | None,
    out: Path,
    *,
    num_samples: int,
    seed: int,
    steps: int | None,
    gpus: str | None,
    guidance: float | None,
    sampler: str | None,
    settings: Sequence[str] | None,
    covariates: Sequence[str] | None,
    label_map: str | None,
    noise: bool,
    picture: bool,
    gif: bool,
) -> None:
    """Edit as `latdiff3d edit` asks, and say where the volumes are; what an earlier call has made so is kept.

    Raises:
        InputError: for a user's mistake.
    """
    require_counts(num_samples, seed)
    known = parse_covariates(covariates or [])
    loaded = Model.load(model, steps, gpus, sampler=sampler, settings=parse_settings(settings or []))
    if label_map is not None:
        loaded = loaded.with_label_map(preflight.parse_label_map(label_map))
    writing = sample_folders.Writing(picture, gif)
    site, jobs = edit_folders.jobs_for(loaded, image, mask, region, num_samples, seed, known, writing, noise, guidance)
    left = [job for job in jobs if not sample_folders.is_made(job, out)]
    for _ in edit_folders.make(loaded, site, left, out):
        pass
    before = f"; {len(jobs) - len(left)} of them were there" if len(left) < len(jobs) else ""
    print(
        f"{len(jobs)} edited scans are in {out}, such as {out / jobs[0].name}{before}; {site.volume_mm3:.4g} mm³ were "
        "made anew, all else is the scan's own"
    )
