"""Winograd's convolution along depth: a convolution's result and gradients, half its multiplications, at any depth."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from latdiff3d.compilation import compiled
from latdiff3d.winograd import convolved


def tensors(shape, channels_out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    weight = torch.randn(channels_out, shape[1], 3, 3, 3, generator=generator, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(channels_out, generator=generator, dtype=dtype)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 24])
def test_it_is_the_convolution_at_any_depth(depth):
    x, weight, bias = tensors((2, 3, depth, 5, 4), 7)
    for given in (bias, None):
        torch.testing.assert_close(convolved(x, weight, given), F.conv3d(x, weight, given, padding=1))


@pytest.mark.parametrize("depth", [5, 7])
def test_its_gradients_and_theirs_are_those_of_what_it_computes(depth):
    x, weight, bias = tensors((1, 2, depth, 2, 3), 2)
    inputs = (x, weight, bias.requires_grad_())
    assert gradcheck(convolved, inputs)
    assert gradgradcheck(convolved, inputs)


@pytest.mark.parametrize("depth", [12, 16])  # six planes at a time, and four
def test_in_float32_result_and_gradients_are_within_a_hundred_thousandth(depth):
    x, weight, bias = tensors((2, 64, depth, 8, 6), 64, torch.float32)
    upstream = torch.randn(2, 64, depth, 8, 6, generator=torch.Generator().manual_seed(1))
    y = convolved(x, weight, bias)
    found = (y, *torch.autograd.grad(y, (x, weight), upstream))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    exact = F.conv3d(*exact_inputs, bias.double(), padding=1)
    for ours, theirs in zip(found, (exact, *torch.autograd.grad(exact, exact_inputs, upstream.double())), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def num_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("depth", "share"), [(12, 8 / 18), (16, 6 / 12)])
def test_it_multiplies_half_as_often(depth, share):
    x, weight, bias = tensors((1, 64, depth, 8, 8), 64, torch.float32)
    plain = num_flops(lambda: F.conv3d(x, weight, bias, padding=1))
    assert share < num_flops(lambda: convolved(x, weight, bias)) / plain < share + 0.05


def test_activation_checkpointing_does_not_convolve_again():
    x, weight, bias = tensors((1, 64, 12, 8, 8), 64, torch.float32)

    def active(x):
        return convolved(F.silu(x), weight, bias)

    forward = num_flops(lambda: active(x))
    once = num_flops(lambda: active(x).sum().backward())
    kept = num_flops(lambda: checkpoint(active, x, use_reentrant=False).sum().backward())
    assert once < kept < once + 0.1 * forward  # its sums run again, for what it convolves was not kept


class Convolved(nn.Conv3d):
    def forward(self, x):
        return convolved(x, self.weight, self.bias)


def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(Convolved(4, 4, 3), nn.SiLU(), Convolved(4, 2, 3))
    x = torch.randn(2, 4, 6, 5, 4)
    results = []
    for each in (network, compiled(copy.deepcopy(network), "aot_eager")):
        y = each(x)
        y.square().mean().backward()
        results.append([y, *(parameter.grad for parameter in each.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
