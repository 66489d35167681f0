"""What the denoiser is asked to predict: each objective's target, what it implies, and its weight."""

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.objectives import Epsilon, Flow, Sample, VPrediction, check_objective, min_snr_weight


def diffusion(**changes):
    settings = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
    return DDPMScheduler(1000, **settings, **changes)


PAIRS = [
    (Epsilon(), diffusion()),
    (VPrediction(), diffusion(prediction_type="v_prediction")),
    (Sample(), diffusion(prediction_type="sample")),
    (Flow(), RFlowScheduler(1000, use_discrete_timesteps=False)),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: type(pair[0]).__name__)
def pair(request):
    """Return an objective and a scheduler of MONAI's for it."""
    return request.param


def noised(scheduler, t):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((2, 3, 2, 2, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = schedule_of(scheduler).alpha_sigma(torch.tensor(float(t)))
    return latents, noise, alpha, sigma, alpha * latents + sigma * noise


@pytest.mark.parametrize("t", [1, 300, 999])
def test_a_right_answer_gives_back_latents_and_noise(pair, t):
    objective, scheduler = pair
    latents, noise, alpha, sigma, noisy = noised(scheduler, t)
    z_0, epsilon = objective.split(objective.target(latents, noise, alpha, sigma), noisy, alpha, sigma)
    assert torch.allclose(z_0, latents, atol=1e-9) and torch.allclose(epsilon, noise, atol=1e-9)


def test_latents_and_noise_add_up_to_the_noisy_ones_whatever_the_answer(pair):
    objective, scheduler = pair
    *_, alpha, sigma, noisy = noised(scheduler, 300)
    z_0, epsilon = objective.split(torch.randn_like(noisy), noisy, alpha, sigma)
    assert torch.allclose(alpha * z_0 + sigma * epsilon, noisy, atol=1e-12)


def test_an_error_of_the_answer_makes_the_error_of_z_0_that_is_said(pair):
    objective, scheduler = pair
    latents, noise, alpha, sigma, noisy = noised(scheduler, 700)
    wrong = objective.target(latents, noise, alpha, sigma) + 1
    z_0, _ = objective.split(wrong, noisy, alpha, sigma)
    assert torch.allclose((z_0 - latents).abs(), objective.clean_error(alpha, sigma).expand_as(latents), atol=1e-9)


def test_the_targets_are_the_published_ones():
    latents, noise, alpha, sigma, _ = noised(diffusion(), 400)
    assert torch.equal(Epsilon().target(latents, noise, alpha, sigma), noise)
    assert torch.equal(Sample().target(latents, noise, alpha, sigma), latents)
    assert torch.equal(Flow().target(latents, noise, alpha, sigma), latents - noise)
    assert torch.equal(VPrediction().target(latents, noise, alpha, sigma), alpha * noise - sigma * latents)


def test_monais_schedulers_noise_as_the_objectives_assume(pair):
    _, scheduler = pair
    latents, noise, _, _, noisy = noised(scheduler, 700)
    theirs = scheduler.add_noise(latents.float(), noise.float(), torch.tensor([700, 700]))
    assert torch.allclose(theirs.double(), noisy, atol=1e-5)


def test_monais_step_reads_a_right_answer_as_we_do(pair):
    objective, scheduler = pair
    latents, noise, alpha, sigma, noisy = noised(scheduler, 700)
    answer = objective.target(latents, noise, alpha, sigma)
    if isinstance(objective, Flow):
        scheduler.set_timesteps(10)
        _, theirs = scheduler.step(answer, 700, noisy, next_timestep=0)
    else:
        _, theirs = scheduler.step(answer, 700, noisy)
    assert torch.allclose(theirs, latents, atol=1e-4)


# Weights


@pytest.mark.parametrize("snr", [0.01, 1.0, 5.0, 400.0])
def test_min_snr_weighs_as_published(snr):
    alpha, sigma = torch.tensor((snr / (1 + snr)) ** 0.5), torch.tensor((1 / (1 + snr)) ** 0.5)
    least = min(snr, 5)
    expected = {Epsilon(): least / snr, VPrediction(): least / (snr + 1), Sample(): least}
    for objective, weight in expected.items():
        assert min_snr_weight(objective, alpha, sigma, 5).item() == pytest.approx(weight, rel=1e-4)


# What does not go together


def test_objectives_go_with_their_own_schedulers(pair):
    objective, scheduler = pair
    assert check_objective(objective, scheduler) is None


@pytest.mark.parametrize(
    ("objective", "scheduler", "line"),
    [
        (Flow(), diffusion(), "the objective is Flow and noise_schedule a DDPMScheduler; expected Flow with RFlow"),
        (Epsilon(), RFlowScheduler(1000), "the objective is Epsilon and noise_schedule a RFlowScheduler; expected"),
        (VPrediction(), diffusion(), "prediction_type epsilon, VPrediction predicts v_prediction; set noise_schedule"),
    ],
)
def test_others_are_refused(objective, scheduler, line):
    with pytest.raises(InputError, match=line):
        check_objective(objective, scheduler)
