"""Samplers, against an exact denoiser of a narrow Gaussian."""

from itertools import pairwise

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from latdiff3d.errors import InputError
from latdiff3d.objectives import Epsilon
from latdiff3d.samplers import CLEAN, alphas_cumprod, ddim, time_pairs

DATA_STD = 0.05
SCHEDULE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
ALPHAS_CUMPROD = alphas_cumprod(DDPMScheduler(1000, clip_sample=False, **SCHEDULE))


def exact_epsilon(z, t):
    """E[ε | z_t] for z_0 ~ N(0, DATA_STD²): z_t is N(0, ᾱ s² + 1 − ᾱ), and ε and z_t have covariance √(1 − ᾱ)."""
    alpha_bar = ALPHAS_CUMPROD[t].to(z)
    return (1 - alpha_bar).sqrt() / (alpha_bar * DATA_STD**2 + 1 - alpha_bar) * z


def split(z, t):
    return Epsilon().split(exact_epsilon(z, t), z, ALPHAS_CUMPROD[t].to(z))


def noise():
    return torch.randn((4000, 1, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_schedules_signal_falls_from_nearly_all_to_nearly_none():
    assert ALPHAS_CUMPROD.shape == (1000,)
    assert (ALPHAS_CUMPROD.diff() < 0).all()
    assert ALPHAS_CUMPROD[0].item() == pytest.approx(1 - SCHEDULE["beta_start"], abs=1e-6)
    assert ALPHAS_CUMPROD[-1] < 1e-3


@pytest.mark.parametrize(("num_steps", "expected"), [(5, 0.026), (10, 0.027), (25, 0.030)])
def test_ddim_with_explicit_times_ends_where_the_recursion_says(num_steps, expected):
    z = ddim(split, noise(), time_pairs(num_steps, 1000), ALPHAS_CUMPROD)
    assert z.std().item() == pytest.approx(expected, abs=0.002)


def test_ddim_follows_the_closed_form_of_each_step():
    # For Gaussian data each step multiplies z_t by a number: x_0 and ε are both proportional to z_t.
    times, factor = time_pairs(10, 1000), 1.0
    for t, t_next in times:
        now, after = ALPHAS_CUMPROD[t].item(), 1.0 if t_next == CLEAN else ALPHAS_CUMPROD[t_next].item()
        variance = now * DATA_STD**2 + 1 - now
        factor *= ((now * after) ** 0.5 * DATA_STD**2 + ((1 - now) * (1 - after)) ** 0.5) / variance
    assert torch.allclose(ddim(split, noise(), times, ALPHAS_CUMPROD), factor * noise(), rtol=1e-5)


def test_ddim_comes_closer_to_the_data_with_more_steps():
    stds = [ddim(split, noise(), time_pairs(n, 1000), ALPHAS_CUMPROD).std().item() for n in (5, 25, 100, 1000)]
    assert stds == sorted(stds) and stds[-1] < DATA_STD


def test_monais_respaced_ddim_is_off_at_5_steps():
    # Why ours exists: `set_timesteps` spaces by linspace, `step` still assumes t − T/n (monai 1.6.1).
    scheduler = DDIMScheduler(1000, clip_sample=False, **SCHEDULE)
    scheduler.set_timesteps(5)
    z = noise()
    for t in scheduler.timesteps:
        z, _ = scheduler.step(exact_epsilon(z, int(t)), int(t), z)
    ours = ddim(split, noise(), time_pairs(5, 1000), ALPHAS_CUMPROD)
    assert abs(z.std().item() - DATA_STD) > 3 * abs(ours.std().item() - DATA_STD)
    assert z.std().item() == pytest.approx(0.205, abs=0.03)


def test_ddim_with_a_perfect_denoiser_of_one_point_returns_it():
    point = torch.full((1, 1, 1, 1, 1), 0.3, dtype=torch.float64)

    def split_towards_it(z, t):
        alpha_bar = ALPHAS_CUMPROD[t].to(z)
        return point, (z - alpha_bar.sqrt() * point) / (1 - alpha_bar).sqrt()

    z = ddim(split_towards_it, noise()[:1], time_pairs(7, 1000), alpha_bars=ALPHAS_CUMPROD)
    assert torch.allclose(z, point)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 999, 1000])
def test_times_fall_strictly_from_the_noisiest_to_clean(num_steps):
    pairs = time_pairs(num_steps, 1000)
    assert len(pairs) == num_steps
    assert pairs[0][0] == 999 and pairs[-1][1] == CLEAN
    assert all(t > t_next for t, t_next in pairs)
    assert all(one[1] == other[0] for one, other in pairwise(pairs))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_other_step_counts_are_refused(num_steps):
    with pytest.raises(InputError, match=f"steps is {num_steps}; expected 1 to 1000"):
        time_pairs(num_steps, 1000)
