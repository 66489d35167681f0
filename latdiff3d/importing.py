"""Weights trained elsewhere become a checkpoint of ours, for stage 2 and for sampling: `latdiff3d import`."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from latdiff3d import checkpoints, config
from latdiff3d.architecture import settings_of
from latdiff3d.codec import LatentCodec
from latdiff3d.config import SEPARATOR
from latdiff3d.conversion import write
from latdiff3d.errors import InputError
from latdiff3d.old_weights import DENOISER, KL, OldWeights, load, recognised
from latdiff3d.pretrained import read_weights
from latdiff3d.runs import first_stage_codec

EXPECTED = "a state dict of monai-generative 0.2.3, of MONAI or of MAISI's autoencoder"
# What a denoiser's configuration takes from its first stage's, which the codec is built by.
OF_FIRST_STAGE = (
    "modalities", "spacing", "intensity_percentiles", "wavelet_levels", "latent_channels", "latent_noise",
    "autoencoder_def", "initial_posterior_std",
)  # fmt: skip
HEADS = f"denoiser_def{SEPARATOR}num_head_channels"
UNTRACED = {
    KL: "norm_num_groups is taken to be {groups}, and upsampling to be followed by a convolution",
    DENOISER: "norm_num_groups is taken to be {groups}, num_head_channels to be {heads}",
}


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        path: the checkpoint.
        old: the weights.
        said: what leaves no trace in weights and was taken as configured; and what is missing, if anything.
    """

    path: Path
    old: OldWeights
    said: list[str]

    def report(self) -> str:
        """Return what was read and where it is."""
        head = f"{self.path} holds the {self.old.kind} of {self.old.format}, {len(self.old.weights)} tensors."
        overlay = f"--config {_overlay(self.path)} first_stage={self.path}"
        then = f"train diffusion --data DATA {overlay}" if self.old.kind != DENOISER else f"sample --model {self.path}"
        return "\n".join([head, *self.said, f"Next: latdiff3d {then}"])


def import_weights(
    source: Path,
    out: Path,
    overlays: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    scale_factor: float | None = None,
) -> Imported:
    """Write the checkpoint of `source`'s weights to `out`, in a network that is built by them and by the settings.

    Beside an autoencoder lies the overlay that stage 2 needs, by the same name.

    Args:
        source: a state dict, by itself or under "state_dict".
        out: a .pt file that is not there yet.
        overlays: YAML files; what they set is not taken from the weights.
        settings: `key: value`, which win over overlays; over a `dataset_dir` in them latents are measured, or, of
            a denoiser, what its masks and intensities are; a `first_stage` is its autoencoder's checkpoint.
        scale_factor: of an autoencoder, what its latents were multiplied by for its own diffusion model: kept in place
            of a measurement, and what that model must be used with.

    Raises:
        InputError: not such weights, or ones that do not fit the configuration; a number that weights do not tell.
    """
    given = {key.replace(".", SEPARATOR): value for key, value in (settings or {}).items()}
    if out.suffix != ".pt" or out.exists() or _overlay(out).exists():
        raise InputError(f"--to is {out}; expected a .pt file that is not there yet, nor a .yaml of that name.")
    old = recognised(read_weights(source, EXPECTED), str(source))
    stage = "diffusion" if old.kind == DENOISER else "autoencoder"
    if stage == "diffusion" and scale_factor is not None:
        raise InputError("--scale-factor is an autoencoder's; the denoiser's first_stage keeps it.")
    parser = _configured(old, stage, overlays, given)
    network = parser.get_parsed_content("denoiser" if stage == "diffusion" else "autoencoder")
    load(network, old, str(source))
    codec: LatentCodec = parser.get_parsed_content("codec")
    resolved = {key: value for key, value in parser.get().items() if key != "_meta_"}
    content: dict[str, Any] = {
        "stage": stage,
        "config": config.as_yaml(resolved),
        "notes": {"imported": {"format": old.format, "sha256": checkpoints.sha256(source)}},
        "epoch": 0, "iteration": 0, "epoch_length": 1, "best_metric": 0.0, "best_metric_epoch": 0,
        "first_stage": None, "finished": True,
    }  # fmt: skip
    said = [_untraced(old, resolved)]
    has_data = any("dataset_dir" in keys for keys in (given, *map(config.read_yaml, overlays)))
    if stage == "autoencoder":
        said.append(_measured(codec, parser, has_data, scale_factor))
        content["objects"] = {"codec": codec.state_dict()}
    else:
        if resolved["spacing"] is None and not has_data:
            raise InputError(
                "weights do not tell the voxels' size in mm; import the autoencoder with spacing=[1,1,1], or give the "
                "--data that the denoiser was trained on."
            )
        first_stage_codec(given["first_stage"], codec, parser.get_parsed_content("first_stage_settings"))
        weights = network.state_dict()
        content["objects"] = {"codec": codec.state_dict(), "denoiser": weights, "ema": weights}
        content["first_stage"] = checkpoints.record(given["first_stage"])
        told = parser.get_parsed_content("train::run::notes") if has_data else {"spacing_mm": list(resolved["spacing"])}
        content["notes"] |= told
    checkpoints.save(out, content)
    if stage == "autoencoder":
        shared = config.as_yaml({key: resolved[key] for key in OF_FIRST_STAGE})
        write(_overlay(out), f"# What stage 2 must have in common with {out.name}.\n{shared}", replacing=False)
    return Imported(out, old, said)


def _configured(old: OldWeights, stage: str, overlays: Sequence[str | Path], given: Mapping[str, Any]) -> Any:
    """Return the parser of what the weights tell, of a denoiser's first stage, and of what the user says, who wins."""
    told = settings_of(old)
    if stage == "diffusion":
        told |= _of_first_stage(given.get("first_stage"))
        if HEADS not in _keys_of([*map(config.read_yaml, overlays), given]):
            example = HEADS.replace(SEPARATOR, ".")
            raise InputError(f"weights do not tell how many channels a head has; give {example}=64.")
    with tempfile.TemporaryDirectory() as folder:
        lowest = Path(folder) / "weights.yaml"
        lowest.write_text(config.as_yaml(told))
        return config.training_workflow([lowest, *overlays], given, stage).parser


def _overlay(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".yaml")


def _of_first_stage(place: str | None) -> dict[str, Any]:
    """Return what a denoiser's configuration takes from that of its autoencoder's checkpoint."""
    if not place:
        raise InputError("a denoiser needs its autoencoder: import that first, then give first_stage=AUTOENCODER.pt.")
    there = yaml.safe_load(checkpoints.load(checkpoints.find(place), "autoencoder")["config"])
    return {key: there[key] for key in OF_FIRST_STAGE}


def _keys_of(contents: Sequence[Mapping[str, Any]], prefix: str = "") -> set[str]:
    """Return the joined keys that configurations set, those that hold others too."""
    keys: set[str] = set()
    for content in contents:
        for key, value in content.items():
            keys.add(prefix + key)
            if isinstance(value, dict):
                keys |= _keys_of([value], f"{prefix}{key}{SEPARATOR}")
    return keys


def _untraced(old: OldWeights, resolved: Mapping[str, Any]) -> str:
    definition = resolved["denoiser_def" if old.kind == DENOISER else "autoencoder_def"]
    untraced = UNTRACED.get(old.kind, "strides are taken from the kernels' widths, dilations to be 1")
    filled = untraced.format(groups=definition.get("norm_num_groups"), heads=definition.get("num_head_channels"))
    return f"Weights do not tell everything: {filled}."


@torch.no_grad()
def _measured(codec: LatentCodec, parser: Any, has_data: bool, scale_factor: float | None) -> str:
    """Give the codec its statistics: of the data, or the one number that the old diffusion model's latents had."""
    if scale_factor is not None and has_data:
        raise InputError("--data and --scale-factor are both given; expected one: measured latents, or the old ones.")
    if scale_factor is not None:
        if not scale_factor > 0:
            raise InputError(f"--scale-factor is {scale_factor:g}; expected a number above 0.")
        codec.latent_mean.zero_()
        codec.latent_std.fill_(1 / scale_factor)
        codec.num_volumes.fill_(1)  # 0 would say that there are no statistics
        return f"Its latents are multiplied by {scale_factor:g}, as by its own diffusion model."
    if has_data:
        parser.get_parsed_content("train::seeds").at_epoch()
        codec.measure(parser.get_parsed_content("train::dataloader"))
        return f"Its latents were measured over {codec.num_volumes.item()} volumes of {parser['dataset_dir']}."
    return (
        "Its latents are not measured, without which neither stage 2 nor `reconstruct` can use it; give --data DATA, "
        "or --scale-factor for its own diffusion model."
    )
