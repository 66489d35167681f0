"""Sample a part of the latents and keep the rest: a sampler's denoiser sees what is known at every noise level."""

from dataclasses import dataclass

import torch

from latdiff3d.noise_schedules import NoiseSchedule
from latdiff3d.samplers import Split


@dataclass(frozen=True)
class Known:
    """Latents that are known but for some cells.

    Attributes:
        latents: (B, C, D, H, W), clean, normalised; what free cells hold does not count.
        free: (B, 1, D, H, W), True where latents are to be sampled.
    """

    latents: torch.Tensor
    free: torch.Tensor

    def blended(self, split: Split, noise: torch.Tensor, schedule: NoiseSchedule) -> Split:
        """Return `split` with what is known in its place: blended latent diffusion (arXiv:2206.02779, Alg. 1).

        Before each call known cells become the known latents, noised to that time; after it they are said to be what
        they are. They take the same noise each time, so that they lie on the one path that every sampler here follows
        exactly, those of higher order too, and end as the known latents. (Where a sampler draws noise anew, this takes
        it out of them again.)

        Args:
            split: see `samplers`.
            noise: (B, C, D, H, W), with which sampling begins.
            schedule: says how much of it there is at a time.
        """
        latents, free = self.latents.to(noise), self.free.to(noise.device)

        def blend(z: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
            alpha, sigma = (level.to(z) for level in schedule.alpha_sigma(torch.tensor(t, device=z.device)))
            z_0, epsilon = split(torch.where(free, z, alpha * latents + sigma * noise), t)
            return torch.where(free, z_0, latents), torch.where(free, epsilon, noise)

        return blend
