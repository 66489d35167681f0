"""GroupNorms whose statistics are the whole volume's while the network is given windows."""

import copy

import pytest
import torch
from torch import nn

from latdiff3d.norms import cut, whole_volume_norms
from latdiff3d.tiling import blended, windows

SIZE, TILE, OVERLAP = (12, 10, 24), (12, 10, 14), 8


@pytest.fixture
def network():
    """Three convolutions, each before a GroupNorm; what comes out depends on windows 3 voxels around, and on all."""
    torch.manual_seed(0)
    layers = [layer for n in (2, 4, 4) for layer in (nn.Conv3d(n, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())]
    for layer in layers[1::3]:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture
def volume():
    """Two volumes as different as background and brain, each with a dark and a bright end."""
    noise = torch.rand(2, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0, 1, SIZE[2]) ** 4 * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1, 1)


def parts_of(volume, tile=TILE, overlap=OVERLAP):
    return [(cut(volume, window.box), window.own) for window in windows(volume.shape[2:], tile, overlap)]


def largest_difference(one, other):
    return (one - other).abs().max().item()


def test_tiles_with_the_whole_volumes_statistics_are_the_whole_volumes_result(network, volume):
    def function(window):
        return (network(window),)

    (own_norms,) = blended(function, volume, TILE, OVERLAP, margin=4)
    with whole_volume_norms(network, function, parts_of(volume)) as normed:
        (tiled,) = blended(normed, volume, TILE, OVERLAP, margin=4)
    assert largest_difference(tiled, network(volume)) < 1e-5
    assert largest_difference(own_norms, network(volume)) > 0.1


def test_no_voxel_is_counted_twice(network, volume):
    def first_norm(window):
        return (network[:2](window),)

    with whole_volume_norms(network, first_norm, parts_of(volume, (5, 4, 7), 3)) as normed:
        (result,) = normed(volume)
    assert largest_difference(result, network[:2](volume)) < 1e-5


def test_layers_that_the_function_leaves_out_or_runs_twice_have_the_right_statistics(network, volume):
    def function(window):
        return (network[:2](network[3:6](network[:3](window))[:, :2]),)

    with whole_volume_norms(network, function, parts_of(volume)) as normed:
        (tiled,) = blended(normed, volume, TILE, OVERLAP, margin=4)
    assert largest_difference(tiled, function(volume)[0]) < 1e-5


def test_a_coarser_grid_inside_the_network_counts_each_place_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.Conv3d(4, 2, 2, stride=2))
    volume = torch.rand(1, 2, 8, 8, 24) * torch.linspace(0, 1, 24)
    parts = [(cut(volume, box), own) for box, own in windows([8, 8, 24], [8, 8, 16], 8, 4)]
    with torch.no_grad():
        expected = network(volume)
        with whole_volume_norms(network, lambda window: (network(window),), parts) as normed:
            (result,) = normed(volume)
    assert largest_difference(result, expected) < 1e-5


def test_a_network_without_groupnorms_is_run_once_to_find_out(volume):
    calls = []

    def function(window):
        calls.append(window)
        return (window,)

    with whole_volume_norms(nn.Identity(), function, parts_of(volume)) as normed:
        assert torch.equal(normed(volume)[0], volume)
    assert len(calls) == 2


@pytest.mark.parametrize("affine", [True, False])
def test_bf16_stays_bf16(volume, affine):
    network = nn.Sequential(nn.Conv3d(2, 4, 1), nn.GroupNorm(2, 4, affine=affine))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(volume)
        with whole_volume_norms(network, lambda window: (network(window),), parts_of(volume)) as normed:
            (result,) = normed(volume)
    assert result.dtype == expected.dtype == torch.bfloat16
    assert largest_difference(result.float(), expected.float()) < 0.05


def test_the_network_is_itself_again_afterwards_and_after_an_error(network, volume):
    before, expected = copy.deepcopy(network.state_dict()), network(volume)

    def fails(window):
        raise RuntimeError("no")

    with whole_volume_norms(network, lambda window: (network(window),), parts_of(volume)):
        assert "forward" in vars(network[1])
    with pytest.raises(RuntimeError, match="no"), whole_volume_norms(network, fails, parts_of(volume)):
        pass
    assert torch.equal(network(volume), expected)
    assert not any("forward" in vars(layer) for layer in network)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
