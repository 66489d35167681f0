"""Masks in, folders out: every sample of a model is written as NIfTI with the provenance that makes it again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latdiff3d import checkpoints
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.intensities import Reference
from latdiff3d.pictures import write_pictures
from latdiff3d.provenance import computed_on
from latdiff3d.synthesis import Model, Sample
from latdiff3d.volumes import case_name, read_mask, write_synthetic


def sample_to_folder(
    model: Model,
    masks: Sequence[str | Path],
    out: str | Path,
    num_samples: int = 1,
    seed: int = 0,
    whole: bool = True,
    known: Sequence[Mapping[str, Any]] = (),
    picture: bool = True,
    gif: bool = False,
    like: Reference | None = None,
    int16: bool = False,
) -> Iterator[tuple[str, Sample, list[Path]]]:
    """Write `num_samples` volumes for each mask, or in all for an unconditional model.

    Args:
        model: from `Model.load`.
        masks: NIfTI files; none for an unconditional model.
        out: the folder; each case gets one below it.
        num_samples: the k-th has seed + k.
        seed: of the first.
        whole: write on the mask file's own grid; else on the model's, the crop alone.
        known: covariates by name, of each mask, or for a model without masks of its only job; none where left out.
        picture, gif: write which pictures of each, see `pictures.write_pictures`.
        like: a scan to whose range intensities are mapped; [0, 1] where there is none.
        int16: see `volumes.write_marked`.

    Yields:
        case, sample and its files, as they are written.

    Raises:
        InputError: two masks of one name, or what `Model.grid_of` and `numbers_of` refuse, before any volume is made.
    """
    named = {case_name(mask): mask for mask in masks}
    if len(named) != len(masks):
        raise InputError(f"{len(masks)} masks have only {len(named)} different names; expected a name of its own each.")
    digest = checkpoints.sha256(model.path)
    mapped_like = {} if like is None else like.said(model.modalities)
    jobs: list[tuple[str, str | Path | None]] = list(named.items()) or [("synthetic", None)]
    covariates = known or [{}] * len(jobs)
    for (_, mask), given in zip(jobs, covariates, strict=True):
        model.numbers_of(given, model.grid_of(mask))
    Path(out).mkdir(parents=True, exist_ok=True)
    with progress_bar(total=len(jobs) * num_samples, desc="sampling", unit="volume") as bar:
        for (case, mask), given in zip(jobs, covariates, strict=True):
            for k in range(num_samples):
                name = case if num_samples == 1 and mask is not None else f"{case}_seed{seed + k:04d}"
                sample = model.sample(mask, seed + k, given)
                on_mask = sample.grid is not None and whole
                volume, affine = sample.on_mask_grid() if on_mask else (sample.volume.numpy(), sample.affine)
                provenance = {
                    "Checkpoint": {"Path": str(model.path), "SHA256": digest},
                    "Seed": seed + k,
                    "Sampler": model.synthesizer.sampler,
                    "Steps": model.synthesizer.num_steps,
                    "StepSpacing": model.synthesizer.step_spacing,
                    "Eta": model.synthesizer.eta,
                    "Guidance": model.synthesizer.guidance.scale,
                    "Mask": mask and {"Name": Path(mask).name, "SHA256": checkpoints.sha256(Path(mask))},
                    "Covariates": sample.known,
                    **computed_on(model.synthesizer.device, model.synthesizer.precision),
                    "Units": "normalised intensity, 0 to 1" if like is None else "those of the scan in Like",
                    "DataType": "int16" if int16 else "float32",
                    **mapped_like,
                }
                written = volume if like is None else like.unscaled(volume)
                labels = read_mask(mask)[0] if mask is not None and on_mask else None
                files = write_synthetic(Path(out), name, written, affine, model.modalities, provenance, labels, int16)
                shown = labels if sample.grid is None or on_mask else np.asarray(sample.grid.mask[0])
                write_pictures(Path(out) / name, name, volume, affine, shown, model.modalities, picture, gif)
                bar.update()
                yield name, sample, files


def masks_at(place: str | Path) -> list[Path]:
    """Return the masks that `place` names: the file itself, or the NIfTI files of a folder, sorted.

    Raises:
        InputError: when there is none.
    """
    path = Path(place)
    masks = sorted(path.glob("*.nii*")) if path.is_dir() else [path] if path.is_file() else []
    if not masks:
        raise InputError(f"there is no mask at {path}; expected a .nii.gz or .nii file, or a folder of them.")
    return masks
