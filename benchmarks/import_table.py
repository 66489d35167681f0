"""What imported weights compute against the network that they come from, and what a wrong choice would have made of it.

    pip install --no-deps --target OLD monai-generative==0.2.3
    python benchmarks/import_table.py --generative OLD

Each row: an original network with random weights, all of them, projections and last layers too; its state dict
through `latdiff3d.old_weights` into the network that `latdiff3d.architecture` asks of the bundle; the largest
difference between the two networks' outputs on one input, beside the outputs' standard deviation. An autoencoder's
outputs are its posterior's mean and std and what the mean decodes to. Without --generative its rows are left out. The
last line is JSON.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import nn

from latdiff3d import config
from latdiff3d.architecture import settings_of
from latdiff3d.errors import InputError
from latdiff3d.networks import TrilinearAutoencoderKL
from latdiff3d.old_weights import DENOISER, OldWeights, load, recognised
from latdiff3d.simulated_memory import quietly

AUTOENCODER: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "norm_num_groups": 32,
}  # fmt: skip
# The Zoo's brats_mri_generative_diffusion: its autoencoder, and its U-Net at a quarter of the width.
ZOO = {**AUTOENCODER, "latent_channels": 4, "num_res_blocks": (2, 2, 2), "attention_levels": (False,) * 3}
ZOO |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
ZOO_CHANNELS = (64, 128, 256)
WITH_ATTENTION = {**AUTOENCODER, "num_res_blocks": (1, 2), "attention_levels": (False, True)}
U_NET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_res_blocks": 2, "norm_num_groups": 32,
    "attention_levels": (False, True, True), "num_head_channels": (0, 32, 32),
}  # fmt: skip
U_NET_CHANNELS = (32, 64, 128)
CROSS = {"with_conditioning": True, "cross_attention_dim": 5, "num_head_channels": 32}
HEADS = {"denoiser_def::num_head_channels": [0, 32, 32]}

LONGEST = 260  # of what is shown of a refusal
Outputs = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A row: the original, what settings the user must add, and a wrong choice with its name."""

    format: str
    kind: str
    original: nn.Module
    settings: dict[str, Any]
    wrong: str
    loaded_wrongly: Callable[[OldWeights, nn.Module], nn.Module]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generative", help="folder that holds monai-generative 0.2.3")
    sys.path += [folder] if (folder := parser.parse_args().generative) else []
    rows = []
    print("| format | network | largest difference | of outputs with std | what a wrong choice gives |")
    print("|---|---|---|---|---|")
    for case in [*(generative() if folder else []), *monai(), *maisi()]:
        row = measured(case)
        rows.append(row)
        found = row["refused"] or f"{row['difference']:.1e}"
        print(
            f"| {case.format} | {case.kind} | {found} | {row['std']:.2f} | {case.wrong}: {row['wrong']} |", flush=True
        )
    print(
        json.dumps({"rows": rows, "largest": max(row["difference"] for row in rows if row["difference"] is not None)})
    )


@torch.no_grad()
def measured(case: Case) -> dict[str, Any]:
    """Return a case's row."""
    original = randomised(case.original)
    expected = outputs(original)
    old = recognised(original.state_dict(), "the state dict")
    row: dict[str, Any] = {"format": case.format, "network": case.kind, "difference": None, "refused": None}
    row["std"] = float(expected["output"].std())
    try:
        network = ours(old, case.settings)
        load(network, old, "the state dict")
        row["difference"] = difference(expected, outputs(network.eval()))
    except InputError as error:
        row["refused"] = f"refused: {str(error)[:LONGEST]} …"
    try:
        row["wrong"] = f"{difference(expected, outputs(case.loaded_wrongly(old, original).eval())):.2g}"
    except InputError as error:
        row["wrong"] = f"refused: {str(error)[:LONGEST]} …"
    return row


def randomised(network: nn.Module) -> nn.Module:
    """Return `network` with random weights everywhere; some of MONAI's layers begin at 0, which would hide much."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(float(parameter.ndim == 1 and bool((parameter == 1).all())), spread)
        if "log_sigma" in name:
            parameter.data *= 0.1  # or the posterior's std is now tiny, now huge
    return network.eval()


def ours(old: OldWeights, settings: dict[str, Any]) -> nn.Module:
    """Return the network that the bundle has by what the weights tell, and by `settings`."""
    told = {**settings_of(old), "precision": "fp32", "device": torch.device("cpu"), **settings}
    if old.kind == DENOISER and "with_conditioning" in settings:  # stage 2 has no context to give: MONAI's own
        return DiffusionModelUNet(**settings)
    with quietly():
        parser = config.training_workflow([], told, "diffusion" if old.kind == DENOISER else "autoencoder").parser
    return parser.get_parsed_content("denoiser" if old.kind == DENOISER else "autoencoder")


def outputs(network: Any) -> Outputs:
    """Return what a network makes of the one input of its kind."""
    generator = torch.Generator().manual_seed(1)
    if hasattr(network, "time_embed"):
        shape = (2, network.in_channels, 8, 8, 8)
        told = {"context": torch.randn(2, 3, 5, generator=generator)} if network.with_conditioning else {}
        extra = {
            name: torch.rand(2, width, generator=generator)
            for name, width in (
                ("top_region_index_tensor", 4),
                ("bottom_region_index_tensor", 4),
                ("spacing_tensor", 3),
            )
            if getattr(network, f"include_{name.removesuffix('_tensor')}_input", False)
        }
        x = torch.randn(*shape, generator=generator)
        return {"output": network(x, timesteps=torch.tensor([10, 700]), **told, **extra)}
    image = torch.rand(2, 1, 16, 16, 16, generator=generator)
    if hasattr(network, "quantizer"):
        reconstruction = network(image)[0]
        return {"output": reconstruction}
    mean, std = network.encode(image)
    return {"mean": mean, "std": std, "output": network.decode(mean)}


def difference(one: Outputs, other: Outputs) -> float:
    """Return the largest absolute difference of all outputs."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def with_monais_defaults(network: nn.Module) -> Callable[[OldWeights, nn.Module], nn.Module]:
    """Return a loader by MONAI's `load_old_state_dict` into `network`, as it is by default."""

    def loaded(old: OldWeights, original: nn.Module) -> nn.Module:
        with contextlib.redirect_stdout(None):
            network.load_old_state_dict(dict(original.state_dict()))  # type: ignore[operator]
        return network

    return loaded


def with_settings(**settings: Any) -> Callable[[OldWeights, nn.Module], nn.Module]:
    """Return a loader into the network by other settings."""

    def loaded(old: OldWeights, original: nn.Module) -> nn.Module:
        network = ours(old, {key.replace("__", "::"): value for key, value in settings.items()})
        load(network, old, "the state dict")
        return network

    return loaded


def with_two_codes(old: OldWeights, original: nn.Module) -> nn.Module:
    """Return the VQ autoencoder whose latents are sums of two codes, the bundle's default."""
    return with_settings(autoencoder_def={**settings_of(old)["autoencoder_def"], "depth": 2})(old, original)


def without_projections(old: OldWeights, original: nn.Module) -> nn.Module:
    """Return the network as if nothing had been applied behind attention."""
    weights = {key: value for key, value in old.weights.items() if ".attn.out_proj." not in key}
    return into(ours(old, {}))(replace(old, weights=weights), original)


def with_fresh_projections(network: nn.Module) -> Callable[[OldWeights, nn.Module], nn.Module]:
    """Return a loader that leaves the projections of `network` as they are, as `strict=False` would."""

    def loaded(old: OldWeights, original: nn.Module) -> nn.Module:
        network.load_state_dict(old.weights, strict=False)
        return network

    return loaded


def into(network: nn.Module) -> Callable[[OldWeights, nn.Module], nn.Module]:
    """Return a loader into another network."""

    def loaded(old: OldWeights, original: nn.Module) -> nn.Module:
        load(network, old, "the state dict")
        return network

    return loaded


def generative() -> list[Case]:
    """Return monai-generative's cases."""
    from generative.networks.nets import VQVAE
    from generative.networks.nets import AutoencoderKL as OldAutoencoderKL
    from generative.networks.nets import DiffusionModelUNet as OldUNet

    name, wide = "monai-generative 0.2.3", (32, 64)
    strides = ((1, 3, 1, 1), (2, 4, 1, 1))
    book = VQVAE(
        3, 1, 1, num_channels=(8, 16), num_res_layers=1, num_res_channels=(8, 16), downsample_parameters=strides,
        upsample_parameters=((2, 4, 1, 1, 0), (1, 3, 1, 1, 0)), num_embeddings=64, embedding_dim=3,
    )  # fmt: skip
    by_monai, by_monai_too = (
        AutoencoderKL(channels=wide, **WITH_ATTENTION),
        DiffusionModelUNet(channels=U_NET_CHANNELS, **U_NET),
    )
    crossed = {**U_NET, **CROSS, "channels": U_NET_CHANNELS}
    return [
        Case(name, "AutoencoderKL with attention", OldAutoencoderKL(num_channels=wide, **WITH_ATTENTION), {},
             "MONAI's load_old_state_dict, `proj_attn` applied", with_monais_defaults(by_monai)),
        Case("the Zoo's", "AutoencoderKL of brats_mri_generative_diffusion",
             OldAutoencoderKL(num_channels=ZOO_CHANNELS, **ZOO), {},
             "norm_num_groups 16", with_settings(autoencoder_def__norm_num_groups=16)),
        Case(name, "VQVAE", book, {}, "two codes a latent", with_two_codes),
        Case("the Zoo's", "U-Net of brats_mri_generative_diffusion, a quarter as wide",
             OldUNet(num_channels=U_NET_CHANNELS, **U_NET), HEADS,
             "MONAI's load_old_state_dict, `proj_attn` applied", with_monais_defaults(by_monai_too)),
        Case(name, "the same", OldUNet(num_channels=U_NET_CHANNELS, **U_NET), HEADS,
             "num_head_channels 64", with_settings(denoiser_def__num_head_channels=[0, 64, 64])),
        Case(name, "U-Net with cross-attention", OldUNet(num_channels=U_NET_CHANNELS, **{**U_NET, **CROSS}), crossed,
             "include_fc: false", into(DiffusionModelUNet(**crossed, include_fc=False))),
    ]  # fmt: skip


def monai() -> list[Case]:
    """Return the cases of MONAI's own networks, with the flags of their attention."""

    def made(**flags: bool) -> nn.Module:
        return AutoencoderKL(channels=(32, 64), **WITH_ATTENTION, **flags)

    name = "MONAI 1.6"
    return [
        Case(name, "AutoencoderKL", made(), {}, "its projections left out", without_projections),
        Case(name, "AutoencoderKL, include_fc: false", made(include_fc=False), {},
             "projections left as they begin", with_fresh_projections(made())),
        Case(name, "AutoencoderKL, use_combined_linear: true", made(use_combined_linear=True), {},
             "its projections left out", without_projections),
    ]  # fmt: skip


def by_pytorch(network: nn.Module) -> nn.Module:
    """Return `network` with PyTorch's group norm, which rounds otherwise, in place of MAISI's."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = nn.GroupNorm
    return network


def maisi() -> list[Case]:
    """Return MAISI's cases."""
    shape = {**AUTOENCODER, "latent_channels": 4, "num_res_blocks": (2, 2, 2), "attention_levels": (False,) * 3}
    shape |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
    alone = {"num_channels": (64, 64, 128), "num_splits": 1, "save_mem": False}
    nearest = "MONAI's upsampling, the nearest cell"
    told = {f"include_{name}_input": True for name in ("top_region_index", "bottom_region_index", "spacing")}
    unet = DiffusionModelUNetMaisi(num_channels=U_NET_CHANNELS, **U_NET, **told)
    channels = alone["num_channels"]
    return [
        Case("MAISI", "AutoencoderKlMaisi", AutoencoderKlMaisi(**shape, **alone), {}, nearest,
             into(AutoencoderKL(channels=channels, **shape))),
        Case("MAISI", "the same", AutoencoderKlMaisi(**shape, **alone), {}, "PyTorch's group norm",
             into(by_pytorch(TrilinearAutoencoderKL(channels=channels, **shape)))),
        Case("MAISI", "U-Net with regions and spacing", unet, HEADS, "the same",
             into(DiffusionModelUNet(channels=U_NET_CHANNELS, **U_NET))),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
