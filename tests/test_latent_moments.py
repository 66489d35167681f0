"""Moments of latents whose answers are known beforehand."""

import math

import pytest
import torch

from latdiff3d.latent_moments import LatentMoments


def moments_of(mean, std, num_batches=1):
    moments = LatentMoments(mean.shape[1])
    for m, s in zip(mean.chunk(num_batches), std.chunk(num_batches), strict=True):
        moments.update(m, s)
    return moments.channels()


@pytest.fixture
def normals():
    return torch.randn(4, 2, 24, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_normal_has_0_1_and_no_excess_kurtosis(normals):
    scaled = normals * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1) + torch.tensor([0.0, 3.0]).view(1, 2, 1, 1, 1)
    first, second = moments_of(scaled, torch.zeros_like(scaled), num_batches=2)
    assert (first.mean, first.std, first.excess_kurtosis) == pytest.approx((0, 1, 0), abs=0.06)
    assert (second.mean, second.std, second.excess_kurtosis) == pytest.approx((3, 2, 0), abs=0.06)
    assert first.noise_share == 0


def test_two_values_have_an_excess_kurtosis_of_minus_2_and_a_rare_one_of_many():
    cells = torch.zeros(1, 2, 10, 10, 10)
    cells[:, 0, :5] = 1.0
    cells[:, 1, 0, 0] = 1.0  # in a share p of 1 %: 1/(p (1 − p)) − 6
    even, rare = moments_of(cells, torch.zeros_like(cells))
    assert even.excess_kurtosis == pytest.approx(-2)
    assert rare.excess_kurtosis == pytest.approx(1 / (0.01 * 0.99) - 6)


def test_the_posteriors_width_counts_as_if_it_were_drawn(normals):
    std = 0.2 + torch.rand(normals.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = normals**3 + 1
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for exact, sampled in zip(moments_of(mean, std), moments_of(drawn, torch.zeros_like(drawn)), strict=True):
        assert (exact.mean, exact.std) == pytest.approx((sampled.mean, sampled.std), rel=0.02)
        assert exact.excess_kurtosis == pytest.approx(sampled.excess_kurtosis, rel=0.05)


def test_a_channel_of_the_posteriors_width_alone_is_all_noise(normals):
    silent, half = torch.zeros_like(normals), torch.ones_like(normals)
    collapsed = moments_of(silent, half)[0]
    assert (collapsed.std, collapsed.excess_kurtosis, collapsed.noise_share) == pytest.approx((1, 0, 1))
    assert moments_of(normals, half)[0].noise_share == pytest.approx(0.5, abs=0.02)


def test_a_constant_channel_has_no_kurtosis():
    constant = moments_of(torch.ones(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))[0]
    assert constant.std == 0 and math.isnan(constant.excess_kurtosis)


def test_no_latents_have_no_moments():
    with pytest.raises(ValueError, match="no latents"):
        LatentMoments(2).channels()
