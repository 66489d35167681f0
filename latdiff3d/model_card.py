"""An exported bundle's docs/README.md: what the model is, what was measured, how to run it; and its pictures."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from latdiff3d.evaluation_files import Evaluated
from latdiff3d.pictures import write_pictures
from latdiff3d.synthesis import Model
from latdiff3d.volumes import labels_of

CURVES, SAMPLE = "training.png", "sample"
BUT = "; figures of samples and held-out volumes are of the cases that the paragraph below names"
MEASURED = "what was found of that stands under Performance, and is no proof of privacy"
NOT_MEASURED = "whether they do has not been measured here"

TEXT = """# Model Overview

{name}. {description}.

Its task: {task}. The volumes are synthetic: they are for research, not for diagnosis, and every file that is written
says so.

{sample}
## Data

Channels: {channels}. {conditioned} Volumes are cropped or padded to {crop} voxels, {spacing}. Intensities are scaled
per channel, over the whole volume, from the percentiles {percentiles} of its foreground to [0, 1].

No data come with this bundle; `docs/data_license.txt` says what is known of their terms. {trained_on}

## Training configuration

Stage 1's network is `{autoencoder}`, trained against a patch discriminator; it shrinks each axis by {factor}, into
{latents} channels that are normalised by their mean and standard deviation. Stage 2's is `{denoiser}` in that space
({objective}, {steps} steps of {sampler}). Stage 1 has {codec_weights} weights, stage 2 {denoiser_weights}, the moving
average of those trained in {epochs} epochs, {iterations} steps.

{curves}
## Performance

On the validation cases of the run, not on a test set{but}:

{figures}
{evaluation}
## MONAI Bundle Commands

From this folder, where monai and the packages in `configs/metadata.json` are installed:

```sh
python -m monai.bundle run inference --config_file "['configs/common.yaml','configs/inference.yaml']" \\
    {mask_option}--out samples
python -m monai.bundle run training --config_file "['configs/common.yaml','configs/train_autoencoder.yaml']" \\
    --dataset_dir DATA --name autoencoder
python -m monai.bundle run training --config_file "['configs/common.yaml','configs/train_diffusion.yaml']" \\
    --dataset_dir DATA --name diffusion     # on the codec in models/, or on --first_stage runs/autoencoder
python -m monai.bundle run evaluate --dataset_dir DATA \\
    --config_file "['configs/common.yaml','configs/train_diffusion.yaml','configs/evaluate.yaml']"
```

Another kind of autoencoder is an overlay behind the training file, in both stages: `configs/autoencoder_vq.yaml`,
`autoencoder_kl.yaml` or `autoencoder_fast.yaml`.

`torchrun --nproc_per_node 2 -m monai.bundle run …` runs the same on two processes. Elsewhere than in this folder, give
`--bundle_root` and put the folder on PYTHONPATH. `configs/inference.json` is common.yaml and inference.yaml in one, for
`monai.bundle.load`. TorchScript and ONNX, of the denoiser and, with `reconstruction_def`, `models/model_autoencoder.pt`
and `configs/metadata_autoencoder.json`, of the autoencoder:

```sh
python -m monai.bundle ckpt_export network_def --filepath models/model.ts --ckpt_file models/model.pt \\
    --meta_file configs/metadata.json --config_file configs/inference.json --use_trace True
```

## Limitations

It makes what its training data showed, at their crop and spacing; other scanners, sites and populations were not
tried. Synthetic volumes may resemble training cases; {memorisation}.

## References

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022.

# License

Code and configuration: Apache-2.0, see `LICENSE`. The weights were trained on data with terms of their own, see
`docs/data_license.txt`; they may bind the weights too.
"""


def write(
    folder: Path,
    run: Path,
    model: Model,
    metadata: Mapping[str, Any],
    mask: Any,
    name: str,
    evaluated: Evaluated | None = None,
) -> None:
    """Write docs/README.md and its pictures into a bundle's `folder`.

    Args:
        run: the run's folder, for its metrics.
        mask: for which a sample is shown; None: without one, unless the model has no masks.
        name: of the bundle.
        evaluated: the model's samples, if they were.
    """
    docs = folder / "docs"
    has_sample = mask is not None or not model.is_conditional
    if has_sample:
        _write_sample(docs, model, mask)
    has_curves = _write_curves(docs / CURVES, run / "metrics.csv")
    training, synthesizer = metadata["training"]["diffusion"], model.synthesizer
    settings, network = model.config.get(), synthesizer.codec.autoencoder
    masks = training["notes"].get("masks")
    words = {
        "name": metadata.get("name", name),
        "description": metadata["description"],
        "task": metadata["task"],
        "sample": f"![a synthetic volume](./{SAMPLE}.png)\n" if has_sample else "",
        "channels": ", ".join(model.modalities),
        "conditioned": f"Masks hold the labels {', '.join(map(str, model.labels))}." if model.is_conditional else "",
        "crop": " × ".join(map(str, model.crop_to)),
        "spacing": f"of {' × '.join(f'{mm:.3g}' for mm in model.spacing_mm)} mm{_in_the_median(model)}",
        "percentiles": settings["intensity_percentiles"],
        "trained_on": f"It was trained on {masks['num_cases']} cases." if masks else "",
        "autoencoder": type(getattr(network, "network", network)).__name__,
        "factor": synthesizer.codec.factor,
        "latents": len(synthesizer.codec.latent_mean),
        "denoiser": type(synthesizer.denoiser).__name__,
        "objective": type(synthesizer.objective).__name__,
        "steps": synthesizer.num_steps,
        "sampler": synthesizer.sampler,
        "denoiser_weights": f"{_num_weights(synthesizer.denoiser):,}",
        "codec_weights": f"{_num_weights(network):,}",
        "epochs": training["epoch"],
        "iterations": training["iteration"],
        "curves": f"![losses by epoch](./{CURVES})\n" if has_curves else "",
        "figures": _table(metadata["eval_metrics"]),
        "but": "" if evaluated is None else BUT,
        "evaluation": "" if evaluated is None else f"\n{evaluated.paragraph}\n",
        "memorisation": MEASURED if evaluated is not None and evaluated.says_of_memorisation else NOT_MEASURED,
        "mask_option": "--mask MASK.nii.gz " if model.is_conditional else "",
    }
    (docs / "README.md").write_text(TEXT.format(**words))


def _in_the_median(model: Model) -> str:
    return "" if model.is_resampling else " in the median of the training cases"


def _num_weights(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _table(figures: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:g} |" for name, value in figures.items())
    return f"| figure | value |\n|---|---|\n{rows}"


def _write_sample(docs: Path, model: Model, mask: Any) -> None:
    sample = model.sample(mask, seed=0)
    if sample.grid is None:
        volume, affine, labels = sample.volume.numpy(), sample.affine, None
    else:
        volume, affine = sample.on_mask_grid()
        labels = labels_of(sample.grid.stored, model.label_map)
    write_pictures(docs, SAMPLE, volume, affine, labels, model.modalities)


def _write_curves(picture: Path, metrics: Path) -> bool:
    """Draw training and validation loss by epoch, where the run has kept them."""
    if not metrics.is_file():
        return False
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    for column, label in (("train_loss", "training"), ("val_loss", "validation, of the moving average")):
        points = np.array([[float(row["epoch"]), float(row[column])] for row in rows if row.get(column)])
        if len(points):
            axes.plot(points[:, 0], points[:, 1], label=label)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    return True
