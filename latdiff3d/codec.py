"""LatentCodec owns the latent space: image ↔ latents of zero mean and unit variance per channel."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from torch import nn

from latdiff3d.devices import autocast
from latdiff3d.errors import InputError


class LatentCodec(nn.Module):
    """An autoencoder together with the statistics of its latents.

    The statistics are buffers, so they travel with the weights; nobody else ever multiplies by a scale factor.
    MONAI's inferers see the codec through `encode_stage_2_inputs` and `decode_stage_2_outputs`, with scale factor 1.

    Args:
        autoencoder: an AutoencoderKL.
        latent_channels: C, the number of latent channels.
        precision: of the autoencoder's passes, "bf16" or "fp32".

    Raises:
        InputError: for another precision.
    """

    def __init__(self, autoencoder: AutoencoderKL, latent_channels: int, precision: str = "fp32") -> None:
        super().__init__()
        autocast(torch.device("cpu"), precision)  # an unknown precision is refused here, before any work
        self.autoencoder = autoencoder
        self.precision = precision
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.num_volumes: torch.Tensor
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self.register_buffer("num_volumes", torch.zeros((), dtype=torch.long))  # 0: not measured yet

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the normalised posterior.

        Args:
            image: (B, C, D, H, W), in [0, 1].

        Returns:
            two tensors (B, latent_channels, D/f, H/f, W/f), in units of the latents' standard deviation.

        Raises:
            InputError: before the latents have been measured.
        """
        self._require_statistics()
        mean, std = self._posterior(image)
        return (mean - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std), std / (
            self._per_channel(self.latent_std)
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, D, H, W), in about [0, 1], not clipped, of normalised latents (B, C', D/f, H/f, W/f).

        Raises:
            InputError: before the latents have been measured.
        """
        self._require_statistics()
        raw = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        with autocast(raw.device, self.precision):
            return self.autoencoder.decode(raw).float()

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image that the posterior's mean decodes to."""
        return self.decode(self.encode(image)[0])

    def encode_stage_2_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return a draw from the normalised posterior of `x`; MONAI's name."""
        mean, std = self.encode(x)
        return mean + std * torch.randn_like(std)

    def decode_stage_2_outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image of normalised latents; MONAI's name."""
        return self.decode(z)

    @torch.no_grad()
    def measure(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure mean and standard deviation of each latent channel over `batches` and keep them.

        The variance is that of posterior draws, the variance of the means plus the mean of the variances, because
        draws are what the denoiser sees.

        Args:
            batches: of the training set; each holds an `image` (B, C, D, H, W).

        Raises:
            InputError: no images, or a latent channel that never changes.
        """
        device = self.latent_mean.device
        total, total_square = (torch.zeros_like(self.latent_mean, dtype=torch.float64) for _ in range(2))
        num_cells, num_volumes = 0, 0
        self.eval()
        for batch in batches:
            image = torch.as_tensor(batch["image"]).to(device)
            mean, std = (moment.double() for moment in self._posterior(image))
            total += mean.sum(dim=(0, 2, 3, 4))
            total_square += (mean**2 + std**2).sum(dim=(0, 2, 3, 4))
            num_cells += mean.numel() // mean.shape[1]
            num_volumes += len(image)
        if num_volumes == 0:
            raise InputError("there are no volumes to measure the latents over; expected the training set.")
        mean = total / num_cells
        std = (total_square / num_cells - mean**2).sqrt()
        if not bool((std > 0).all() and std.isfinite().all()):
            raise InputError(f"latent channels have standard deviations {std.tolist()}; expected all above 0.")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.num_volumes.fill_(num_volumes)

    def _posterior(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(image.device, self.precision):
            mean, std = self.autoencoder.encode(image)
        return mean.float(), std.float()

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(1, -1, 1, 1, 1)

    def _require_statistics(self) -> None:
        if self.num_volumes.item() == 0:
            raise InputError(
                "this autoencoder's latents have not been measured, so stage 2 cannot use it; finish stage 1 "
                "(the same command goes on), which measures them at its end."
            )
