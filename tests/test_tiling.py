"""Windows that cover a volume, and their results blended into that of the whole."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latdiff3d.tiling import blended, blended_boxes, smallest_tile, tile_within, windows


def random_volume(*size, channels=2):
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def convolutions():
    """Three 3³ convolutions with zero padding: they see 3 voxels far."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 4, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv3d(4, 2, 3, padding=1)).requires_grad_(False)


def in_a_tuple(network):
    return lambda window: (network(window),)


# windows


def test_windows_are_spread_evenly_and_the_last_axis_is_the_fastest():
    boxes = [window.box for window in windows([8, 20, 9], [8, 8, 6], overlap=2)]
    assert all(box[0] == slice(0, 8) for box in boxes)
    assert sorted({(box[1].start, box[1].stop) for box in boxes}) == [(0, 8), (6, 14), (12, 20)]
    assert [(box[2].start, box[2].stop) for box in boxes[:2]] == [(0, 6), (3, 9)]


@pytest.mark.parametrize(("size", "tile", "overlap", "multiple"), [(36, 12, 4, 4), (44, 20, 16, 4), (23, 7, 5, 1)])
def test_windows_keep_their_overlap_their_size_and_their_multiple(size, tile, overlap, multiple):
    axis = [window.box[0] for window in windows([size, 4, 4], [tile, 4, 4], overlap, multiple)]
    assert axis[0].start == 0 and axis[-1].stop == size
    assert all(part.stop - part.start == tile and part.start % multiple == 0 for part in axis)
    assert all(left.stop - right.start >= overlap for left, right in itertools.pairwise(axis))


@pytest.mark.parametrize(
    ("tile", "overlap", "multiple"), [((8, 12, 8), 4, 4), ((12, 20, 24), 8, 4), ((5, 7, 24), 3, 1)]
)
def test_every_voxel_is_some_windows_own_and_no_others(tile, overlap, multiple):
    count = torch.zeros(16, 20, 24)
    for box, own in windows([16, 20, 24], tile, overlap, multiple):
        count[box][own] += 1
        inner = [(part, at, n) for part, at, n in zip(own, box, count.shape, strict=True)]
        assert all(part.start % multiple == 0 and part.stop % multiple == 0 for part, *_ in inner)
        # As deep as half the overlap, unless the volume ends there.
        assert all(part.start >= overlap // 2 // multiple * multiple or at.start == 0 for part, at, _ in inner)
    assert torch.equal(count, torch.ones_like(count))


# blended


@pytest.mark.parametrize(("tile", "overlap", "margin"), [((8, 8, 8), 4, 0), ((9, 12, 30), 8, 3), ((10, 10, 11), 8, 4)])
def test_weights_sum_to_one(tile, overlap, margin):
    ones = torch.ones(2, 1, 14, 20, 17)
    (result,) = blended(lambda window: (window,), ones, tile, overlap, margin)
    assert torch.allclose(result, ones, atol=1e-6)


def test_a_ramp_rises_linearly_between_the_margins():
    def number_of_the_window(window, calls=[]):  # noqa: B006
        calls.append(None)
        return (torch.full_like(window, len(calls) - 1),)

    (result,) = blended(number_of_the_window, torch.zeros(1, 1, 1, 1, 14), [1, 1, 10], overlap=6, margin=1)
    expected = [0.0] * 5 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 5
    assert torch.allclose(result.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("overlap", [6, 10])
def test_tiles_give_the_result_of_the_whole_volume_where_the_margin_is_as_wide_as_the_function_sees(
    convolutions, overlap
):
    volume = random_volume(24, 17, 13)
    (tiled,) = blended(in_a_tuple(convolutions), volume, [14, 11, 12], overlap, margin=3)
    assert torch.allclose(tiled, convolutions(volume), atol=1e-6)
    (narrow,) = blended(in_a_tuple(convolutions), volume, [14, 11, 12], overlap, margin=0)
    assert (narrow - convolutions(volume)).abs().max() > 1e-3  # zero padding counts in it


def test_results_may_have_a_coarser_or_a_finer_grid():
    torch.manual_seed(0)
    down, up = nn.Conv3d(2, 3, 4, stride=4).requires_grad_(False), nn.Conv3d(3, 2, 3, padding=1).requires_grad_(False)
    volume = random_volume(24, 16, 20)
    (latents,) = blended(in_a_tuple(down), volume, [12, 16, 12], 4, multiple=4, scale=Fraction(1, 4))
    assert latents.shape == (1, 3, 6, 4, 5)
    assert torch.allclose(latents, down(volume), atol=1e-6)

    def decode(window):
        return (up(F.interpolate(window, scale_factor=4)),)

    (image,) = blended(decode, latents, [4, 4, 3], overlap=2, margin=1, scale=4)
    assert torch.allclose(image, decode(latents)[0], atol=1e-6)


def test_moments_are_blended_and_nothing_is_drawn():
    def posterior(window):
        return window.mean(1, keepdim=True), torch.full_like(window[:, :1], 0.3)

    volume = random_volume(12, 12, 12)
    state = torch.get_rng_state()
    mean, std = blended(posterior, volume, [8, 8, 8], overlap=4)
    assert torch.allclose(mean, volume.mean(1, keepdim=True), atol=1e-6)
    assert torch.allclose(std, torch.full_like(std, 0.3), atol=1e-6)  # two draws would average to 0.3 / √2
    assert torch.equal(torch.get_rng_state(), state)


def test_where_three_windows_meet_weights_still_sum_to_one():
    axis = [slice(0, 8), slice(1, 9), slice(4, 12), slice(6, 14)]
    (result,) = blended_boxes(
        lambda box: (torch.ones(1, 1, 1, 1, 8),), [[slice(0, 1)]] * 2 + [axis], torch.device("cpu")
    )
    assert torch.allclose(result, torch.ones(1, 1, 1, 1, 14), atol=1e-6)


# tile_within


def test_the_tile_with_the_fewest_voxels_in_all_is_chosen():
    assert tile_within(24 * 24 * 24, [24, 24, 24], overlap=4) == (24, 24, 24)
    # Cutting one axis in two costs 4 planes, cutting two axes costs more.
    assert sorted(tile_within(24 * 24 * 14, [24, 24, 24], overlap=4)) == [14, 24, 24]
    assert tile_within(100 * 8 * 8, [200, 8, 8], overlap=16, multiple=8)[0] in (96, 80)


def test_a_chosen_tile_is_never_larger_than_allowed_nor_missing_where_the_smallest_fits():
    size, overlap, multiple = [48, 56, 44], 8, 4
    smallest = smallest_tile(size, overlap, multiple)
    assert smallest == (12, 12, 12)
    assert tile_within(math.prod(smallest) - 1, size, overlap, multiple) is None
    for max_voxels in (12**3, 5000, 20000, 48 * 56 * 44 - 1):
        tile = tile_within(max_voxels, size, overlap, multiple)
        assert math.prod(tile) <= max_voxels and not any(n % multiple for n in tile)
        assert windows(size, tile, overlap, multiple)


def test_a_volume_smaller_than_the_overlap_is_one_tile():
    assert smallest_tile([8, 8, 8], overlap=16) == (8, 8, 8)
    assert tile_within(511, [8, 8, 8], overlap=16) is None
