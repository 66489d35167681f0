"""What a state dict's names and shapes tell of the network that it is of, as settings of the bundle."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from latdiff3d.errors import InputError
from latdiff3d.old_weights import DENOISER, KL, MAISI, OldWeights

# What leaves no trace in weights: settings, by what their class takes where nothing is given.
NUM_GROUPS = 32
PARAMETERS = {3: [1, 3, 1, 1], 4: [2, 4, 1, 1]}  # of a VQVAE's level by its kernel: stride, kernel, dilation, padding
MODALITIES = 4  # as many as the bundle has

Weights = Mapping[str, torch.Tensor]


def settings_of(old: OldWeights) -> dict[str, Any]:
    """Return the settings of the bundle that build a network for `old`, as far as it tells them.

    Norms' groups are taken to be 32, the default of all three formats, for they leave no trace; nor do a U-Net's heads,
    of which nothing is said.

    Args:
        old: recognised weights.

    Raises:
        InputError: a VQVAE whose kernels are neither 3 nor 4 wide, for then strides cannot be told.
    """
    if old.kind == DENOISER:
        return _denoiser(old.weights)
    network = _kl(old.weights) if old.kind == KL else _vq(old.weights)
    if old.format == MAISI:
        network = {
            "_target_": "latdiff3d.networks.TrilinearAutoencoderKL", "spatial_dims": 3, "in_channels": "@num_bands",
            "out_channels": "@num_bands", "latent_channels": "@latent_channels", **network,
        }  # fmt: skip
    settings = {"wavelet_levels": 0, "latent_noise": 0, "latent_channels": _latent_channels(old), **_modalities(old)}
    if "_target_" in network:  # another class than the bundle's: all of the component
        return settings | {"autoencoder_def": network}
    return settings | {f"autoencoder_def::{key}": value for key, value in network.items()}


def _latent_channels(old: OldWeights) -> int:
    return len(old.weights["quant_conv_mu.conv.weight"]) if old.kind == KL else old.weights["quantizer.codes"].shape[1]


def _modalities(old: OldWeights) -> dict[str, Any]:
    number = old.weights["encoder.blocks.0.conv.weight"].shape[1]
    if number == MODALITIES:
        return {}
    return {"modalities": ["image"] if number == 1 else [f"channel_{n}" for n in range(number)]}


def _blocks(weights: Weights, half: str) -> list[dict[str, torch.Tensor]]:
    """Return the weights of each of a half's blocks, by their names within it."""
    blocks: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        if found := re.match(rf"{half}\.blocks\.(\d+)\.(.+)", key):
            blocks.setdefault(int(found[1]), {})[found[2]] = value
    return [blocks[number] for number in sorted(blocks)]


def _kind(block: Mapping[str, torch.Tensor]) -> str:
    for kind, key in (
        ("residual", "conv1.conv.weight"), ("attention", "attn.to_q.weight"), ("resampling", "conv.conv.weight"),
        ("resampling", "postconv.conv.weight"), ("convolution", "conv.weight"),
    ):  # fmt: skip
        if key in block:
            return kind
    return "norm"


def _kl(weights: Weights) -> dict[str, Any]:
    """Return AutoencoderKL's arguments: its encoder goes level by level, and ends in a middle with attention or not."""
    middle = ["residual", "attention", "residual"]
    blocks, decoder = _blocks(weights, "encoder"), [_kind(block) for block in _blocks(weights, "decoder")]
    levels = blocks[1:-2]  # between the first convolution, and the last norm and convolution
    in_encoder = [_kind(block) for block in levels[-3:]] == middle
    in_decoder = decoder[1:4] == middle and decoder[4:5] != ["attention"]
    channels, numbers, attention = [0], [0], [False]
    for block in levels[:-3] if in_encoder else levels:
        kind = _kind(block)
        if kind == "residual":
            channels[-1], numbers[-1] = len(block["conv1.conv.weight"]), numbers[-1] + 1
        elif kind == "attention":
            attention[-1] = True
        else:
            channels, numbers, attention = [*channels, 0], [*numbers, 0], [*attention, False]
    return {
        "channels": channels,
        "num_res_blocks": _one_or_all(numbers),
        "attention_levels": attention,
        "with_encoder_nonlocal_attn": in_encoder,
        "with_decoder_nonlocal_attn": in_decoder,
        "norm_num_groups": NUM_GROUPS,
    }


def _vq(weights: Weights) -> dict[str, Any]:
    """Return VQAutoencoder's arguments: each level of the encoder is a convolution and residual units."""
    encoder, decoder = (_blocks(weights, half) for half in ("encoder", "decoder"))
    downs = [block["conv.weight"] for block in encoder[:-1] if "conv.weight" in block]
    ups = [block["conv.weight"] for block in decoder[1:] if "conv.weight" in block]
    units = [block["conv1.conv.weight"] for block in encoder if "conv1.conv.weight" in block]
    each = len(units) // len(downs)
    return {
        "_target_": "latdiff3d.quantization.VQAutoencoder",
        "spatial_dims": 3,
        "in_channels": "@num_bands",
        "out_channels": "@num_bands",
        "channels": [len(down) for down in downs],
        "num_res_layers": each,
        "num_res_channels": [len(unit) for unit in units[::each]],
        "downsample_parameters": [_strided(down) for down in downs],
        "upsample_parameters": [[*_strided(up), 0] for up in ups],
        "n_embed": len(weights["quantizer.codes"]),
        "embed_dim": "@latent_channels",
        "depth": 1,
    }


def _strided(kernel: torch.Tensor) -> list[int]:
    if kernel.shape[-1] not in PARAMETERS:
        raise InputError(
            f"a VQVAE's level has a kernel of {kernel.shape[-1]}, which does not tell its stride; give autoencoder_def."
        )
    return PARAMETERS[kernel.shape[-1]]


def _denoiser(weights: Weights) -> dict[str, Any]:
    numbers: dict[int, set[int]] = {}
    attention: set[int] = set()
    for key in weights:
        if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", key):
            numbers.setdefault(int(found[1]), set()).add(int(found[3]))
            attention |= {int(found[1])} if found[2] == "attentions" else set()
    channels = [len(weights[f"down_blocks.{level}.resnets.0.conv1.conv.weight"]) for level in sorted(numbers)]
    is_alone = weights["conv_in.conv.weight"].shape[1] == len(weights["out.2.conv.weight"])
    return {
        "denoiser_def::channels": channels,
        "denoiser_def::num_res_blocks": _one_or_all([len(numbers[level]) for level in sorted(numbers)]),
        "denoiser_def::attention_levels": [level in attention for level in sorted(numbers)],
        "denoiser_def::norm_num_groups": NUM_GROUPS,
        **({"conditioning": "none"} if is_alone else {}),
    }


def _one_or_all(numbers: Sequence[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)
