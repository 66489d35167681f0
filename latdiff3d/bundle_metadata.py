"""An exported bundle's metadata: versions, measured figures, and what its networks take and give."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latdiff3d.bundle_modules import OWN_FIELDS, version_of
from latdiff3d.evaluation_files import Evaluated
from latdiff3d.exported import TRAINING
from latdiff3d.synthesis import Model

# Of a codec's figures: what the model card's table shows.
CODEC_FIGURES = ("psnr_db", "ssim", "ms_ssim", "spectrum_ratio")
FORMAT = "network_data_format"
CASES = "worst"  # of the figures: names of cases, which may say who a patient is


def metadata_of(
    template: Mapping[str, Any],
    model: Model,
    contents: Mapping[str, Mapping[str, Any]],
    packages: Mapping[str, str],
    evaluated: Evaluated | None = None,
) -> dict[str, Any]:
    """Return the metadata of stage 2's network, and of the whole bundle.

    Args:
        template: the bundle's own, whose words stay: name, task, authors, changelog, ….
        model: that is exported.
        contents: of the checkpoints, by stage; stage 1's may be absent.
        packages: version of each that the modules need.
        evaluated: its samples, if they were.
    """
    versions = dict(
        zip(("pytorch_version", "monai_version", "numpy_version"), map(version_of, OWN_FIELDS), strict=True)
    )
    labels = ", ".join(model.class_names) if model.is_conditional else "none"
    return {
        **template,
        **versions,
        "required_packages_version": dict(packages),
        "image_classes": f"{', '.join(model.modalities)}, each scaled to [0, 1]",
        "label_classes": f"labels of the mask: {labels}",
        "eval_metrics": figures_of(contents) | ({} if evaluated is None else evaluated.figures()),
        FORMAT: denoiser_format(model),
        TRAINING: {stage: _training(contents.get(stage, {})) for stage in ("diffusion", "autoencoder")},
    }


def autoencoder_metadata(metadata: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Return the metadata of stage 1's network: the bundle's, but for what the network takes and gives."""
    return {key: value for key, value in metadata.items() if key != TRAINING} | {FORMAT: reconstruction_format(model)}


def figures_of(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return what was measured on the validation cases, by name; what was not measured is left out."""
    quality = contents.get("autoencoder", {}).get("quality") or {}
    found = {f"autoencoder_{name}": quality.get("autoencoder", {}).get(name) for name in CODEC_FIGURES}
    found["autoencoder_gain_over_pca_db"] = quality.get("gain_over_pca_db")
    found["diffusion_validation_loss"] = contents["diffusion"]["best_metric"]
    return {name: round(float(value), 4) for name, value in found.items() if value is not None}


def denoiser_format(model: Model) -> dict[str, Any]:
    """Return what `tensor_networks.TensorDenoiser` takes and gives."""
    codec, condition = model.synthesizer.codec, model.synthesizer.condition
    latents = [f"noisy latent {k}" for k in range(len(codec.latent_mean))]
    told = [f"condition {k}" for k in range(condition.num_channels)]
    covariates = [f"covariate column {k}" for k in range(model.covariates.num_columns)]
    size = [length // codec.factor for length in model.crop_to]
    time = ["time, in units of the noise schedule, the same everywhere"]
    return {
        "inputs": {"image": _tensor("latent", [*latents, *told, *time, *covariates], size, [])},
        "outputs": {"pred": _tensor("latent", [f"prediction for latent {k}" for k in range(len(latents))], size, [])},
    }


def reconstruction_format(model: Model) -> dict[str, Any]:
    """Return what `tensor_networks.TensorReconstruction` takes and gives."""
    image = _tensor("magnitude", model.modalities, model.crop_to, [0, 1])
    return {"inputs": {"image": image}, "outputs": {"pred": {**image, "value_range": []}}}


def _tensor(kind: str, channels: Sequence[str], size: Sequence[int], value_range: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "image",
        "format": kind,
        "modality": "MR",
        "num_channels": len(channels),
        "spatial_shape": list(size),
        "dtype": "float32",
        "value_range": list(value_range),
        "is_patch_data": True,
        "channel_def": {str(number): said for number, said in enumerate(channels)},
    }


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    quality = content.get("quality")
    return {
        "notes": _plain(content.get("notes", {})),
        "best_metric": content.get("best_metric"),
        "epoch": content.get("best_metric_epoch"),
        "iteration": content.get("iteration"),
        "quality": quality and {key: value for key, value in quality.items() if key != CASES},
    }


def _plain(value: Any) -> Any:
    """Return a checkpoint's notes as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
