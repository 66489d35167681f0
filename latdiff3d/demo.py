"""The quickstart: data → both stages → a volume for each held-out mask → figures that say whether it worked."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from latdiff3d import datalist, devices, doctor, layouts, runs
from latdiff3d.config import CONFIG_FOLDER
from latdiff3d.errors import InputError
from latdiff3d.fidelity import psnr
from latdiff3d.figures import ContactRow, contact_sheet
from latdiff3d.lesion_contrast import ContrastAgreement, contrast_sign_agreement
from latdiff3d.model_cases import cases_of_split, known_of
from latdiff3d.phantoms import write_phantoms
from latdiff3d.sample_folders import jobs_for, make
from latdiff3d.synthesis import Model, Sample

OVERLAYS = {
    "autoencoder": [CONFIG_FOLDER / "demo.yaml"],
    # Of a few hundred steps flow makes heads, where the noise that a diffusion model learns to predict leaves noise.
    "diffusion": [CONFIG_FOLDER / "flow.yaml", CONFIG_FOLDER / "demo.yaml"],
}
LABEL_NAMES = {1: "necrotic core", 2: "oedema", 3: "enhancing rim"}
# Small enough to train on in minutes, large enough to show a brain: 144 × 173 × 144 mm.
PHANTOM_SHAPE, PHANTOM_SPACING_MM = (40, 48, 40), 3.6
# About 3 and 5 minutes of training on 2 cores that multiply bfloat16; where they do not, fewer steps take as long.
STEPS = {"bf16": {"autoencoder": 1600, "diffusion": 1000}, "fp32": {"autoencoder": 600, "diffusion": 250}}
BATCH_SIZE = {"autoencoder": 1, "diffusion": 4}
# The discriminator joins for the rest.
DISC_START = 0.9
# The discriminator leaves nothing of less than 24 voxels.
SMALLEST_CROP, LARGEST_CROP = 24, 64
# Voxels above this, in any channel of a volume in [0, 1], are brain.
AIR_BELOW = 0.03


def run_demo(data: Path | None, out: Path, overlays: Sequence[Path]) -> None:
    """Make all of the quickstart in `out`: data, runs, volumes, contact_sheet.png and summary.md.

    Args:
        data: a data set of one's own; None for phantoms.
        out: the folder. What is there already is gone on with.
        overlays: configuration on top of the demo's own.

    Raises:
        InputError: for a data set that cannot be trained on.
    """
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {}
    if data is None:
        data = out / "data"
        if not data.exists():
            with _step("1/5 writing 32 + 16 phantom cases in BraTS layout", seconds):
                write_phantoms(data, shape=PHANTOM_SHAPE, spacing_mm=PHANTOM_SPACING_MM, progress=True)
    else:
        with _step(f"1/5 reading {data}", seconds):
            settings = settings_for(data)
    for number, stage in ((2, "autoencoder"), (3, "diffusion")):
        with _step(f"{number}/5 training stage {number - 1}, the {stage}", seconds):
            _train(stage, data, out / "runs", overlays, settings)
    with _step("4/5 synthesising a volume for each held-out mask", seconds):
        model = Model.load(out / "runs" / "diffusion")
        cases = cases_of_split(model, data, "val")
        masks, known = [case["mask"] for case in cases], [known_of(model, case) for case in cases]
        jobs, refused = jobs_for(model, masks, known=known)
        for line in refused.values():
            print(f"left out: {line}", flush=True)
        if not jobs:
            raise InputError(f"none of the {len(masks)} held-out masks can be used; each is named above.")
        samples = [sample for _, sample, _ in make(model, jobs, out / "synthetic")]
        cases = [case for case in cases if case["mask"] not in refused]
    with _step("5/5 comparing with the real volumes", seconds):
        text = _report(model, cases, samples, out, data, seconds)
    print("\n" + text)


def settings_for(data: Path) -> dict[str, Any]:
    """Return what the demo must set for a data set of one's own: channels, labels, a crop that fits.

    Raises:
        InputError: for a data set with anything wrong in it.
    """
    survey, problems = doctor.examine(data)
    datalist.raise_first(problems)
    layout = layouts.find_layout(data)
    num_channels = len(survey[0].intensities)
    shape = np.median([_ras_shape(row) for row in survey], axis=0)
    return {
        "modalities": list(layouts.BRATS_MODALITIES) if layout == "brats" else [f"c{k}" for k in range(num_channels)],
        "labels": sorted({0}.union(*(map(int, row.labels) for row in survey))),
        "crop_to": [int(np.clip(8 * math.ceil(size / 8), SMALLEST_CROP, LARGEST_CROP)) for size in shape],
        "layout": layout,
    }


def _ras_shape(row: doctor.CaseRow) -> list[int]:
    axes = [row.orientations[0].find(a) + row.orientations[0].find(b) + 1 for a, b in ("LR", "PA", "IS")]  # −1: absent
    return [row.shapes[0][axis] for axis in axes]


@contextmanager
def _step(title: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"[{title}]", flush=True)
    started = time.monotonic()
    yield
    seconds[title] = time.monotonic() - started


def _train(stage: str, data: Path, logdir: Path, overlays: Sequence[Path], settings: dict[str, Any]) -> None:
    num_train = len(_splits(data, settings)["train"])
    steps_an_epoch = max(1, num_train // BATCH_SIZE[stage])
    steps = num_steps(stage)
    epochs = math.ceil(steps / steps_an_epoch)
    named = {
        "dataset_dir": str(data),
        "logdir": str(logdir),
        "name": stage,
        "max_epochs": epochs,
        "val_interval": max(1, epochs // 4),
        "batch_size": BATCH_SIZE[stage],
        **settings,
    }
    if stage == "autoencoder":
        named |= {"loss::disc_start": int(DISC_START * steps), "learning_rate": 1.5e-3}
    else:
        named["first_stage"] = str(logdir / "autoencoder")
    runs.start([*OVERLAYS[stage], *overlays], [], named, stage)


def num_steps(stage: str) -> int:
    """Return how many steps of a stage take this machine some minutes."""
    return STEPS[devices.fastest_precision(devices.device())][stage]


def _splits(data: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    modalities = settings.get("modalities", layouts.BRATS_MODALITIES)
    return datalist.split_cases(datalist.read_cases(data, modalities=modalities), data)


def _report(
    model: Model,
    cases: Sequence[dict[str, Any]],
    samples: Sequence[Sample],
    out: Path,
    data: Path,
    seconds: dict[str, float],
) -> str:
    pairs = [_real_and_reconstruction(model, case, sample) for case, sample in zip(cases, samples, strict=True)]
    reals, reconstructions, own = ([pair[k] for pair in pairs] for k in range(3))
    masks = [np.asarray(sample.grid.mask[0]).astype(int) for sample in samples if sample.grid is not None]
    synthetic = [sample.volume.numpy() for sample in samples]
    agreement = contrast_sign_agreement(
        reals, synthetic, [mask > 0 for mask in masks], [_brain(v) for v in reals], [_brain(v) for v in synthetic]
    )
    rows = [
        ContactRow(
            Path(cases[k]["case"]).name,
            reals[k][0],
            reconstructions[k][0],
            masks[k],
            synthetic[k][0],
            tuple(nib.affines.voxel_sizes(samples[k].affine)),
            model.modalities[0],
        )
        for k in range(min(4, len(cases)))
    ]
    contact_sheet(out / "contact_sheet.png", rows, labels=LABEL_NAMES if len(model.modalities) == 4 else None)
    quality = np.mean([psnr(a, b, valid) for a, b, valid in zip(reals, reconstructions, own, strict=True)])
    text = _summary(model, agreement, float(quality), len(cases), out, data, seconds)
    (out / "summary.md").write_text(text)
    return text


def _real_and_reconstruction(
    model: Model, case: dict[str, Any], sample: Sample
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a real volume, its reconstruction and, 1 on its own voxels, what of them is no padding."""
    assert sample.grid is not None
    image = model.preprocessing({"image": case["image"]})["image"]
    own = torch.as_tensor(sample.grid.crop(sample.grid.pad(torch.ones_like(image[:1]))))
    image = torch.as_tensor(sample.grid.crop(sample.grid.pad(image)))
    reconstruction = model.synthesizer.codec.reconstruct(image[None].to(model.synthesizer.device))[0]
    return image.numpy(), reconstruction.cpu().numpy(), own.numpy()


def _brain(volume: np.ndarray) -> np.ndarray:
    return ndimage.binary_fill_holes(volume.max(0) > AIR_BELOW)


def _summary(
    model: Model,
    agreement: ContrastAgreement,
    quality: float,
    num_cases: int,
    out: Path,
    data: Path,
    seconds: dict[str, float],
) -> str:
    times = "\n".join(f"- {title}: {value / 60:.1f} min" for title, value in seconds.items())
    per_channel = ", ".join(
        f"{modality} {matched:.0%} (shuffled {shuffled:.0%})"
        for modality, matched, shuffled in zip(
            model.modalities, agreement.per_channel, agreement.shuffled_per_channel, strict=True
        )
    )
    return f"""# latdiff3d demo

{num_cases} held-out masks, one SYNTHETIC volume each, made from {data}.

- Reconstruction: PSNR {quality:.1f} dB on the held-out volumes.
- Lesion contrast has the real case's sign in {agreement.agreement:.1%} of {agreement.num_pairs} volumes and channels
  where the real contrast is clear; against shuffled masks in {agreement.shuffled:.1%} of
  {agreement.num_shuffled_pairs}.
  By channel: {per_channel}.

Time taken:
{times}

Where to look:
- {out}/contact_sheet.png: real | reconstructed | mask | synthetic, three planes
- {out}/synthetic/: NIfTI volumes on their masks' grids, each with a JSON sidecar
- {out}/runs/: both runs: metrics.csv, previews, TensorBoard (tensorboard --logdir {out}/runs)

What to type next:
- a hundred more for a mask: latdiff3d sample --model {out}/runs/diffusion --mask MASK.nii.gz -n 100 --out more
- the same on your data: make demo DATA=FOLDER
- look for faults in your data first: latdiff3d doctor FOLDER
"""
