"""Latents larger than a denoiser's window: what it predicts of windows, blended, is what it would of the whole."""

import itertools

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from latdiff3d.conditioning import Condition
from latdiff3d.latent_windows import OVERLAP, LatentWindows
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.objectives import VPrediction
from latdiff3d.samplers import SAMPLERS

SIZE, WINDOW = (12, 20, 17), (8, 8, 8)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pointwise(noisy, condition):
    return noisy**2 + 3 * condition.grid - condition.covariates.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("overlap", [0.0, OVERLAP, 0.5, 0.8])
def test_what_a_denoiser_says_of_each_place_alone_is_what_it_says_of_the_whole(overlap):
    noisy = drawn(2, 3, *SIZE)
    condition = Condition(torch.rand(2, 1, *SIZE), torch.tensor([[1.0], [2.0]]))
    windows = LatentWindows(SIZE, WINDOW, overlap)
    assert torch.allclose(windows.prediction(pointwise, noisy, condition), pointwise(noisy, condition), atol=1e-5)


def test_where_windows_disagree_the_prediction_goes_over_from_one_to_the_next():
    seen = []

    def number_of_the_window(noisy, condition):
        seen.append(tuple(noisy.shape[2:]))
        return torch.full_like(noisy, float(len(seen)))

    windows = LatentWindows((8, 8, 14), WINDOW)
    made = windows.prediction(number_of_the_window, drawn(1, 1, 8, 8, 14), Condition())[0, 0, 4, 4]
    assert seen == [WINDOW, WINDOW]
    assert made.tolist() == pytest.approx([1] * 6 + [1.25, 1.75] + [2] * 6)


def test_windows_of_one_size_cover_all_and_overlap():
    for length, edge, axis in zip(SIZE, WINDOW, LatentWindows(SIZE, WINDOW).per_axis, strict=True):
        assert axis[0].start == 0 and axis[-1].stop == length
        assert all(part.stop - part.start == edge for part in axis)
        assert all(left.stop - right.start >= OVERLAP * edge for left, right in itertools.pairwise(axis))


def test_the_windows_are_counted():
    windows, counted = LatentWindows(SIZE, WINDOW), []
    windows.prediction(lambda noisy, _: noisy, drawn(1, 1, *SIZE), Condition(), lambda: counted.append(1))
    assert len(counted) == windows.number == 2 * 3 * 3


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddim", 60), ("ddpm", 250), ("dpm_solver++", 60)])
def test_the_whole_has_the_right_spread_everywhere_borders_included(sampler, num_steps):
    """Latents are independent and normal, of mean 1 and std 0.5; the denoiser is exact, so must the samples be."""
    mean, std = 1.0, 0.5
    schedule, objective = schedule_of(DDPMScheduler(1000, clip_sample=False)), VPrediction()
    windows = LatentWindows((14, 14, 14), WINDOW)

    def split(z, t):
        alpha, sigma = (level.float() for level in schedule.alpha_sigma(torch.tensor(t)))

        def exact(noisy, _):
            gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            z_0 = mean + gain * (noisy - alpha * mean)  # the posterior's mean
            epsilon = (noisy - alpha * z_0) / sigma
            return alpha * epsilon - sigma * z_0

        return objective.split(windows.prediction(exact, z, Condition()), z, alpha, sigma)

    generators = [torch.Generator().manual_seed(0)]
    noise = torch.randn(1, 64, 14, 14, 14, generator=generators[0])
    times = schedule.times(num_steps, "linear")
    made = SAMPLERS[sampler](split, noise, times, schedule, generators=generators)
    # Over channels and two axes, for each plane along the third: windows begin and end on many of them.
    for dim in (2, 3, 4):
        others = [axis for axis in range(5) if axis != dim]
        assert (made.mean(others) - mean).abs().max() < 0.03
        assert (made.std(others) / std - 1).abs().max() < 0.06
    assert (made[..., 6:8].std() / made[..., :4].std() - 1).abs() < 0.02
