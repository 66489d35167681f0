"""Both stages' networks keep less between their forward and backward pass: activation checkpointing per block."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from monai.networks.blocks import SpatialAttentionBlock, Upsample
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock, Encoder
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, SpatialTransformer, WrappedUpsample
from monai.networks.nets.vqvae import VQVAEResidualUnit
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latdiff3d.errors import InputError

Function = Callable[..., torch.Tensor]


def per_block(network: nn.Module, enabled: bool = True) -> nn.Module:
    """Let each residual, attention and upsampling block of `network` compute its activations again on the way back.

    The network stays what it is: names of weights, state dict, results, what `isinstance` says; only memory and time
    change, and only where gradients are wanted. PyTorch's `checkpoint_wrapper` would put a module of its own between a
    block and its parent, and so rename the weights in `named_parameters`; here a block's class changes, and calls
    PyTorch's `checkpoint`, not reentrant: `torch.autograd.grad`, DistributedDataParallel and `torch.compile` get along
    with it.

    Downsampling, a convolution with nothing inside to give up, stays as it is. So do the last norm and the last layer,
    at which the adaptive weight asks for gradients twice before the way back begins.

    Args:
        network: an AutoencoderKL, a VQVAE, a DiffusionModelUNet, or a module that holds one. Changed in place.
        enabled: False leaves it as it is.

    Returns:
        The same network.

    Raises:
        InputError: when it has no such block; `enabled` is neither True nor False.
    """
    if not isinstance(enabled, bool):
        raise InputError(f"use_checkpoint is {enabled!r}; expected true or false.")
    if not enabled:
        return network
    modules = list(network.modules())
    if not any(type(module) in (*BLOCKS, *BLOCKS.values()) for module in modules):
        raise InputError(
            f"use_checkpoint is on, but {type(network).__name__} has no block that can be recomputed; expected one of "
            f"{', '.join(block.__name__ for block in BLOCKS)}. Set use_checkpoint: false for it."
        )
    for module in modules:
        if recomputing := (BLOCKS | ENCODERS).get(type(module)):
            module.__class__ = recomputing
    return network


def recomputed(function: Function, *args: object, has_dropout: bool = False) -> torch.Tensor:
    """Return `function(*args)`, keeping only `args` for the way back, on which the rest is computed again.

    Args:
        has_dropout: draw the same random numbers again; to save the generator's state costs a wait on a GPU.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=has_dropout)


def normalised_convolution(
    norm: Function, activation: Function, convolution: Function, x: torch.Tensor
) -> torch.Tensor:
    """Return `convolution(activation(norm(x)))`, keeping `x` alone.

    The convolution never runs again: it comes last, and its gradients need its input alone. While they are computed,
    which is where memory peaks, the norm's output is not kept either; that is what the inner `recomputed` is for.
    """

    def active(x: torch.Tensor) -> torch.Tensor:
        return activation(norm(x))

    def whole(x: torch.Tensor) -> torch.Tensor:
        return convolution(recomputed(active, x))

    return recomputed(whole, x)


# In both residual blocks the shortcut comes first, so that its gradient, as large as the input, is made last.
class RecomputedAEKLResBlock(AEKLResBlock):
    """AutoencoderKL's residual block; keeps 2 activations of 6."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C', D, H, W) of `x` (B, C, D, H, W)."""
        shortcut = self.nin_shortcut(x)
        h = normalised_convolution(self.norm1, F.silu, self.conv1, x)
        h = normalised_convolution(self.norm2, F.silu, self.conv2, h)
        return shortcut + h


class RecomputedDiffusionUNetResnetBlock(DiffusionUNetResnetBlock):
    """DiffusionModelUNet's residual block, which may also halve or double the grid; keeps 2 activations of 6."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Return (B, C', D', H', W') of `x` (B, C, D, H, W) and the time's embedding (B, E)."""
        shortcut = self.skip_connection(self._resampled(x))
        shift = self.time_emb_proj(self.nonlinearity(emb))  # (B, C')
        h = normalised_convolution(self.norm1, self.nonlinearity, self._resampled_convolution, x)
        h = h + shift.view(*shift.shape, *[1] * self.spatial_dims)
        h = normalised_convolution(self.norm2, self.nonlinearity, self.conv2, h)
        return shortcut + h

    def _resampled_convolution(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(self._resampled(x))

    def _resampled(self, x: torch.Tensor) -> torch.Tensor:
        resample = self.upsample if self.upsample is not None else self.downsample
        return x if resample is None else resample(x)


class RecomputedVQVAEResidualUnit(VQVAEResidualUnit):
    """VQVAE's residual block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of `x`'s shape (B, C, D, H, W)."""
        return recomputed(super().forward, x, has_dropout=True)


class RecomputedSpatialAttentionBlock(SpatialAttentionBlock):
    """Self-attention over a grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of `x`'s shape (B, C, D, H, W)."""
        return recomputed(super().forward, x)


class RecomputedSpatialTransformer(SpatialTransformer):
    """Self-attention, and attention to a context."""

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor of `x`'s shape (B, C, D, H, W), having seen the context (B, N, E)."""
        return recomputed(super().forward, x, context, has_dropout=True)


class RecomputedUpsample(Upsample):
    """Upsampling and the convolution behind it, in AutoencoderKL; keeps the small grid, not the large one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C', 2D, 2H, 2W) of `x` (B, C, D, H, W)."""
        return recomputed(super().forward, x)


class RecomputedWrappedUpsample(WrappedUpsample):
    """Upsampling and the convolution behind it, in DiffusionModelUNet; keeps the small grid, not the large one."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, C', 2D, 2H, 2W) of `x` (B, C, D, H, W)."""
        return recomputed(super().forward, x)


class RecomputedEncoder(Encoder):
    """AutoencoderKL's encoder; its largest grid keeps its input alone.

    What it keeps, it keeps while the decoder, whose largest grid is where memory peaks, goes back. So here, and only
    here, convolutions run again; on the next grid they would save a quarter as much.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C', D/f, H/f, W/f) of `x` (B, C, D, H, W)."""
        blocks = list(self.blocks)
        downs = [number for number, block in enumerate(blocks) if isinstance(block, AEKLDownsample)]
        if downs:
            largest, blocks = blocks[: downs[0] + 1], blocks[downs[0] + 1 :]
            x = recomputed(partial(_in_turn, largest), x)
        return _in_turn(blocks, x)


def _in_turn(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    AEKLResBlock: RecomputedAEKLResBlock,
    DiffusionUNetResnetBlock: RecomputedDiffusionUNetResnetBlock,
    VQVAEResidualUnit: RecomputedVQVAEResidualUnit,
    SpatialAttentionBlock: RecomputedSpatialAttentionBlock,
    SpatialTransformer: RecomputedSpatialTransformer,
    Upsample: RecomputedUpsample,
    WrappedUpsample: RecomputedWrappedUpsample,
}
ENCODERS: dict[type[nn.Module], type[nn.Module]] = {Encoder: RecomputedEncoder}
