"""Known latents in every sampler: they are seen at each noise level, and end as they are."""

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from latdiff3d.blending import Known
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.samplers import SAMPLERS

DIFFUSION = schedule_of(DDPMScheduler(1000, schedule="scaled_linear_beta", clip_sample=False))
FLOW = schedule_of(RFlowScheduler(1000))
SHAPE = (2, 3, 4, 4, 4)
PAIRS = [(name, DIFFUSION) for name in ("ddim", "ddpm", "dpm_solver++")] + [(name, FLOW) for name in SAMPLERS]


@pytest.fixture
def known():
    free = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    free[..., :2] = True
    return Known(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), free)


def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def sampled(name, schedule, split, known, num_steps=10):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    blended = known.blended(split, noise(), schedule)
    return SAMPLERS[name](blended, noise(), schedule.times(num_steps), schedule, generators=generators)


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_what_is_known_is_seen_at_every_noise_level_and_ends_as_it_is(name, schedule, known):
    seen = []

    def split(z, t):
        """A denoiser that would make zeros of everything."""
        alpha, sigma = (level.float() for level in schedule.alpha_sigma(torch.tensor(t)))
        expected = alpha * known.latents + sigma * noise()
        kept = ~known.free.expand(SHAPE)
        assert torch.allclose(z[kept], expected[kept], atol=1e-6)
        seen.append(t)
        return torch.zeros_like(z), z / sigma

    z_0 = sampled(name, schedule, split, known)
    assert len(seen) >= 10
    kept = ~known.free.expand(SHAPE)
    assert torch.allclose(z_0[kept], known.latents[kept], atol=1e-5)
    assert z_0[~kept].abs().max() < 1e-5


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_free_cells_follow_what_they_are_told_of_the_known_ones(name, schedule, known):
    def split(z, t):
        """The exact denoiser of volumes whose free half mirrors the known one, to which it looks."""
        alpha, sigma = (level.float() for level in schedule.alpha_sigma(torch.tensor(t)))
        mirror = ((z - sigma * noise()) / alpha).flip(-1) if alpha > 0 else torch.zeros_like(z)
        return mirror, (z - alpha * mirror) / sigma

    z_0 = sampled(name, schedule, split, known)
    assert torch.allclose(z_0, torch.where(known.free, known.latents.flip(-1), known.latents), atol=1e-4)


def test_without_a_known_cell_nothing_changes(known):
    def split(z, t):
        alpha, sigma = (level.float() for level in DIFFUSION.alpha_sigma(torch.tensor(t)))
        return 0.5 * z, (z - alpha * 0.5 * z) / sigma

    all_free = Known(known.latents, torch.ones_like(known.free))
    plain = SAMPLERS["dpm_solver++"](split, noise(), DIFFUSION.times(5), DIFFUSION)
    assert torch.equal(sampled("dpm_solver++", DIFFUSION, split, all_free, 5), plain)
