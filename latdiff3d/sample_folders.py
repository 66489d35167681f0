"""Masks in, folders out: every sample of a model is written as NIfTI with the provenance that makes it again."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latdiff3d import checkpoints, fingerprints, preflight
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.intensities import Reference, reference
from latdiff3d.layouts import MASK_SUFFIXES, scan_files
from latdiff3d.pictures import write_pictures
from latdiff3d.provenance import computed_on, sidecar_of
from latdiff3d.synthesis import Model, Sample
from latdiff3d.training_intensities import training_reference
from latdiff3d.volumes import case_name, labels_of, read_mask, sidecar_file, write_synthetic

_SUFFIXES = f"{', '.join(MASK_SUFFIXES[:-1])} or {MASK_SUFFIXES[-1]}"
_BESIDE_THE_POINT = ("Path", "Name", "Warnings")  # of a sidecar: what changes no volume


class Writing(NamedTuple):
    """How volumes are written.

    Attributes:
        picture, gif: which pictures of each, see `pictures.write_pictures`.
        like: a scan, or the training scans, to whose range intensities are mapped; [0, 1] where there is none.
        int16: see `volumes.write_marked`.
    """

    picture: bool = True
    gif: bool = False
    like: Reference | None = None
    int16: bool = False

    def said(self, modalities: Sequence[str]) -> dict[str, Any]:
        """Return what a sidecar says of the numbers in the files."""
        units = "normalised intensity, 0 to 1" if self.like is None else self.like.units
        mapped = {} if self.like is None else self.like.said(modalities)
        return {"Units": units, "DataType": "int16" if self.int16 else "float32", **mapped}


DEFAULTS = Writing()


def reference_for(model: Model, like: str | None) -> Reference | None:
    """Return the range of intensities that `like` names, None for none.

    Args:
        like: "training" for the scans that the model was trained on, or a place of `layouts.scan_files`.

    Raises:
        InputError: no such scan, or a model that does not say what its training scans were like.
    """
    if like == "training":
        return training_reference(model.training_intensities, model.path)
    return reference(scan_files(like, model.modalities), model.preprocessing) if like else None


class Job(NamedTuple):
    """One volume that is to be made.

    Attributes:
        name: of its folder, and of the files in it.
        mask: its file, None for a model without masks.
        known: covariates by name.
        on_mask_grid: write on the mask file's own grid, 0 where that is larger; else on the model's.
        writing: how it will be written.
        provenance: what its sidecar will say.
    """

    name: str
    mask: str | Path | None
    seed: int
    known: Mapping[str, Any]
    on_mask_grid: bool
    writing: Writing
    provenance: Mapping[str, Any]

    @property
    def pictures(self) -> list[str]:
        """Return the names of the pictures that are wanted beside it."""
        wanted = {"png": self.writing.picture, "gif": self.writing.gif}
        return [f"{self.name}.{ending}" for ending, is_wanted in wanted.items() if is_wanted]


def sample_to_folder(
    model: Model,
    masks: Sequence[str | Path],
    out: str | Path,
    num_samples: int = 1,
    seed: int = 0,
    on_mask_grid: bool = True,
    known: Sequence[Mapping[str, Any]] = (),
    writing: Writing = DEFAULTS,
) -> Iterator[tuple[str, Sample, list[Path]]]:
    """Write `num_samples` volumes for each mask, or in all for an unconditional model.

    Args:
        out: the folder; each case gets one below it.
        model, masks, num_samples, seed, on_mask_grid, known, writing: see `jobs_for`.

    Yields:
        case, sample and its files, as they are written.

    Raises:
        InputError: as `jobs_for`, or a mask that no volume can be made for, before any is made.
    """
    jobs, refused = jobs_for(model, masks, num_samples, seed, on_mask_grid, known, writing)
    if refused:
        raise InputError(next(iter(refused.values())))
    yield from make(model, jobs, out)


def jobs_for(
    model: Model,
    masks: Sequence[str | Path],
    num_samples: int = 1,
    seed: int = 0,
    on_mask_grid: bool = True,
    known: Sequence[Mapping[str, Any]] = (),
    writing: Writing = DEFAULTS,
    noise_apart: bool = False,
) -> tuple[list[Job], dict[str, str]]:
    """Look at every mask, print the warnings, and return a job for each volume that can be made.

    Args:
        model: from `Model.load`.
        masks: their files; none for an unconditional model.
        num_samples: for each mask, or in all for an unconditional model; the k-th has seed + k.
        seed: of the first.
        known: covariates by name, of each mask, or for a model without masks of its only job; none where left out.
        on_mask_grid, writing: see `Job`.
        noise_apart: a mask's seeds begin where those of the one before end, so that no two volumes share their noise.

    Returns:
        the jobs; and of each mask that no volume can be made for, by its file, what is wrong with it.

    Raises:
        InputError: two masks of one name, or what `Model.require_mask` and `numbers_of` refuse.
    """
    named = {case_name(mask): mask for mask in masks}
    if len(named) != len(masks):
        raise InputError(f"{len(masks)} masks have only {len(named)} different names; expected a name of its own each.")
    of_model = provenance_of(model) | writing.said(model.modalities)
    cases: list[tuple[str, str | Path | None]] = list(named.items()) or [("synthetic", None)]
    jobs: list[Job] = []
    refused: dict[str, str] = {}
    for index, ((case, mask), given) in enumerate(zip(cases, known or [{}] * len(cases), strict=True)):
        errors, warnings = ([], []) if mask is None else preflight.examine(model, mask)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if errors:
            refused[str(mask)] = " ".join(errors)
            continue
        numbers = model.numbers_of(given, model.grid_of(mask))
        of_mask = {
            "Mask": mask and described(mask),
            "Grid": "mask" if mask is not None and on_mask_grid else "crop",
            "Extent": "whole" if model.is_whole else "crop",
            "MemoryGB": model.memory_gb,  # the tiles' sizes, by which voxels differ in their last digits
            "Covariates": model.covariates.values(numbers),
            "Warnings": warnings,
        }
        first = seed + index * num_samples if noise_apart else seed
        for number in range(first, first + num_samples):
            name = case if num_samples == 1 and mask is not None else f"{case}_seed{number:04d}"
            jobs.append(Job(name, mask, number, given, on_mask_grid, writing, {**of_model, "Seed": number, **of_mask}))
    _warn_of_unused_labels(model, {job.mask for job in jobs if job.mask is not None})
    return jobs, refused


def make(model: Model, jobs: Sequence[Job], out: str | Path) -> Iterator[tuple[str, Sample, list[Path]]]:
    """Make the volumes of `jobs_for` in `out`, with a progress bar, and yield case, sample and files of each.

    The sidecar of what was there before goes first, the new one comes last: one that is there tells of all beside it.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    with progress_bar(total=len(jobs), desc="sampling", unit="volume") as bar:
        for job in jobs:
            sample = model.sample(job.mask, job.seed, job.known)
            volume, affine, labels = sample.volume.numpy(), sample.affine, None
            shown = None if sample.grid is None else np.asarray(sample.grid.mask[0])
            if sample.grid is not None and job.on_mask_grid:
                volume, affine = sample.on_mask_grid()
                shown = labels = labels_of(sample.grid.stored, model.label_map)
            sidecar = sidecar_file(Path(out), job.name)
            sidecar.parent.mkdir(exist_ok=True)
            sidecar.unlink(missing_ok=True)
            picture, gif, like, int16 = job.writing
            write_pictures(sidecar.parent, job.name, volume, affine, shown, model.modalities, picture, gif)
            if like is not None:
                volume = like.unscaled(volume)
            files = write_synthetic(
                Path(out), job.name, volume, affine, model.modalities, job.provenance, labels, int16
            )
            bar.update()
            yield job.name, sample, files


def is_made(job: Job, out: str | Path) -> bool:
    """Say whether `out` holds a job's volume, made as it would be: files as the sidecar has them, pictures too."""
    file = sidecar_file(Path(out), job.name)
    try:
        found = json.loads(file.read_text())
        are_whole = all(
            checkpoints.sha256(file.parent / name) == said["SHA256"] for name, said in found.pop("Files").items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, cut, or of another version
        return False
    are_whole = are_whole and all((file.parent / picture).is_file() for picture in job.pictures)
    wanted = json.loads(json.dumps(sidecar_of(job.provenance, {})))
    del wanted["Files"]
    return are_whole and all(essence(found.get(key)) == essence(value) for key, value in essence(wanted).items())


def masks_at(place: str | Path) -> list[Path]:
    """Return the masks that `place` names: the file itself, or a folder's files of `MASK_SUFFIXES`, sorted.

    Raises:
        InputError: when there is none.
    """
    path = Path(place)
    # A file is taken whatever its name; readers say what is wrong with that.
    masks = [path] if path.is_file() else [file for file in sorted(path.glob("[!.]*")) if _is_mask(file)]
    if not masks:
        raise InputError(f"there is no mask at {path}; expected a {_SUFFIXES} file, or a folder of them.")
    return masks


def essence(value: Any) -> Any:
    """Return a part of a sidecar, or of a job's provenance, without what changes no volume."""
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in _BESIDE_THE_POINT}


def _warn_of_unused_labels(model: Model, masks: Iterable[str | Path]) -> None:
    if not model.label_map:
        return
    unused = set(model.label_map).difference(*(np.unique(read_mask(mask)[0]).tolist() for mask in masks))
    if unused:
        listed = ", ".join(map(str, sorted(unused)))
        print(f"warning: --label-map names {listed}, which none of the masks holds.", file=sys.stderr, flush=True)


def provenance_of(model: Model) -> dict[str, Any]:
    """Return what a sidecar says of the model, how it samples and what it runs on."""
    synthesizer = model.synthesizer
    return {
        "Checkpoint": {"Path": str(model.path), "SHA256": checkpoints.sha256(model.path)},
        "Sampler": synthesizer.sampler,
        "Steps": synthesizer.num_steps,
        "StepSpacing": synthesizer.step_spacing,
        "Eta": synthesizer.eta,
        "Guidance": synthesizer.guidance.scale,
        "GuidanceInterval": list(synthesizer.guidance.interval),
        "MaskMode": model.config.get()["mask_mode"] if model.is_conditional else None,
        "LabelMap": {str(label): ours for label, ours in model.label_map.items()},
        **computed_on(synthesizer.device, synthesizer.precision),
    }


def described(mask: str | Path) -> dict[str, str]:
    """Return a mask's name and hashes; Content sees voxels that a format keeps in a file beside the one named."""
    return {
        "Name": Path(mask).name,
        "SHA256": checkpoints.sha256(Path(mask)),
        "Content": fingerprints.of_volume(str(mask)),
    }


def _is_mask(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(MASK_SUFFIXES)
