"""Convolutions on a CPU, where PyTorch's own choice would be slow or wrong; both stages' networks have them there."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from latdiff3d import winograd

# ATen's ConvParams::use_mkldnn leaves a float32 batch of one whose first four sizes have a product of at most this, and
# a kernel of at most 3, to PyTorch's own convolution.
SMALL = 20480
HAS_AVX2_ONLY = torch.backends.cpu.get_cpu_capability() == "AVX2"  # where training was measured to gain by what follows
WINOGRAD_KIND = ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)  # kernel, stride, padding, dilation, groups
WINOGRAD_CHANNELS, WINOGRAD_DEPTH, WINOGRAD_VOXELS = 32, 4, 1024  # at least: below, its sums cost more than they save
WINOGRAD_NUMBERS = 2**22  # at most, of input and of result: above, neither memory nor caches have room for the sums


class CpuConv3d(nn.Conv3d):
    """A Conv3d that is oneDNN's for a batch of one as well, quick where there is no AVX-512, and exact in bfloat16.

    Batch of one: with torch 2.13 a small float32 volume alone is convolved by PyTorch's own code, with each voxel's
    neighbourhood copied. As a batch of its two halves along D it is oneDNN's: 32 → 32 channels on 20 × 24 × 20 take
    19 ms forward and back for 97, 64 → 64 on 10 × 12 × 10 take 11 for 24 (2 threads, AVX2). Values differ by rounding.

    Training without AVX-512: oneDNN's fast weight gradient is not for inputs that it pads along depth itself, so they
    come padded; and what Winograd's algorithm gains on goes by that. Forward and back, batch 8, 2 threads, AVX2:
    128 → 128 channels on 12 × 16 × 12 take 268 ms for 447, 64 → 64 69 for 116, 256 → 256 on 3 × 4 × 3, where only the
    padding changes, 37 for 57. Values differ by rounding.

    Autocast is left where the input is thinner than the kernel: there, on a CPU with AVX-512, the bfloat16 weight
    gradient is uninitialised memory: for 64 → 64 channels, kernel 3 and a 2 × 2 × 2 input, 40 of 40 trials were wrong,
    many of them infinite or NaN.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if any(size < kernel for size, kernel in zip(input.shape[2:], self.kernel_size, strict=True)):
            with torch.autocast(input.device.type, enabled=False):
                return self._float32(input.float(), weight.float(), None if bias is None else bias.float())
        if torch.is_autocast_enabled(input.device.type) or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        return self._float32(input, weight, bias)

    def _float32(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.kernel_size == (1, 1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(x, weight, bias)
        trains_without_avx512 = HAS_AVX2_ONLY and torch.is_grad_enabled() and weight.requires_grad
        if trains_without_avx512 and self._gains_by_winograd(x):
            return winograd.convolved(x, weight, bias)
        if len(x) == 1 and math.prod(x.shape[:4]) <= SMALL:
            return self._in_halves(x, weight, bias)
        depth_padding, *padding = self.padding
        if trains_without_avx512 and depth_padding > 0:
            padded = F.pad(x, (0, 0, 0, 0, depth_padding, depth_padding))
            return F.conv3d(padded, weight, bias, self.stride, (0, *padding), self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)

    def _gains_by_winograd(self, x: torch.Tensor) -> bool:
        num_voxels = x.numel() // self.in_channels
        return (
            (self.kernel_size, self.stride, self.padding, self.dilation, self.groups) == WINOGRAD_KIND
            and min(self.in_channels, self.out_channels) >= WINOGRAD_CHANNELS
            and max(self.in_channels, self.out_channels) * num_voxels <= WINOGRAD_NUMBERS
            and num_voxels >= WINOGRAD_VOXELS
            and x.shape[2] >= WINOGRAD_DEPTH
        )

    def _in_halves(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert not isinstance(self.padding, str)  # those are left to PyTorch
        depth, padding, stride = x.shape[2], self.padding[0], self.stride[0]
        extent = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        num_planes = (depth + 2 * padding - extent) // stride + 1
        half = math.ceil(num_planes / 2)
        needed = (half - 1) * stride + extent  # planes of x, for half of the result
        missing = half * stride + needed - (depth + 2 * padding)
        padded = F.pad(x, (0, 0, 0, 0, padding, padding + missing))
        halves = torch.cat([padded[:, :, :needed], padded[:, :, half * stride :]])
        y = F.conv3d(halves, weight, bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups)
        return torch.cat([y[:1], y[1:, :, : num_planes - half]], dim=2)


def with_cpu_convolutions(network: nn.Module) -> nn.Module:
    """Return `network` with every Conv3d a `CpuConv3d`; weights and their names stay."""
    return _exchanged(network, nn.Conv3d, CpuConv3d)


def without_cpu_convolutions(network: nn.Module) -> nn.Module:
    """Return `network` with every `CpuConv3d` a Conv3d again."""
    return _exchanged(network, CpuConv3d, nn.Conv3d)


def _exchanged(network: nn.Module, kind: type[nn.Module], other: type[nn.Module]) -> nn.Module:
    for module in network.modules():
        if type(module) is kind:
            module.__class__ = other
    return network
