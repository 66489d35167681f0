"""What MONAI's networks are asked and given from outside: their downsampling, their last layer, exact gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet, UNet
from monai.networks.nets.autoencoderkl import AEKLDownsample
from torch import nn

from latdiff3d.cpu_convolutions import with_cpu_convolutions
from latdiff3d.crop_windows import check_divisible
from latdiff3d.errors import InputError


def downsampling(network: nn.Module) -> int:
    """Return the factor by which `network` shrinks each spatial axis on its way down.

    Args:
        network: an AutoencoderKL, a VQVAE, a DiffusionModelUNet, a UNet, or one that says it itself, as `downsampling`.
    """
    if isinstance(own := getattr(network, "downsampling", None), int):
        return own
    if isinstance(network, AutoencoderKL):
        return int(2 ** sum(isinstance(module, AEKLDownsample) for module in network.encoder.modules()))
    if isinstance(network, VQVAE):
        return math.prod(stride for stride, *_ in network.encoder.downsample_parameters)
    if isinstance(network, DiffusionModelUNet):
        return int(2 ** (len(network.block_out_channels) - 1))
    if isinstance(network, UNet):
        return math.prod(network.strides[: len(network.channels) - 1])
    raise TypeError(f"{type(network).__name__} is no AutoencoderKL, VQVAE, DiffusionModelUNet or UNet.")


class TrilinearAutoencoderKL(AutoencoderKL):
    """AutoencoderKL as MAISI's: trilinear upsampling where MONAI's repeats the nearest cell, and its norms' arithmetic.

    Args:
        args, network: AutoencoderKL's.
    """

    def __init__(self, *args: Any, **network: Any) -> None:
        super().__init__(*args, **network)
        for module in self.decoder.modules():
            if isinstance(module, nn.Upsample):
                module.mode = "trilinear"
        for module in self.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = MaisiNorm


class MaisiNorm(nn.GroupNorm):
    """A GroupNorm that rounds as MAISI's, which subtracts, divides, scales and shifts one after the other, in float32.

    By PyTorch's, outputs of MAISI's autoencoder with a standard deviation of 0.77 differ by 1.5e-5.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (B, C, D, H, W) in float32, normalised over each group of channels."""
        groups = input.float().unflatten(1, (self.num_groups, -1))  # (B, G, C/G, D, H, W)
        axes = (2, 3, 4, 5)
        mean, variance = groups.mean(axes, keepdim=True), groups.var(axes, correction=0, keepdim=True)
        normalised = ((groups - mean) / (variance + self.eps).sqrt()).flatten(1, 2)  # (B, C, D, H, W)
        return normalised * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return `network` on `device`, on a CPU with convolutions that are exact and fast; the weights' names stay."""
    return (with_cpu_convolutions(network) if device.type == "cpu" else network).to(device)


def narrow_posterior(autoencoder: Any, std: float) -> nn.Module:
    """Let an untrained AutoencoderKL begin with a posterior of standard deviation `std`, whatever the image.

    MONAI's begins near 1, as wide as the means' own spread: the decoder first learns to average over noise, and the
    posterior is slow to narrow. Returns the same network; a VQVAE, which has no posterior, as it is.

    Args:
        autoencoder: an AutoencoderKL, a VQVAE, or either as the `network` of a wavelet stem.
        std: in the latents' unit.
    """
    network = getattr(autoencoder, "network", autoencoder)
    if isinstance(network, VQVAE):
        return autoencoder
    parameters = dict(network.quant_conv_log_sigma.named_parameters())
    nn.init.zeros_(parameters["conv.weight"])
    nn.init.constant_(parameters["conv.bias"], 2 * math.log(std))  # the layer gives log σ²
    return autoencoder


def last_layer(autoencoder: Any) -> torch.Tensor:
    """Return the weight of the decoder's last convolution, at which the adaptive weight compares gradients."""
    return last_convolution(autoencoder.decoder).weight


def last_convolution(network: nn.Module) -> nn.Conv3d | nn.ConvTranspose3d:
    """Return the convolution of `network` that was built last; in MONAI's networks its output is the network's."""
    return [module for module in network.modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))][-1]


def latent_layer(autoencoder: Any) -> nn.Conv3d | nn.ConvTranspose3d:
    """Return the convolution whose output are the latents, or the posterior's mean."""
    return last_convolution(getattr(autoencoder, "quant_conv_mu", autoencoder.encoder))


def check_crop(crop_to: Sequence[int], networks: Sequence[nn.Module]) -> None:
    """Refuse a crop that `networks`, one in the latent space of the other, cannot halve as often as they do.

    Args:
        crop_to: (D, H, W) in voxels.
        networks: the autoencoder, the autoencoder and the denoiser, or the segmenter.

    Raises:
        InputError: naming the nearest crop that works.
    """
    names = {DiffusionModelUNet: "U-Net", UNet: "segmenter"}
    factors = [downsampling(network) for network in networks]
    combined = math.prod(factors)
    sizes = list(crop_to) if isinstance(crop_to, (list, tuple)) else []
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"crop_to is {crop_to!r}; expected three whole numbers of voxels such as [64, 64, 64].")
    parts = " × ".join(f"the {names.get(type(n), 'autoencoder')}'s {f}" for n, f in zip(networks, factors, strict=True))
    check_divisible(crop_to, combined, parts)


def check_discriminator(crop_to: Sequence[int], discriminator: nn.Module, num_channels: int) -> None:
    """Refuse a crop that nothing is left of behind the discriminator's layers.

    Args:
        crop_to: (D, H, W) in voxels.
        discriminator: a PatchDiscriminator.
        num_channels: of the image.

    Raises:
        InputError: naming what to change.
    """
    device = next(discriminator.parameters()).device
    try:
        with torch.no_grad():
            discriminator(torch.zeros(1, num_channels, *crop_to, device=device))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"crop_to {list(crop_to)} is too small for the discriminator ({str(error).splitlines()[0]}); "
            "use a larger crop, or fewer layers: discriminator_def::num_layers_d."
        ) from error
