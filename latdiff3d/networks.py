"""What MONAI's networks are asked and given from outside: their downsampling, their last layer, exact gradients."""

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.nets.autoencoderkl import AEKLDownsample
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.transforms import check_divisible


def downsampling(network: nn.Module) -> int:
    """Return the factor by which `network` shrinks each spatial axis on its way down.

    Args:
        network: an AutoencoderKL or a DiffusionModelUNet.
    """
    if isinstance(network, AutoencoderKL):
        return int(2 ** sum(isinstance(module, AEKLDownsample) for module in network.encoder.blocks))
    if isinstance(network, DiffusionModelUNet):
        return int(2 ** (len(network.block_out_channels) - 1))
    raise TypeError(f"{type(network).__name__} has no known downsampling; expected AutoencoderKL or DiffusionModelUNet.")


class ExactConv3d(nn.Conv3d):
    """A Conv3d that leaves bfloat16 autocast where its input is thinner than its kernel.

    There, with torch 2.13 on a CPU with AVX-512, the bfloat16 weight gradient is uninitialised memory: for 64 → 64
    channels, kernel 3 and a 2 × 2 × 2 input, 40 of 40 trials were wrong, many of them infinite or NaN.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if all(size >= kernel for size, kernel in zip(input.shape[2:], self.kernel_size, strict=True)):
            return super()._conv_forward(input, weight, bias)
        with torch.autocast(input.device.type, enabled=False):
            return super()._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return `network` on `device`, its convolutions exact where the CPU's would not be; the weights' names stay."""
    if device.type == "cpu":
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = ExactConv3d
    return network.to(device)


def last_layer(autoencoder: nn.Module) -> torch.Tensor:
    """Return the weight of the decoder's last convolution, at which the adaptive weight compares gradients."""
    return [module for module in autoencoder.decoder.modules() if isinstance(module, nn.Conv3d)][-1].weight


def check_crop(crop_to: Sequence[int], networks: Sequence[nn.Module]) -> None:
    """Refuse a crop that `networks`, one in the latent space of the other, cannot halve as often as they do.

    Args:
        crop_to: (D, H, W) in voxels.
        networks: the autoencoder, or the autoencoder and the denoiser.

    Raises:
        InputError: naming the nearest crop that works.
    """
    names = {AutoencoderKL: "autoencoder", DiffusionModelUNet: "U-Net"}
    factors = [downsampling(network) for network in networks]
    combined = math.prod(factors)
    if len(crop_to) != 3 or any(int(size) != size or size < 1 for size in crop_to):
        raise InputError(f"crop_to is {list(crop_to)}; expected three whole numbers of voxels such as [64, 64, 64].")
    parts = " × ".join(f"the {names[type(n)]}'s {f}" for n, f in zip(networks, factors, strict=True))
    check_divisible(crop_to, combined, parts)
