"""What the denoiser is asked to predict."""

import torch
from monai.networks.schedulers import DDPMScheduler

from latdiff3d.objectives import Epsilon


def noised(t):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((2, 3, 2, 2, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    schedule = DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    alpha_bar = schedule.alphas_cumprod.double()[t]
    return latents, noise, alpha_bar, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def test_epsilons_target_is_the_noise():
    latents, noise, alpha_bar, _ = noised(500)
    assert torch.equal(Epsilon().target(latents, noise, alpha_bar), noise)


def test_x0_is_recovered_exactly_from_epsilon():
    for t in (0, 300, 999):
        latents, noise, alpha_bar, noisy = noised(t)
        x0, epsilon = Epsilon().split(noise, noisy, alpha_bar)
        assert torch.allclose(x0, latents, atol=1e-12)
        assert torch.equal(epsilon, noise)


def test_clean_latents_and_noise_add_up_to_the_noisy_ones_whatever_the_prediction():
    _, _, alpha_bar, noisy = noised(300)
    prediction = torch.randn_like(noisy)
    x0, epsilon = Epsilon().split(prediction, noisy, alpha_bar)
    assert torch.allclose(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * epsilon, noisy, atol=1e-12)


def test_monais_schedule_noises_as_the_objective_assumes():
    latents, noise, _, noisy = noised(700)
    schedule = DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    theirs = schedule.add_noise(latents.float(), noise.float(), torch.tensor([700, 700]))
    assert torch.allclose(theirs.double(), noisy, atol=1e-5)
