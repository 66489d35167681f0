"""A lossless wavelet stem around stage 1's network: the work is done on a halved grid, the details in its channels."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.networks.nets import AutoencoderKL
from torch import nn

from latdiff3d.distributed import num_ranks, sum_over_ranks
from latdiff3d.errors import InputError
from latdiff3d.networks import downsampling, last_convolution, latent_layer


def haar(image: torch.Tensor, levels: int = 1) -> torch.Tensor:
    """Return the orthonormal Haar bands of `image`: nothing is lost, energy is kept (Haar 1910; Mallat 1989).

    Args:
        image: (B, C, D, H, W), each axis divisible by 2^levels.
        levels: how often all bands are split again, the high ones too, so that all have one size.

    Returns:
        (B, C · 8^levels, D / 2^levels, H / 2^levels, W / 2^levels), in float32.
    """
    with torch.autocast(image.device.type, enabled=False):
        bands = image.float()
        for _ in range(levels):
            size = [length // 2 for length in bands.shape[2:]]
            corners = rearrange(bands, "b c (d i) (h j) (w k) -> b c (i j k) (d h w)", i=2, j=2, k=2)
            bands = (_haar_matrix(bands.device) @ corners).reshape(len(bands), -1, *size)
    return bands


def inverse_haar(bands: torch.Tensor, levels: int = 1) -> torch.Tensor:
    """Return the image (B, C, D, H, W), in float32, whose `haar` is `bands` (B, C · 8^levels, …)."""
    with torch.autocast(bands.device.type, enabled=False):
        image = bands.float()
        for _ in range(levels):
            depth, height, width = image.shape[2:]
            grouped = rearrange(image, "b (c n) d h w -> b c n (d h w)", n=8)
            corners = _haar_matrix(image.device).T @ grouped
            image = rearrange(
                corners, "b c (i j k) (d h w) -> b c (d i) (h j) (w k)", i=2, j=2, k=2, d=depth, h=height, w=width
            )
    return image


def with_stem(network: nn.Module, levels: int, image_channels: int, latent_noise: float = 0.0) -> nn.Module:
    """Return `network` inside a wavelet stem of `levels`, or `network` itself for 0; see WaveletAutoencoder.

    Raises:
        InputError: for another number of levels, noise below 0, or noise where it would have no effect.
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or not 0 <= levels <= 3:
        raise InputError(f"wavelet_levels is {levels!r}; expected a whole number from 0 (no stem) to 3.")
    if latent_noise < 0:
        raise InputError(f"latent_noise is {latent_noise}; expected a number from 0 on, such as 0.3.")
    if latent_noise > 0 and (levels == 0 or not isinstance(network, AutoencoderKL)):
        raise InputError(
            f"latent_noise is {latent_noise}, which only an AutoencoderKL in a wavelet stem has a use for; "
            "set latent_noise: 0."
        )
    return WaveletAutoencoder(network, levels, image_channels, latent_noise) if levels else network


class WaveletAutoencoder(nn.Module):
    """An autoencoder between `haar` and its inverse, beside a linear path from block to latent and back.

    Its face is that of the network inside: `encode`, `decode`, and a forward pass whose first output is the
    reconstruction. The linear path maps each block of f³ voxels, f the downsampling in all, to its latent cell, as
    1 × 1 × 1 convolutions of the f³ bands. `start_linear` makes it the best linear code there is and the network's own
    contribution 0, so that training begins where block PCA ends and learns the rest: a residual shortcut in space, as
    Chen et al. 2024 (DC-AE, arXiv:2410.10733) have it, but with measured weights.

    Args:
        network: an AutoencoderKL or VQAutoencoder of `image_channels` · 8^levels channels in and out.
        levels: of the stem.
        image_channels: C.
        latent_noise: of a KL autoencoder in training: noise is laid over what is decoded, so that the decoder smooths
            what stage 2 leaves of it instead of showing it as blocks. Its standard deviation is drawn for each volume,
            |N(0, latent_noise²)| latent standard deviations (as Zheng et al. 2025, arXiv:2510.11690). 0: none.

    Raises:
        InputError: when the network has another number of channels.
    """

    def __init__(self, network: Any, levels: int, image_channels: int, latent_noise: float = 0.0) -> None:
        super().__init__()
        num_bands = image_channels * 8**levels
        first = next(module for module in network.encoder.modules() if isinstance(module, nn.Conv3d))
        last = last_convolution(network.decoder)
        if (first.in_channels, last.out_channels) != (num_bands, num_bands):
            raise InputError(
                f"autoencoder_def has {first.in_channels} channels in and {last.out_channels} out; behind a wavelet "
                f"stem of {levels} levels and {image_channels} image channels it needs {num_bands}."
            )
        self.network: Any = network
        self.levels = levels
        self.latent_noise = latent_noise
        self.downsampling = 2**levels * downsampling(network)
        self.inner_levels = int(math.log2(downsampling(network)))
        num_values = image_channels * 8 ** (levels + self.inner_levels)
        num_latents = latent_layer(network).out_channels
        self.linear_encoder = nn.Conv3d(num_values, num_latents, 1)
        self.linear_decoder = nn.Conv3d(num_latents, num_values, 1)

    @property
    def decoder(self) -> nn.Module:
        """The decoder of the network inside."""
        return self.network.decoder

    @property
    def quantizer(self) -> Any:
        """The quantiser of the network inside; a KL autoencoder has none."""
        return self.network.quantizer

    def forward(self, image: torch.Tensor) -> tuple[Any, ...]:
        """Return the reconstruction of `image` (B, C, D, H, W) and what the network's regularisation needs.

        That is the posterior's mean and std of a KL autoencoder, or the quantiser's terms of a VQ autoencoder.
        """
        mean, std = self.encode(image)
        if isinstance(self.network, AutoencoderKL):
            latents = self._noisy(self.network.sampling(mean, std))
            return self._decoded(latents, self.network.decode), mean, std
        latents, terms = self.network.quantize(mean)
        return self._decoded(latents, self.network.decode_quantized), terms

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std (B, C', D/f, H/f, W/f) of the posterior of `image` (B, C, D, H, W)."""
        bands = haar(image, self.levels)
        mean, std = self.network.encode(bands)
        return mean + self.linear_encoder(haar(bands, self.inner_levels)), std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the image (B, C, D, H, W) of latents (B, C', D/f, H/f, W/f); a VQ autoencoder quantises them first."""
        if isinstance(self.network, AutoencoderKL):
            return self._decoded(latents, self.network.decode)
        return self._decoded(self.quantizer.nearest(latents), self.network.decode_quantized)

    def _noisy(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.training or self.latent_noise == 0:
            return latents
        spread = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        level = self.latent_noise * torch.randn(len(latents), 1, 1, 1, 1, device=latents.device).abs()
        return latents + level * spread * torch.randn_like(latents)

    def _decoded(self, latents: torch.Tensor, decode: Any) -> torch.Tensor:
        bands = decode(latents)
        # The linear path comes last: its gradient, as large as the bands, is then used first and waits for nobody.
        linear = inverse_haar(self.linear_decoder(latents), self.inner_levels)
        return inverse_haar(bands + linear, self.levels)

    @torch.no_grad()
    def start_linear(self, images: Iterable[torch.Tensor]) -> None:
        """Make the whole network the best linear code of `images`' blocks.

        The linear path gets the leading principal components of the blocks; the network's last layers are set to 0.
        Each latent starts with variance 1. A quantiser's latents share one scale instead, so that their mean variance
        is 1 and a distance between codes is the error it makes in the volume.

        Args:
            images: batches (B, C, D, H, W).

        Raises:
            InputError: no images, or fewer components with any variance than latent channels.
        """
        weight = self.linear_encoder.weight
        size = weight.shape[1]
        count, total, products = (
            torch.zeros(s, dtype=torch.float64, device=weight.device) for s in ((), size, (size,) * 2)
        )
        for image in images:
            blocks = haar(image.to(weight.device), self.levels + self.inner_levels)  # (B, values, D/f, H/f, W/f)
            values = rearrange(blocks, "b n d h w -> (b d h w) n").double()
            count += len(values)
            total += values.sum(0)
            products += values.T @ values
        count, total, products = (sum_over_ranks(moment) for moment in (count, total, products))
        if count == 0:
            raise InputError("there are no volumes to start the autoencoder from; expected the training set.")
        mean = total / count
        variances, components = torch.linalg.eigh((products / count - mean[:, None] * mean).cpu())  # ascending
        num_latents = len(weight)
        std = variances[-num_latents:].flip(0).clamp_min(0).sqrt()
        if not (std > 0).all():
            raise InputError(
                f"the training volumes' blocks vary in {int((variances > 0).sum())} directions only; expected at least "
                f"latent_channels, {num_latents}. Look at the data with `latdiff3d doctor`."
            )
        scale = std.square().mean().sqrt().expand_as(std) if hasattr(self, "quantizer") else std
        directions = components[:, -num_latents:].flip(1).T  # (latents, values)
        encoder = (directions / scale[:, None]).to(mean.device)
        _set(self.linear_encoder, encoder, -encoder @ mean)
        _set(self.linear_decoder, (directions * scale[:, None]).T, mean)
        for layer in (latent_layer(self.network), last_convolution(self.network.decoder)):
            _set(layer, torch.zeros_like(layer.weight), torch.zeros(layer.out_channels))


class LinearStart:
    """Starts a fresh run's WaveletAutoencoder from the best linear code; other networks, and resumed runs, stay.

    Args:
        autoencoder: any of stage 1's.
        loader: the training loader, seeded.
        max_volumes: after so many volumes it has seen enough.
    """

    def __init__(self, autoencoder: nn.Module, loader: DataLoader, max_volumes: int = 256) -> None:
        self.autoencoder = autoencoder
        self.loader = loader
        self.max_batches = -(-max_volumes // (getattr(loader.batch_sampler, "batch_size", 1) * num_ranks()))

    def attach(self, engine: Engine) -> None:
        """Act when training starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Start the network if it has made no step yet."""
        if engine.state.iteration == 0 and isinstance(self.autoencoder, WaveletAutoencoder):
            batches = itertools.islice(self.loader, self.max_batches)
            # Plain tensors: MONAI's metadata of unlike volumes cannot be sliced, and is not needed here.
            self.autoencoder.start_linear(batch["image"].as_subclass(torch.Tensor) for batch in batches)


def _set(layer: nn.Conv3d | nn.ConvTranspose3d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    assert layer.bias is not None
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(bias)


def _haar_matrix(device: torch.device) -> torch.Tensor:
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device) / math.sqrt(2)
    return torch.einsum("ai,bj,ck->abcijk", step, step, step).reshape(8, 8)  # bands × corners of a 2 × 2 × 2 block
