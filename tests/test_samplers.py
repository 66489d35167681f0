"""Samplers against exact denoisers: of a Gaussian, of two modes, and of one point."""

import math
from itertools import pairwise

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp_2m, euler, heun, sampler_for, spacing_for

SETTINGS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
DIFFUSION = schedule_of(DDPMScheduler(1000, clip_sample=False, **SETTINGS))
FLOW = schedule_of(RFlowScheduler(1000))
NARROW = 0.05
MODES, MODE_STD = 1.0, 0.1


def noise(count=4000, seed=0):
    return torch.randn((count, 1, 1, 1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_volume(numbers):
    """The same as one volume, for which one generator draws."""
    return numbers.view(1, -1, 1, 1, 1)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def gaussian(schedule, std=NARROW, mean=0.0):
    """(E[z_0 | z_t], E[ε | z_t]) for z_0 ~ N(mean, std²)."""

    def split(z, t):
        alpha, sigma = (level.item() for level in schedule.alpha_sigma(torch.tensor(float(t))))
        z_0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)
        return z_0, (z - alpha * z_0) / sigma

    return split


def two_modes(schedule):
    """The same for z_0 from N(−1, 0.1²) or N(1, 0.1²), with probability ½ each."""

    def split(z, t):
        alpha, sigma = (level.item() for level in schedule.alpha_sigma(torch.tensor(float(t))))
        variance = alpha**2 * MODE_STD**2 + sigma**2
        upper = torch.sigmoid(2 * alpha * MODES * z / variance)
        z_0 = (2 * upper - 1) * MODES * (1 - alpha**2 * MODE_STD**2 / variance) + alpha * MODE_STD**2 / variance * z
        return z_0, (z - alpha * z_0) / sigma

    return split


def of_gaussian(sampler, schedule, num_steps, spacing="linear", **changes):
    split = gaussian(schedule, **changes)
    return sampler(split, one_volume(noise()), schedule.times(num_steps, spacing), schedule, generators=generators(1))


# DDIM


@pytest.mark.parametrize(("num_steps", "expected"), [(5, 0.026), (10, 0.027), (25, 0.030)])
def test_ddim_with_explicit_times_ends_where_the_recursion_says(num_steps, expected):
    assert of_gaussian(ddim, DIFFUSION, num_steps).std().item() == pytest.approx(expected, abs=0.002)


def test_ddim_follows_the_closed_form_of_each_step():
    # For Gaussian data each step multiplies z_t by a number: z_0 and ε are both proportional to z_t.
    times, factor = DIFFUSION.times(10), 1.0
    for t, t_next in pairwise(times):
        (alpha, sigma), (alpha_next, sigma_next) = (DIFFUSION.alpha_sigma(torch.tensor(time)) for time in (t, t_next))
        variance = alpha**2 * NARROW**2 + sigma**2
        factor *= ((alpha * alpha_next * NARROW**2 + sigma * sigma_next) / variance).item()
    made = ddim(gaussian(DIFFUSION), noise(), times, DIFFUSION)
    assert torch.allclose(made, factor * noise(), rtol=1e-5)


def test_monais_respaced_ddim_is_off_at_5_steps():
    # Why ours exists: `set_timesteps` spaces by linspace, `step` still assumes t − T/n (monai 1.6.1).
    scheduler = DDIMScheduler(1000, clip_sample=False, **SETTINGS)
    scheduler.set_timesteps(5)
    z, split = noise(), gaussian(DIFFUSION)
    for t in scheduler.timesteps:
        z, _ = scheduler.step(split(z, int(t))[1], int(t), z)
    ours = of_gaussian(ddim, DIFFUSION, 5)
    assert abs(z.std().item() - NARROW) > 3 * abs(ours.std().item() - NARROW)
    assert z.std().item() == pytest.approx(0.205, abs=0.03)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_another_eta_is_refused(eta):
    with pytest.raises(InputError, match=f"eta is {eta}; expected 0, deterministic, to 1"):
        ddim(gaussian(DIFFUSION), noise(1), DIFFUSION.times(2), DIFFUSION, eta=eta)


# DDPM


def test_ddpm_on_all_times_draws_the_data():
    made = of_gaussian(ddpm, DIFFUSION, 1000, std=0.5, mean=0.3)
    assert made.mean().item() == pytest.approx(0.3, abs=0.03) and made.std().item() == pytest.approx(0.5, abs=0.02)


def test_ddpm_on_all_times_steps_as_monais():
    scheduler = DDPMScheduler(1000, clip_sample=False, **SETTINGS)
    split, times = gaussian(DIFFUSION), [600.0, 599.0]
    z = noise(1)
    drawn = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    theirs, _ = scheduler.step(split(z, 600)[1], 600, z, generator=torch.Generator().manual_seed(0))
    fresh = (scheduler._get_variance(600) ** 0.5).item()
    theirs_without = theirs - fresh * torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    ours = ddpm(split, z, times, DIFFUSION, generators=generators(1))
    assert torch.allclose(ours, theirs_without + fresh * drawn, atol=1e-4)


@pytest.mark.parametrize(("schedule", "times"), [(DIFFUSION, [700.0, 400.0]), (FLOW, [500.0, 400.0])])
def test_ddpm_draws_from_the_posterior_for_diffusion_and_flow(schedule, times):
    # By Bayes' rule from q(z_t' | z_0) and q(z_t | z_t'), which make q(z_t | z_0): precisions add up.
    z, z_0 = 0.8, 0.3
    (alpha, sigma), (alpha_next, sigma_next) = (schedule.alpha_sigma(torch.tensor(time)) for time in times)
    ratio = alpha / alpha_next
    noise_between = sigma**2 - (ratio * sigma_next) ** 2
    variance = 1 / (1 / sigma_next**2 + ratio**2 / noise_between)
    mean = variance * (alpha_next * z_0 / sigma_next**2 + ratio * z / noise_between)
    start = torch.full((1, 1, 30, 30, 30), z, dtype=torch.float64)
    made = ddpm(lambda z, t: (z_0, (z - alpha * z_0) / sigma), start, times, schedule, generators=generators(1))
    assert made.mean().item() == pytest.approx(mean.item(), abs=0.01)
    assert made.std().item() == pytest.approx(variance.sqrt().item(), rel=0.02)


def test_monais_ddpm_takes_each_of_few_steps_for_one_of_a_thousand():
    scheduler = DDPMScheduler(1000, clip_sample=False, **SETTINGS)
    scheduler.set_timesteps(50)
    z, split = noise(), gaussian(DIFFUSION, std=0.5, mean=0.3)
    for t in scheduler.timesteps:
        z, _ = scheduler.step(split(z, int(t))[1], int(t), z, generator=torch.Generator().manual_seed(int(t)))
    ours = of_gaussian(ddpm, DIFFUSION, 50, std=0.5, mean=0.3)
    assert z.std() > 0.9 and z.mean() < 0.1  # hardly denoised
    assert ours.std().item() == pytest.approx(0.5, abs=0.09) and ours.mean().item() == pytest.approx(0.3, abs=0.03)


def test_a_volume_depends_on_its_own_generator_whatever_the_batch():
    split, times = gaussian(DIFFUSION), DIFFUSION.times(5)
    together = ddpm(split, noise(3), times, DIFFUSION, generators=generators(3))
    alone = ddpm(split, noise(3)[1:2], times, DIFFUSION, generators=generators(3)[1:2])
    assert torch.equal(together[1:2], alone)


def test_random_samplers_want_a_generator_each():
    with pytest.raises(InputError, match="3 volumes have 1 generators; expected one each"):
        ddpm(gaussian(DIFFUSION), noise(3), DIFFUSION.times(5), DIFFUSION, generators=generators(1))


# Orders of convergence


def errors(sampler, schedule, split, counts, spacing):
    """Largest distance from where many steps end, for each number of steps."""
    start = noise(200)
    exact = heun if schedule is FLOW else dpm_solver_pp_2m
    reference = exact(split, start, schedule.times(1000, spacing), schedule)
    ends = [sampler(split, start, schedule.times(count, spacing), schedule) for count in counts]
    return [(end - reference).abs().max().item() for end in ends]


@pytest.mark.parametrize(
    ("sampler", "schedule", "spacing", "order"),
    [
        (ddim, DIFFUSION, "log_snr", 1),
        (dpm_solver_pp_2m, DIFFUSION, "log_snr", 2),
        (euler, FLOW, "linear", 1),
        (heun, FLOW, "linear", 2),
    ],
)
def test_errors_fall_by_the_published_order(sampler, schedule, spacing, order):
    counts = (40, 80)
    one, other = errors(sampler, schedule, gaussian(schedule, std=0.5, mean=0.3), counts, spacing)
    assert math.log(one / other) / math.log(counts[1] / counts[0]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(
    ("name", "within"), [("ddim", 0.03), ("ddpm", 0.08), ("dpm_solver++", 0.002), ("euler", 0.02), ("heun", 0.001)]
)
def test_mean_and_std_come_nearer_to_the_datas_at_5_10_25_and_50_steps(name, within):
    schedule = FLOW if name in ("euler", "heun") else DIFFUSION
    spacing = "log_snr" if name in ("ddim", "dpm_solver++") else "linear"
    start = noise()
    start = one_volume((start - start.mean()) / start.std())
    off = []
    for num_steps in (5, 10, 25, 50):
        split, times = gaussian(schedule, std=0.5, mean=0.3), schedule.times(num_steps, spacing)
        made = SAMPLERS[name](split, start, times, schedule, generators=generators(1))
        assert made.mean().item() == pytest.approx(0.3, abs=0.03 if name == "ddpm" else 0.002)
        off.append(abs(made.std().item() - 0.5))
    assert off == sorted(off, reverse=True) and off[-1] < within


@pytest.mark.parametrize(("quick", "slow", "schedule"), [(dpm_solver_pp_2m, ddim, DIFFUSION), (heun, euler, FLOW)])
def test_the_second_order_is_worth_it_in_a_dozen_calls(quick, slow, schedule):
    calls = 12
    steps = calls // 2 if quick is heun else calls
    split, spacing = gaussian(schedule, std=0.5, mean=0.3), "linear" if schedule is FLOW else "log_snr"
    [ours], [theirs] = errors(quick, schedule, split, [steps], spacing), errors(slow, schedule, split, [calls], spacing)
    assert ours < 0.5 * theirs


def test_dpm_solver_wants_steps_of_its_own_spacing_for_diffusion():
    own, even = spacing_for("dpm_solver++", DIFFUSION), spacing_for("ddim", DIFFUSION)
    ends = [of_gaussian(dpm_solver_pp_2m, DIFFUSION, 12, spacing, std=0.5) for spacing in (own, even)]
    off = [abs(end.std().item() - 0.5) for end in ends]
    assert (own, even) == ("log_snr", "linear") and off[0] < 0.25 * off[1]
    assert spacing_for("dpm_solver++", FLOW) == "linear"


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_find_both_modes(name):
    schedule = FLOW if name in ("euler", "heun") else DIFFUSION
    spacing = "linear" if schedule is FLOW else "log_snr"
    made = SAMPLERS[name](
        two_modes(schedule), one_volume(noise()), schedule.times(50, spacing), schedule, generators=generators(1)
    )
    upper = made[made > 0]
    assert upper.numel() / made.numel() == pytest.approx(0.5, abs=0.03)
    assert upper.mean().item() == pytest.approx(MODES, abs=0.03)
    assert upper.std().item() == pytest.approx(MODE_STD, abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_that_knows_one_point_leads_to_it(name):
    schedule = FLOW if name in ("euler", "heun") else DIFFUSION
    point = torch.full((1, 1, 1, 1, 1), 0.3, dtype=torch.float64)

    def towards_it(z, t):
        alpha, sigma = schedule.alpha_sigma(torch.tensor(float(t)))
        return point, (z - alpha * point) / sigma

    made = SAMPLERS[name](towards_it, noise(1), schedule.times(7), schedule, generators=generators(1))
    assert torch.allclose(made, point)


def test_monais_flow_steps_are_eulers():
    scheduler = RFlowScheduler(1000)
    scheduler.set_timesteps(8)
    z, split = noise(10), gaussian(FLOW)
    for t, t_next in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0)], strict=True):
        z_0, epsilon = split(z, float(t))
        z, _ = scheduler.step(z_0 - epsilon, float(t), z, next_timestep=float(t_next))
    assert torch.allclose(z, euler(split, noise(10), FLOW.times(8), FLOW), atol=1e-5)


# Names


def test_every_sampler_has_a_name():
    assert {sampler_for(name, FLOW) for name in SAMPLERS} == {ddim, ddpm, dpm_solver_pp_2m, euler, heun}


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match=r"sampler is 'plms'; expected one of ddim, ddpm, dpm_solver\+\+, euler, heun"):
        sampler_for("plms", DIFFUSION)


def test_eta_is_ddims_alone():
    named, split, times = sampler_for("ddim", DIFFUSION, eta=1.0), gaussian(DIFFUSION), DIFFUSION.times(5)
    ancestral = ddpm(split, noise(3), times, DIFFUSION, generators=generators(3))
    assert torch.equal(named(split, noise(3), times, DIFFUSION, generators=generators(3)), ancestral)
    with pytest.raises(InputError, match=r"sampling_eta is 0\.5, which only the sampler 'ddim' has, and .* 'ddpm'"):
        sampler_for("ddpm", DIFFUSION, eta=0.5)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_flows_samplers_are_refused_for_diffusion(name):
    with pytest.raises(InputError, match=rf"sampler is '{name}', which is for flow, .*; expected ddim, ddpm"):
        sampler_for(name, DIFFUSION)
