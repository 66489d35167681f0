"""A function of a whole volume in the memory there is: at once, or by tiles that change nothing."""

import math
import re
import warnings

import pytest
import torch
from monai.networks.nets import AutoencoderKL
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.memory import FARTHEST, PROGRAM_GB, gigabytes, left_of, peak_bytes, sees, tiles_within, within_memory

CPU = torch.device("cpu")


def volume_of(*size, channels=1):
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))


class Recorded:
    """A function that remembers the sizes of the windows it was given."""

    def __init__(self, network):
        self.network = network
        self.sizes = []

    def __call__(self, window):
        self.sizes.append(tuple(window.shape[2:]))
        with torch.no_grad():
            return (self.network(window),)


@pytest.fixture
def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv3d(8, 1, 3, padding=1))


# peak_bytes


def test_the_peak_holds_what_is_freed_later_and_not_what_was_there_before():
    there = torch.zeros(10**6)

    def call():
        large = there + 1
        small = large[:1000] * 2
        del large
        return torch.cat([small, small])

    assert 4e6 <= peak_bytes(call, CPU) < 4.1e6


def test_scratch_space_inside_an_operator_counts():
    layer = nn.Conv3d(8, 8, 3, padding=1).requires_grad_(False)
    volume = torch.zeros(1, 8, 32, 32, 32)
    assert peak_bytes(lambda: layer(volume), CPU) >= volume.nbytes


def test_measuring_prints_nothing(capfd):
    peak_bytes(lambda: torch.zeros(10), CPU)
    assert capfd.readouterr() == ("", "")


# sees


@pytest.mark.parametrize("num_layers", [1, 3])
def test_how_far_a_network_sees_is_measured(num_layers):
    torch.manual_seed(0)
    layers = [layer for _ in range(num_layers) for layer in (nn.GroupNorm(1, 1), nn.Conv3d(1, 1, 3, padding=1))]
    network = nn.Sequential(*layers)
    assert sees(network, Recorded(network), volume_of(8, 8, 8)) == num_layers
    assert sees(network, Recorded(network), volume_of(8, 8, 8), multiple=2) == 2 * math.ceil(num_layers / 2)


def test_a_network_that_sees_everything_sees_as_far_as_is_looked():
    network = nn.Identity()
    assert sees(network, lambda window: (window + window.mean(),), volume_of(8, 8, 8)) == FARTHEST


# within_memory


def test_a_volume_that_fits_is_run_at_once(convolutions):
    function, volume = Recorded(convolutions), volume_of(16, 16, 30)
    (result,) = within_memory(convolutions, function, volume, memory_gb=1)
    assert function.sizes[-1] == (16, 16, 30)
    assert torch.equal(result, Recorded(convolutions)(volume)[0])


def test_less_memory_gives_smaller_tiles_and_the_same_result(convolutions):
    volume = volume_of(24, 24, 24)
    (expected,) = Recorded(convolutions)(volume)
    at_once = peak_bytes(lambda: Recorded(convolutions)(volume), CPU) / 1e9
    largest = []
    for share in (0.8, 0.5):
        function = Recorded(convolutions)
        (result,) = within_memory(convolutions, function, volume, share * at_once)
        assert torch.allclose(result, expected, atol=1e-6)
        largest.append(math.prod(function.sizes[-1]))
    assert largest[1] < largest[0] < 24**3


def test_the_memory_given_is_kept_to(convolutions):
    volume = volume_of(24, 24, 48)
    at_once = peak_bytes(lambda: Recorded(convolutions)(volume), CPU)
    allowed = 0.5 * at_once
    # Measured from outside, over the last window's pass and the blending: the measurement does not nest.
    function = Recorded(convolutions)
    within_memory(convolutions, function, volume, allowed / 1e9)
    tile = torch.zeros(1, 1, *function.sizes[-1])
    assert peak_bytes(lambda: Recorded(convolutions)(tile), CPU) + volume.nbytes <= allowed


def test_the_tiles_are_known_before_without_a_volume(convolutions):
    volume = volume_of(24, 24, 48)
    at_once = peak_bytes(lambda: Recorded(convolutions)(volume), CPU) / 1e9
    of_its_size = torch.zeros(1, 1, 1, 1, 1).expand(1, 1, 24, 24, 48)
    assert tiles_within(convolutions, Recorded(convolutions), of_its_size, 2 * at_once) is None
    tiles = tiles_within(convolutions, Recorded(convolutions), of_its_size, 0.5 * at_once)
    function = Recorded(convolutions)
    within_memory(convolutions, function, volume, 0.5 * at_once)
    assert function.sizes[-1] == tiles.tile and tiles.overlap == 2 * tiles.margin


def test_what_is_held_already_counts_in(convolutions):
    volume = volume_of(24, 24, 24)
    at_once = peak_bytes(lambda: Recorded(convolutions)(volume), CPU)
    function = Recorded(convolutions)
    within_memory(convolutions, function, volume, 1.5 * at_once / 1e9)
    assert function.sizes[-1] == (24, 24, 24)
    within_memory(convolutions, function, volume, 1.5 * at_once / 1e9, held_bytes=at_once)
    assert function.sizes[-1] != (24, 24, 24)


def test_too_little_memory_is_told_how_much_is_needed(convolutions):
    wide = nn.Sequential(nn.Conv3d(1, 64, 3, padding=1), nn.Conv3d(64, 1, 3, padding=1))
    with pytest.raises(InputError, match=r"memory_gb is 0.001; .* need 0\.\d+\. Give at least that") as error:
        within_memory(wide, Recorded(wide), volume_of(24, 24, 24), memory_gb=0.001)
    needed = float(re.search(r"need ([\d.]+)\.", str(error.value)).group(1))
    function = Recorded(wide)
    within_memory(wide, function, volume_of(24, 24, 24), memory_gb=needed)
    assert function.sizes[-1] != (24, 24, 24)


def test_an_autoencoders_seams_are_no_worse_than_the_rest():
    torch.manual_seed(0)
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        channels=(4, 4),
        num_res_blocks=1,
        norm_num_groups=2,
        attention_levels=(False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).requires_grad_(False)
    latents = torch.randn(1, 2, 8, 8, 40, generator=torch.Generator().manual_seed(0))
    latents = latents * torch.linspace(0, 3, 40)  # statistics differ from tile to tile
    sizes = []

    def decode(window):
        sizes.append(window.shape[2:])
        return (network.decode(window),)

    (whole,) = decode(latents)
    at_once = peak_bytes(lambda: decode(latents), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tiled,) = within_memory(network, decode, latents, 0.9 * at_once / 1e9, scale=2)
    assert sizes[-1][2] < 40
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_a_network_with_attention_is_told_to_be_approximated():
    network = nn.Identity()
    volume = volume_of(10, 10, 200)

    def function(window):
        return (window.repeat(1, 64, 1, 1, 1).mean(1, keepdim=True) + window.mean(),)

    at_once = peak_bytes(lambda: function(volume), CPU)
    with pytest.warns(UserWarning, match="sees farther"):
        (result,) = within_memory(network, function, volume, 0.7 * at_once / 1e9)
    assert (result - function(volume)[0]).abs().max() < 0.1


def test_what_is_left_of_a_budget_is_counted():
    network = nn.Linear(1000, 1000)  # 4.004 MB
    left = left_of(6, CPU, [network, network], held_bytes=2_000_000, volume_bytes=100_000_000)
    assert left == pytest.approx(6 - PROGRAM_GB - 0.010008)
    assert left_of(1, torch.device("cuda"), [network], 0, 100_000_000) == pytest.approx(1 - 0.004004)
    with pytest.raises(InputError, match=r"memory is 1 GB; the program, the model and this volume need 1\.5"):
        left_of(1, CPU, [network], held_bytes=0, volume_bytes=100_000_000)


@pytest.mark.parametrize(("text", "expected"), [("6", 6), ("6GB", 6), ("0.5 gb", 0.5)])
def test_memory_is_read_in_gb(text, expected):
    assert gigabytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "6MB", "nan", "six"])
def test_memory_of_anything_else_is_refused(text):
    with pytest.raises(InputError, match=f"memory is '{text}'; expected GB above 0"):
        gigabytes(text)
