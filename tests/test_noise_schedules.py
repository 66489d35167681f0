"""Noise levels as functions of time, and the times at which training and sampling look."""

from itertools import pairwise

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import SPACINGS, schedule_of

SETTINGS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
DIFFUSION = schedule_of(DDPMScheduler(1000, clip_sample=False, **SETTINGS))
FLOW = schedule_of(RFlowScheduler(1000))
CPU = torch.device("cpu")


def levels(schedule, *times):
    return schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64))


def test_diffusion_has_monais_noise_levels_at_whole_times():
    alpha, sigma = levels(DIFFUSION, *range(1000))
    theirs = DDPMScheduler(1000, **SETTINGS).alphas_cumprod.double()
    assert torch.allclose(alpha**2, theirs, rtol=1e-6) and torch.allclose(alpha**2 + sigma**2, torch.ones(1).double())


def test_between_them_noise_rises_steadily():
    alpha, sigma = levels(DIFFUSION, *torch.linspace(-1, 999, 5000).tolist())
    assert (sigma.diff() > 0).all() and (alpha.diff() < 0).all()
    assert levels(DIFFUSION, -1.0) == (1, 0)


def test_flow_is_a_straight_line():
    alpha, sigma = levels(FLOW, 0, 250, 1000)
    assert alpha.tolist() == [1, 0.75, 0] and sigma.tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("schedule", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
def test_times_fall_strictly_from_the_noisiest_to_clean(schedule, spacing, num_steps):
    times = schedule.times(num_steps, spacing)
    assert len(times) == num_steps + 1
    assert times[0] == schedule.noisiest and times[-1] == schedule.clean
    assert all(t > t_next for t, t_next in pairwise(times))


@pytest.mark.parametrize("spacing", ["linear", "trailing"])
def test_all_of_the_times_are_all_of_them(spacing):
    assert DIFFUSION.times(1000, spacing) == list(range(999, -2, -1))


def test_the_spacings_are_where_they_are_said_to_be():
    assert DIFFUSION.times(4, "linear") == [999, 666, 333, 0, -1]
    assert DIFFUSION.times(4, "trailing") == [999, 749, 499, 249, -1]
    alpha, sigma = levels(DIFFUSION, *DIFFUSION.times(9, "log_snr")[:-1])
    steps = (alpha / sigma).log().diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-2)
    assert FLOW.times(4) == [1000, 750, 500, 250, 0]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_other_step_counts_are_refused(num_steps):
    with pytest.raises(InputError, match=f"steps is {num_steps}; expected 1 to 1000"):
        DIFFUSION.times(num_steps)


def test_another_spacing_is_refused():
    with pytest.raises(InputError, match="sampling_spacing is 'leading'; expected one of linear, trailing, log_snr"):
        DIFFUSION.times(5, "leading")


# Training times


def test_diffusion_trains_on_every_whole_time_alike():
    torch.manual_seed(0)
    times = DIFFUSION.draw(200_000, "uniform", CPU)
    counts = times.bincount(minlength=1000)
    assert times.dtype == torch.long and len(counts) == 1000 and counts.min() > 120 and counts.max() < 290


def test_logit_normal_prefers_the_middle():
    torch.manual_seed(0)
    fractions = FLOW.draw(100_000, "logit-normal", CPU) / 1000
    assert (fractions / (1 - fractions)).log().std().item() == pytest.approx(1, abs=0.01)
    assert fractions.median().item() == pytest.approx(0.5, abs=0.01)
    assert ((fractions > 0.25) & (fractions < 0.75)).float().mean() > 0.7


def test_another_distribution_is_refused():
    with pytest.raises(InputError, match="time_distribution is 'normal'; expected 'uniform' or 'logit-normal'"):
        DIFFUSION.draw(2, "normal", CPU)


def test_monais_children_of_the_ddpm_scheduler_are_taken_and_others_refused():
    with pytest.raises(InputError, match="noise_schedule is a PNDMScheduler; expected MONAI's DDPMScheduler"):
        schedule_of(PNDMScheduler(1000))
    with pytest.raises(InputError, match="noise_schedule is a DDIMScheduler"):
        schedule_of(DDIMScheduler(1000, clip_sample=False))


@pytest.mark.parametrize(
    ("scheduler", "line"),
    [
        (DDPMScheduler(1000), "noise_schedule::clip_sample is True, which is not followed; expected False"),
        (DDPMScheduler(1000, clip_sample=False, variance_type="fixed_large"), "variance_type is fixed_large, .*_small"),
        (RFlowScheduler(1000, sample_method="logit-normal"), "sample_method is logit-normal, .* uniform; set time"),
        (RFlowScheduler(1000, use_timestep_transform=True), "use_timestep_transform is True, which is not followed"),
    ],
)
def test_what_only_monais_samplers_would_follow_is_refused(scheduler, line):
    with pytest.raises(InputError, match=line):
        schedule_of(scheduler)


def test_a_cosine_schedule_ends_within_every_spacing():
    cosine = schedule_of(DDPMScheduler(1000, schedule="cosine", clip_sample=False))
    for spacing in SPACINGS:
        times = cosine.times(1000 if spacing != "log_snr" else 100, spacing)
        alpha, sigma = levels(cosine, *times)
        assert (alpha.diff() > 0).all() and (sigma.diff() < 0).all()
