"""Volumes compared at their best shift: against the definition, on the voxels that both own."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from latdiff3d.nearest import MIN_OVERLAP, ShiftedCorrelation, StandardisedDistance, View, coarse, moved


def view(seed, shape=(1, 12, 14, 10), smooth=1.5):
    """A smooth random volume, all of it its own."""
    noise = np.random.default_rng(seed).normal(size=shape)
    values = ndimage.gaussian_filter(noise, (0, smooth, smooth, smooth))
    return View(torch.tensor(values / values.std(), dtype=torch.float32), torch.ones(1, *shape[1:]))


def by_definition(one, other, shift):
    """The correlation of `one`, moved by `shift`, with `other`, from the sums over the voxels that both own."""
    values, own = moved(one.values, shift), moved(one.own, shift)
    both = ((own > 0) & (other.own > 0))[0]
    if both.sum() < MIN_OVERLAP * min(one.own.sum(), other.own.sum()):
        return -1.0
    a, b = values[:, both].double(), other.values[:, both].double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def test_the_best_correlation_is_that_of_its_definition_and_so_is_its_shift():
    generator = torch.Generator().manual_seed(0)
    views = [view(seed, (2, 5, 6, 4), smooth=0.7) for seed in range(4)]
    views = [v._replace(own=(torch.rand(v.own.shape, generator=generator) > 0.2).float()) for v in views]
    query, references = views[0], views[1:]
    found = ShiftedCorrelation(references, reach=2)(query)
    for number, reference in enumerate(references):
        shifts = list(itertools.product(range(-2, 3), repeat=3))
        r = [by_definition(query, reference, shift) for shift in shifts]
        assert found.apart[number].item() == pytest.approx((2 - 2 * max(r)) ** 0.5, abs=1e-3)
        assert tuple(found.shift[number].tolist()) == shifts[int(np.argmax(r))]


def test_a_copy_that_is_shifted_and_has_other_intensities_is_0_apart():
    original = view(0)
    copy = View(moved(3 - 0.5 * -original.values, (-2, 1, 2)), moved(original.own, (-2, 1, 2)))
    found = ShiftedCorrelation([view(1), original], reach=2)(copy)
    assert found.apart[1].item() < 0.01 and found.apart[0].item() > 0.5
    assert found.shift[1].tolist() == [2, -1, -2]


def test_shifts_do_not_go_round_and_not_beyond_the_reach():
    original = view(0)
    rolled = original._replace(values=torch.roll(original.values, 5, dims=1))
    beyond = View(moved(original.values, (4, 0, 0)), moved(original.own, (4, 0, 0)))
    compared = ShiftedCorrelation([original], reach=2)
    assert compared(rolled).apart.item() > 0.5 and compared(beyond).apart.item() > 0.5
    assert ShiftedCorrelation([original], reach=4)(beyond).apart.item() < 0.01


def test_what_is_not_a_volumes_own_does_not_count():
    original = view(0)
    own = original.own.clone()
    own[:, 8:] = 0
    spoilt = View(torch.where(own > 0, original.values, torch.tensor(50.0)), own)
    assert ShiftedCorrelation([original], reach=1)(spoilt).apart.item() < 0.01


def test_a_flat_volume_has_nothing_in_common_with_any():
    flat = view(0)._replace(values=torch.full((1, 12, 14, 10), 0.7))
    assert ShiftedCorrelation([view(1)], reach=1)(flat).apart.item() == pytest.approx(2**0.5, abs=1e-3)


def test_volumes_on_other_grids_are_refused():
    with pytest.raises(ValueError, match="all on one grid"):
        ShiftedCorrelation([view(0), view(1, (1, 8, 8, 8))], reach=1)
    with pytest.raises(ValueError, match="references of"):
        ShiftedCorrelation([view(0)], reach=1)(view(1, (1, 8, 8, 8)))


def test_features_are_compared_in_units_of_their_spread():
    rows = [[0.0, 0.0, 5.0], [2.0, 200.0, 5.0], [4.0, 100.0, 5.0]]  # spreads 2, 100 and none
    views = [View(torch.tensor(row).view(3, 1, 1, 1), torch.ones(1, 1, 1, 1)) for row in rows]
    found = StandardisedDistance(views)(views[0])
    assert found.apart.tolist() == pytest.approx([0, 5**0.5, 5**0.5])
    assert found.shift.tolist() == [[0, 0, 0]] * 3


def test_cubes_hold_the_means_of_what_counts_in_them():
    values = torch.arange(8.0).view(1, 2, 2, 2).repeat(1, 32, 1, 1)  # (1, 64, 2, 2)
    own = torch.ones_like(values)
    own[:, 1, :, 1] = 0  # a quarter of the first cube
    own[:, 2:4] = 0
    found, cell = coarse(View(values, own))
    assert cell == 2 and found.values.shape == (1, 32, 1, 1)
    assert found.values[0, 0].item() == pytest.approx((0 + 1 + 2 + 3 + 4 + 6) / 6)
    assert (found.own[0, 1].item(), found.values[0, 1].item()) == (0, 0)
    assert found.values[0, 2].item() == pytest.approx(3.5)


def test_a_volume_moves_by_whole_voxels_and_nothing_comes_in():
    volume = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    assert moved(volume, (1, 0, 0)).flatten().tolist() == [0, 1, 2, 3]
    assert moved(volume, (-2, 0, 0)).flatten().tolist() == [3, 4, 0, 0]
    assert volume.flatten().tolist() == [1, 2, 3, 4]
