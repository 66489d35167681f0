"""A network that encodes the condition, trained as one with the denoiser: CompVis' `cond_stage_config`."""

from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

from latdiff3d.errors import InputError


class ConditionEncoder(nn.Sequential):
    """A small encoder that keeps the latent grid: a projection, residual blocks that see the cells around, another.

    Args:
        in_channels: of a condition, K · f³ for `conditioning.PackedCondition`.
        out_channels: E, what the denoiser is given.
        channels: in between, a multiple of `norm_num_groups`.
        num_res_blocks: of two 3 × 3 × 3 convolutions each.
        norm_num_groups: of each block's norms.
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int = 32, num_res_blocks: int = 2, norm_num_groups: int = 8
    ) -> None:
        super().__init__(
            Convolution(3, in_channels, channels, kernel_size=1, conv_only=True),
            *(AEKLResBlock(3, channels, norm_num_groups, 1e-6, channels) for _ in range(num_res_blocks)),
            Convolution(3, channels, out_channels, kernel_size=1, conv_only=True),
        )


class EncodingDenoiser(nn.Module):
    """A denoiser and the encoder of its condition as one module, for whoever trains, averages, saves or asks it.

    It is called as `DiffusionModelUNet` is, by MONAI's inferers too.
    """

    def __init__(self, denoiser: nn.Module, encoder: nn.Module, latent_channels: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.encoder = encoder
        self.latent_channels = latent_channels

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the denoiser's prediction (B, C, D, H, W).

        Args:
            x: noisy latents and, behind them, the condition as it is before encoding, (B, C + K · f³, D, H, W).
            timesteps: (B,).
            args, kwargs: what else the denoiser takes.
        """
        latents, condition = x[:, : self.latent_channels], x[:, self.latent_channels :]
        encoded = self.encoder(condition)  # (B, E, D, H, W)
        return self.denoiser(torch.cat([latents, encoded.to(latents)], dim=1), timesteps, *args, **kwargs)


def with_encoder(denoiser: Any, encoder: nn.Module | None, latent_channels: int, condition_channels: int) -> nn.Module:
    """Return `denoiser` with its condition's encoder, or as it is without one.

    Args:
        denoiser: of C + E channels, such as a DiffusionModelUNet.
        encoder: from `condition_channels` to E channels, on the same grid.
        latent_channels: C.
        condition_channels: K · f³, of the condition before encoding.

    Raises:
        InputError: for an encoder between other channels, or one that leaves the grid.
    """
    if encoder is None:
        return denoiser
    size = (8, 8, 8)
    expected = (1, denoiser.in_channels - latent_channels, *size)
    is_training = encoder.training
    try:
        with torch.no_grad():
            found = tuple(encoder.eval()(torch.zeros(1, condition_channels, *size)).shape)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"condition_encoder_def, a {type(encoder).__name__}, does not take the condition's {condition_channels} "
            f"channels on a grid of {size} ({reason}); set its in_channels to '@condition_channels'."
        ) from error
    if found != expected:
        raise InputError(
            f"condition_encoder_def, a {type(encoder).__name__}, makes {found} of a condition on a grid of {size}; "
            f"expected {expected}: as many channels as encoded_channels, on the same grid."
        )
    return EncodingDenoiser(denoiser, encoder.train(is_training), latent_channels)
