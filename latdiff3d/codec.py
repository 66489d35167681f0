"""LatentCodec owns the latent space: image ↔ latents of zero mean and unit variance per channel."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latdiff3d.devices import autocast
from latdiff3d.distributed import sum_over_ranks
from latdiff3d.errors import InputError
from latdiff3d.memory import Tiles, tiles_within, within_memory
from latdiff3d.networks import downsampling
from latdiff3d.norms import cut


class LatentCodec(nn.Module):
    """An autoencoder together with the statistics of its latents.

    The statistics are buffers, so they travel with the weights; nobody else ever multiplies by a scale factor.
    MONAI's inferers see the codec through `encode_stage_2_inputs` and `decode_stage_2_outputs`, with scale factor 1.
    A VQ autoencoder's latents are those before quantisation, with standard deviation 0; `decode` quantises them, as
    CompVis has it.

    Args:
        autoencoder: an AutoencoderKL or a VQAutoencoder, in a wavelet stem or not.
        latent_channels: C, the number of latent channels.
        precision: of the autoencoder's passes, "bf16", "fp16" or "fp32".

    Raises:
        InputError: for another precision, or another number of channels than the autoencoder says it has.
    """

    def __init__(self, autoencoder: nn.Module, latent_channels: int, precision: str = "fp32") -> None:
        super().__init__()
        found = getattr(getattr(autoencoder, "network", autoencoder), "latent_channels", latent_channels)
        if found != latent_channels:
            raise InputError(
                f"the autoencoder has {found} latent channels, latent_channels is {latent_channels}; let the network "
                "take it from there: latent_channels, or a VQ autoencoder's embed_dim, '@latent_channels'."
            )
        autocast(torch.device("cpu"), precision)  # an unknown precision is refused here, before any work
        self.autoencoder: Any = autoencoder  # encode and decode are not nn.Module's
        self.precision = precision
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.num_volumes: torch.Tensor
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self.register_buffer("num_volumes", torch.zeros((), dtype=torch.long))  # 0: not measured yet

    @property
    def factor(self) -> int:
        """f, the voxels along a latent cell's edge."""
        return downsampling(self.autoencoder)

    @torch.no_grad()
    def encode(self, image: torch.Tensor, memory_gb: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the normalised posterior.

        Args:
            image: (B, C, D, H, W) of any size, in [0, 1]; its last voxels are repeated to whole latent cells.
            memory_gb: work by tiles if memory would rise by more, see `memory.within_memory`; None: at once.

        Returns:
            two tensors (B, latent_channels, ⌈D/f⌉, ⌈H/f⌉, ⌈W/f⌉), in units of the latents' standard deviation.

        Raises:
            InputError: before the latents have been measured, or for too little memory.
        """
        self._require_statistics()
        mean, std = self._posterior(image, memory_gb)
        return (mean - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std), std / (
            self._per_channel(self.latent_std)
        )

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, size: Sequence[int] | None = None, memory_gb: float | None = None
    ) -> torch.Tensor:
        """Return images (B, C, D, H, W), in about [0, 1], not clipped, of normalised latents.

        Args:
            latents: (B, latent_channels, d, h, w).
            size: D, H and W, of an image whose latents have this size; d·f, h·f and w·f if None.
            memory_gb: as for `encode`.

        Raises:
            InputError: before the latents have been measured, for too little memory, or for another size.
        """
        self._require_statistics()
        cells = tuple(latents.shape[2:])
        size = tuple(n * self.factor for n in cells) if size is None else tuple(size)
        if tuple(-(-length // self.factor) for length in size) != cells:
            raise InputError(
                f"size is {list(size)}, the latents' {list(cells)}; expected 1 to {self.factor} voxels a cell."
            )
        raw = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        if memory_gb is None:
            (image,) = self._decoded(raw)
        else:
            (image,) = within_memory(self.autoencoder, self._decoded, raw, memory_gb, scale=self.factor)
        return cut(image, [slice(length) for length in size])

    @torch.no_grad()
    def decoding_tiles(self, cells: Sequence[int], memory_gb: float) -> Tiles | None:
        """Return the tiles, in latent cells, by which `decode` would work on so many cells; None: at once.

        Args:
            cells: (d, h, w).
            memory_gb: as for `encode`.

        Raises:
            InputError: for too little memory.
        """
        latents = self._per_channel(self.latent_mean).expand(1, -1, *cells)
        return tiles_within(self.autoencoder, self._decoded, latents, memory_gb)

    def reconstruct(self, image: torch.Tensor, memory_gb: float | None = None) -> torch.Tensor:
        """Return the image that the posterior's mean decodes to, of the same size."""
        return self.decode(self.encode(image, memory_gb)[0], image.shape[2:], memory_gb)

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
        counts = torch.tensor([num_cells, num_volumes], dtype=torch.float64, device=device)
        total, total_square, counts = (sum_over_ranks(moment) for moment in (total, total_square, counts))
        num_cells, num_volumes = (int(count) for count in counts)
        if num_volumes == 0:
            raise InputError("there are no volumes to measure the latents over; expected the training set.")
        mean = total / num_cells
        std = (total_square / num_cells - mean**2).sqrt()
        if not bool((std > 0).all() and std.isfinite().all()):
            raise InputError(f"latent channels have standard deviations {std.tolist()}; expected all above 0.")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.num_volumes.fill_(num_volumes)

    def _posterior(self, image: torch.Tensor, memory_gb: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        padded = _whole_cells(image, self.factor)

        def encode(window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with autocast(window.device, self.precision):
                mean, std = self.autoencoder.encode(window)
            return mean.float(), std.float()

        if memory_gb is None:
            return encode(padded)
        held = 0 if padded is image else padded.nbytes
        scale = Fraction(1, self.factor)
        mean, std = within_memory(self.autoencoder, encode, padded, memory_gb, self.factor, scale, held)
        return mean, std

    def _decoded(self, raw: torch.Tensor) -> tuple[torch.Tensor]:
        with autocast(raw.device, self.precision):
            return (self.autoencoder.decode(raw).float(),)

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(1, -1, 1, 1, 1)

    def _require_statistics(self) -> None:
        if self.num_volumes.item() == 0:
            raise InputError(
                "this autoencoder's latents have not been measured, so stage 2 cannot use it; finish stage 1 "
                "(the same command goes on), which measures them at its end."
            )


def _whole_cells(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Return `image` (B, C, D, H, W) with the last voxel of each axis repeated up to a multiple of `factor`."""
    missing = [-length % factor for length in image.shape[2:]]
    # F.pad counts from the last axis, two numbers each
    return F.pad(image, [n for m in reversed(missing) for n in (0, m)], mode="replicate") if any(missing) else image
