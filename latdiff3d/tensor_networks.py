"""The networks as MONAI's bundle checks, TorchScript and ONNX want them: one tensor in, one tensor out."""

from typing import Any

import torch
from torch import nn

from latdiff3d.codec import LatentCodec


class TensorDenoiser(nn.Module):
    """A denoiser whose time, and covariates if it has any, are channels behind its input, the same in each cell.

    Its weights are the denoiser's, under `denoiser.`.

    Args:
        denoiser: a DiffusionModelUNet, or one with an encoder of its condition.
        num_channels: of the latents and the condition together; the channel behind them is the time.
    """

    def __init__(self, denoiser: nn.Module, num_channels: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.num_channels = num_channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the prediction (B, C, D, H, W).

        Args:
            image: (B, C + K + 1 + N, D, H, W): noisy latents, the condition's K channels, the time in units of the
                noise schedule, and N covariates.
        """
        told = image[:, self.num_channels :, 0, 0, 0]  # (B, 1 + N)
        x, timesteps, covariates = image[:, : self.num_channels], told[:, 0], told[:, 1:]
        if covariates.shape[1] == 0:
            return self.denoiser(x, timesteps)
        return self.denoiser(x, timesteps, class_labels=covariates)


class TensorReconstruction(nn.Module):
    """An autoencoder's view of an image, from the posterior's mean; its weights are the codec's, under `codec.`."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return (B, C, D, H, W), not clipped, of an image of that shape in [0, 1]; sizes divisible by the factor."""
        autoencoder: Any = self.codec.autoencoder
        mean, _ = autoencoder.encode(image)
        return autoencoder.decode(mean)
