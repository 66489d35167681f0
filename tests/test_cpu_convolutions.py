"""Convolutions on a CPU: what PyTorch's own would give, sooner, and where those are wrong, right."""

import copy
import warnings

import pytest
import torch
from test_networks import autoencoder, discriminator
from torch import nn

from latdiff3d import cpu_convolutions, winograd
from latdiff3d.cpu_convolutions import SMALL, WINOGRAD_NUMBERS, CpuConv3d, without_cpu_convolutions
from latdiff3d.losses import discriminator_loss
from latdiff3d.networks import downsampling, placed

CPU = torch.device("cpu")
KINDS = {
    "3": {"kernel_size": 3, "padding": 1},
    "3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3, stride 2, no padding": {"kernel_size": 3, "stride": 2},
    "4, stride 2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "5 × 1 × 1": {"kernel_size": (5, 1, 1), "padding": (2, 0, 0)},
    "3, dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "3, no bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "1": {"kernel_size": 1},
}


@pytest.fixture(params=[False, True], ids=["any", "avx2"])
def has_avx2_only(request, monkeypatch):
    monkeypatch.setattr(cpu_convolutions, "HAS_AVX2_ONLY", request.param)


def results_and_gradients(convolution, shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = convolution(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return [y, x.grad, *(parameter.grad for parameter in convolution.parameters())]


@pytest.mark.usefixtures("has_avx2_only")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(8, 6, 5), (9, 7, 5), (5, 5, 5), (11, 5, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_pytorchs_own(kind, size, batch):
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 5, **KINDS[kind])
    pair = (plain, placed(copy.deepcopy(plain), CPU))
    for ours, theirs in zip(*(results_and_gradients(each, (batch, 3, *size)) for each in pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("has_avx2_only")
def test_results_and_gradients_of_many_channels_are_pytorchs_own():
    torch.manual_seed(0)
    plain = nn.Conv3d(32, 40, 3, padding=1)
    pair = (plain, placed(copy.deepcopy(plain), CPU))
    for ours, theirs in zip(*(results_and_gradients(each, (2, 32, 8, 8, 8)) for each in pair), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("channels", "kind", "shape", "gains"),
    [
        ((32, 64), {}, (1, 8, 16, 8), True),
        ((64, 32), {"bias": False}, (8, 4, 8, 4), True),
        ((31, 64), {}, (1, 8, 16, 8), False),
        ((32, 4), {}, (1, 8, 16, 8), False),
        ((32, 32), {}, (1, 7, 12, 12), False),
        ((32, 32), {}, (8, 3, 16, 8), False),
        ((32, 64), {}, (1, 8, WINOGRAD_NUMBERS // 64 // 64 + 1, 8), False),
        ((32, 32), {"stride": 2}, (1, 8, 16, 8), False),
        ((32, 32), {"padding": 0}, (1, 8, 16, 8), False),
        ((32, 32), {"dilation": 2, "padding": 2}, (1, 8, 16, 8), False),
        ((32, 32), {"kernel_size": 5, "padding": 2}, (1, 8, 16, 8), False),
        ((32, 32), {"groups": 2}, (1, 8, 16, 8), False),
        ((32, 32), {"padding_mode": "replicate"}, (1, 8, 16, 8), False),
    ],
)
def test_winograds_algorithm_is_for_training_without_avx512_where_it_gains(channels, kind, shape, gains, monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "convolved", lambda *args: calls.append(args))
    convolution = placed(nn.Conv3d(*channels, **{"kernel_size": 3, "padding": 1, **kind}), CPU)
    x = torch.zeros(shape[0], channels[0], *shape[1:])
    for has_avx2_only in (True, False):
        monkeypatch.setattr(cpu_convolutions, "HAS_AVX2_ONLY", has_avx2_only)
        convolution(x)
        with torch.no_grad():
            convolution(x)
        with torch.autocast("cpu", torch.bfloat16):
            convolution(x)
    convolution.requires_grad_(False)
    convolution(x)
    assert len(calls) == int(gains)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
def test_small_batches_of_one_are_left_to_pytorchs_own_code_where_ours_are_not():
    # Once PyTorch chooses oneDNN by itself, CpuConv3d has nothing to halve any more.
    def chosen(x):
        return torch._C._select_conv_backend(
            x, torch.zeros(32, 32, 3, 3, 3), None, (1, 1, 1), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1, None
        ).name

    edge = SMALL // 32 // 10  # 10 × 64 × D
    assert chosen(torch.zeros(1, 32, 10, edge, 4)) == "Slow3d"
    assert chosen(torch.zeros(1, 32, 10, edge + 1, 4)) == chosen(torch.zeros(2, 32, 10, edge, 4)) == "Mkldnn"


def placed_conv():
    torch.manual_seed(0)
    return placed(nn.Sequential(nn.Conv3d(64, 64, 3, padding=1)), CPU)


def weight_gradient(network, x, autocast):
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = network(x)
    out.float().square().sum().backward()
    return network[0].weight.grad.clone()


def test_the_weight_gradient_at_2x2x2_under_autocast_is_that_of_float32():
    network = placed_conv()
    for trial in range(8):
        x = torch.randn((2, 64, 2, 2, 2), generator=torch.Generator().manual_seed(trial))
        assert torch.equal(weight_gradient(network, x, True), weight_gradient(network, x, False))


def test_an_input_as_thick_as_the_kernel_stays_in_bfloat16():
    network = placed_conv()
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.zeros(1, 64, 4, 4, 4)).dtype == torch.bfloat16


def test_the_discriminators_gradients_in_bfloat16_are_finite_where_its_layers_grow_thin():
    # 24 × 32 × 24 is 2 × 3 × 2 before the last layer, whose kernel is 4: where bfloat16's were uninitialised memory.
    torch.manual_seed(0)
    network = placed(discriminator(16, 3), CPU)
    for trial in range(8):
        real, fake = torch.rand((2, 2, 1, 24, 32, 24), generator=torch.Generator().manual_seed(trial))
        gradients = []
        for enabled in (True, False):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                scores = [network(image)[-1].float() for image in (real, fake)]
            discriminator_loss(*scores).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        assert gradients[0].isfinite().all()
        # 0.12 at most; nearly all unplaced ones are off by more than their own length, or not finite.
        assert (gradients[0] - gradients[1]).norm() < 0.2 * gradients[1].norm()


def test_placing_keeps_the_weights_and_their_names():
    plain = autoencoder()
    before = copy.deepcopy(plain.state_dict())
    after = placed(plain, CPU).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(type(module) is CpuConv3d for module in plain.modules() if isinstance(module, nn.Conv3d))
    assert not any(isinstance(module, CpuConv3d) for module in without_cpu_convolutions(plain).modules())


def test_a_placed_network_survives_deepcopy():
    network = placed(autoencoder(), CPU).eval()
    twin = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        x = torch.rand(1, 1, 8, 8, 8)
        assert torch.equal(twin.encode(x)[0], network.encode(x)[0])
    assert all(type(module) is CpuConv3d for module in twin.modules() if isinstance(module, nn.Conv3d))
    assert downsampling(twin) == 2
