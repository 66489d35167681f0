"""A scan, a mask and a region in, a folder out: edited scans as NIfTI, with the provenance that makes them again."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from latdiff3d import preflight
from latdiff3d.checkpoints import sha256
from latdiff3d.editing import Edit, Site, edited, guidance_of_edits
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.layouts import scan_name
from latdiff3d.pictures import write_pictures
from latdiff3d.sample_folders import DEFAULTS, Job, Writing, described, provenance_of
from latdiff3d.synthesis import Model
from latdiff3d.volumes import sidecar_file, write_marked


def jobs_for(
    model: Model,
    scan: str | Path,
    mask: str | Path,
    region: str | Path | None = None,
    num_samples: int = 1,
    seed: int = 0,
    known: Mapping[str, Any] | None = None,
    writing: Writing = DEFAULTS,
    noise: bool = True,
    guidance: float | None = None,
) -> tuple[Site, list[Job]]:
    """Look at a scan, a mask and a region, print the warnings, and return them with a job for each edit.

    Args:
        model: from `Model.load`.
        scan, mask, region: see `Model.edit`.
        num_samples: the k-th has seed + k.
        seed: of the first.
        known: covariates by name.
        writing: its pictures alone count.
        noise, guidance: see `editing.edited`.

    Raises:
        InputError: see `Model.site_of`, `preflight.examine` and `Model.numbers_of`.
    """
    scale = guidance_of_edits(model.synthesizer.guidance, guidance).scale
    errors, warnings = preflight.examine(model, mask, crop_matters=False)
    if errors:
        raise InputError(" ".join(errors))
    site = model.site_of(scan, mask, region)
    warnings = [*warnings, *_region_warnings(site, mask)]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    numbers = model.numbers_of(known or {}, site.grid)
    made_by = {
        **provenance_of(model),
        "Guidance": scale,
        "Units": "those of the scan in Image",
        "DataType": [str(channel.numbers.dtype) for channel in site.channels],
        "Image": [{"Name": Path(file).name, "SHA256": sha256(Path(file))} for file in site.files],
        "Mask": described(mask),
        "Region": None if region is None else described(region),
        "Noise": noise,
        "EditedVoxels": int(site.region.sum()),
        "EditedMM3": site.volume_mm3,
        "Covariates": model.covariates.values(numbers),
        "Warnings": warnings,
    }
    case = scan_name(scan, model.modalities)
    jobs = []
    for number in range(seed, seed + num_samples):
        name = case if num_samples == 1 else f"{case}_seed{number:04d}"
        jobs.append(Job(name, mask, number, known or {}, True, writing, {**made_by, "Seed": number}))
    return site, jobs


def make(model: Model, site: Site, jobs: Sequence[Job], out: str | Path) -> Iterator[tuple[str, Edit, list[Path]]]:
    """Make the edits of `jobs_for` in `out`, with a progress bar, and yield case, edit and the scan's files of each."""
    for job in progress_bar(jobs, desc="editing", unit="volume"):
        covariates = model.covariates_of(model.numbers_of(job.known, site.grid))
        noise, guidance = job.provenance["Noise"], job.provenance["Guidance"]
        edit = edited(site, model.synthesizer, covariates, job.seed, noise, guidance)
        sidecar = sidecar_file(Path(out), job.name)
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        sidecar.unlink(missing_ok=True)  # of what was there before; the new one comes last
        before, after = edit.scaled(site.channels), edit.scaled(edit.channels)
        pairs = np.stack([before, after], axis=1).reshape(-1, *before.shape[1:])
        names = [f"{name}{kind}" for name in model.modalities for kind in ("", " edited")]
        shown = np.where(site.region, site.labels, 0)  # so that planes go through what was drawn
        picture, gif = job.writing.picture, job.writing.gif
        write_pictures(sidecar.parent, job.name, pairs, edit.affine, shown, names, picture, gif)
        files: dict[str, Any] = {
            name: ("edited", channel.as_nifti()) for name, channel in zip(model.modalities, edit.channels, strict=True)
        }
        files["seg"] = ("mask", site.labels)
        paths = write_marked(Path(out), job.name, files, edit.affine, job.provenance)
        yield job.name, edit, paths[: len(model.modalities)]


def _region_warnings(site: Site, mask: str | Path) -> Iterator[str]:
    """Say where a mask and a region do not go together."""
    drawn = site.labels > 0
    if not (drawn & site.region).any():
        yield f"{Path(mask).name} holds no label in the region: what is made there is tissue without any."
    parts, _ = ndimage.label(drawn, np.ones((3, 3, 3)))
    cut = np.isin(parts, np.unique(parts[drawn & site.region])) & drawn & ~site.region
    if cut.any():
        lost_mm3 = cut.sum() * site.spacing_mm.prod()
        yield (
            f"{Path(mask).name}: a label crosses the region's border; {lost_mm3:.4g} mm³ of it lie outside, where the "
            "scan stays as it is. Draw the region around all of it, unless it was there before."
        )
