"""State dicts of earlier and neighbouring networks become those of MONAI's: monai-generative's, MAISI's, MONAI's own.

monai-generative 0.2.3's attention over a grid has a `proj_attn` that its forward pass leaves out, so it is dropped, and
an `out_proj` here is the identity. MONAI's `load_old_state_dict` copies it, which makes other outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.pretrained import misfits

GENERATIVE, MONAI, MAISI = "monai-generative", "MONAI", "MAISI"
KL, VQ, DENOISER = "AutoencoderKL", "VQVAE", "DiffusionModelUNet"

Weights = dict[str, torch.Tensor]

# A key that only a network of that kind has.
_KINDS = {
    KL: "quant_conv_mu.conv.weight",
    VQ: "quantizer.quantizer.embedding.weight",
    DENOISER: "time_embed.0.weight",
}
_FORMATS = {
    MAISI: r"\.(conv1|conv)\.conv\.conv\.|^(top|bottom)_region_index_layer|^spacing_layer",
    GENERATIVE: r"\.proj_attn\.|\.to_out\.0\.|\.upsampler\.conv\.",
}
_BARE_ATTENTION = (r"(?<!\.attn)(?<!\.attn1)(?<!\.attn2)\.(to_[qkv])\.", r".attn.\1.")
# What each calls what MONAI calls otherwise, in this order.
_RENAMED: dict[str, list[tuple[str, str]]] = {
    MONAI: [],
    GENERATIVE: [
        _BARE_ATTENTION,
        (r"\.to_out\.0\.", ".out_proj."),
        (r"\.upsampler\.conv\.", ".upsampler.postconv."),
        (r"^(decoder\.blocks\.\d+)\.conv\.conv\.", r"\1.postconv.conv."),
    ],
    MAISI: [
        (r"\.(conv1|conv2|nin_shortcut)\.conv\.conv\.", r".\1.conv."),
        (r"^((?:en|de)coder\.blocks\.\d+)\.conv\.conv\.(?=weight|bias)", r"\1.conv."),
        (r"^(encoder\.blocks\.\d+)\.conv\.conv\.conv\.", r"\1.conv.conv."),
        (r"^(decoder\.blocks\.\d+)\.conv\.conv\.conv\.", r"\1.postconv.conv."),
    ],
}
_BOOK = {
    "quantizer.quantizer.embedding.weight": "quantizer.codes",
    "quantizer.quantizer.ema_cluster_size": "quantizer.cluster_size",
    "quantizer.quantizer.ema_w": "quantizer.cluster_sum",
}


@dataclass(frozen=True)
class OldWeights:
    """A state dict in MONAI's names, and what it was.

    Attributes:
        format: `GENERATIVE`, `MONAI` or `MAISI`.
        kind: `KL`, `VQ` or `DENOISER`.
        weights: by the names that MONAI 1.6's networks have, a projection behind attention only where it is applied.
    """

    format: str
    kind: str
    weights: Weights


def recognised(state: Mapping[str, torch.Tensor], source: str) -> OldWeights:
    """Return what `state` holds, under MONAI's names.

    Args:
        state: a state dict; a prefix "module." of all keys is left out.
        source: what to call it in messages.

    Raises:
        InputError: no autoencoder or denoiser that is known.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    kind = next((kind for kind, key in _KINDS.items() if key in state), None)
    if kind is None:
        raise InputError(
            f"{source} begins with {', '.join(list(state)[:3])} ({len(state)} keys); expected a state dict of an "
            f"AutoencoderKL, a VQVAE or a DiffusionModelUNet, which hold {', '.join(_KINDS.values())}."
        )
    format = next((name for name, sign in _FORMATS.items() if any(re.search(sign, key) for key in state)), MONAI)
    if format == MONAI and kind == KL and not any(".postconv." in key or ".deconv." in key for key in state):
        format = GENERATIVE  # without attention only the upsampling's name tells them apart
    return OldWeights(format, kind, _renamed(state, format, kind))


def _renamed(state: Mapping[str, torch.Tensor], format: str, kind: str) -> Weights:
    renamed: Weights = {}
    for key, value in state.items():
        if format == GENERATIVE and ".proj_attn." in key:
            continue
        for pattern, name in _RENAMED[format]:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:  # one layer for the three
            parts = value.chunk(3)
            renamed |= {key.replace(".qkv.", f".to_{one}."): part for one, part in zip("qkv", parts, strict=True)}
        else:
            renamed[_BOOK.get(key, key) if kind == VQ else key] = value
    if kind == VQ:
        renamed["quantizer.num_updates"] = torch.ones((), dtype=torch.long)  # the codes have met latents
    return renamed


def load(network: nn.Module, old: OldWeights, source: str) -> None:
    """Load `old` into `network`, all of it, and nothing else but identities where attention had no projection.

    Args:
        network: MONAI's, or a VQAutoencoder.
        old: of the same kind.
        source: what to call it in messages.

    Raises:
        InputError: naming how many keys, and which first, are missing, too many, or of another shape.
    """
    own = network.state_dict()
    weights = old.weights | _identities(own, old.weights)
    if found := misfits(own, weights):
        whose, into = f"the {old.kind} of {old.format}", type(network).__name__
        raise InputError(f"{source}, {whose}, does not fit the configured {into}: it {found}.")
    network.load_state_dict(weights)


def _identities(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Weights:
    """Return projections that change nothing, where `own` has one behind self-attention and `weights` do not."""
    identities: Weights = {}
    for key, value in own.items():
        block, found, part = key.partition(".attn.out_proj.")
        if found and key not in weights and f"{block}.attn.to_q.weight" in weights:
            identities[key] = torch.eye(len(value)) if part == "weight" else torch.zeros_like(value)
    return identities
