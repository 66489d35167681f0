"""Noise and condition → volumes: denoiser, codec and sampler put together, in previews of training and in sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from latdiff3d import samplers
from latdiff3d.blending import Known
from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import Condition, MaskCondition, NoCondition
from latdiff3d.devices import autocast
from latdiff3d.guidance import Guidance
from latdiff3d.handlers import progress_bar
from latdiff3d.latent_windows import LatentWindows
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.objectives import Objective, check_objective
from latdiff3d.training import latent_batch, predicted


@dataclass
class Synthesizer:
    """Noise and condition → latents → volumes.

    Args:
        num_steps: of the sampler; the denoiser is called as often for a volume, twice as often where guidance acts.
        guidance: how strongly samples are pushed towards their condition.
        sampler: one of `samplers.SAMPLERS`.
        spacing: of the steps, one of `noise_schedules.SPACINGS`; None for the sampler's own, `samplers.spacing_for`.
        eta: of the sampler `ddim`, see there.

    Raises:
        InputError: for a sampler, a number of steps or an objective that the noise schedule does not go with.
    """

    denoiser: nn.Module
    codec: LatentCodec
    condition: MaskCondition | NoCondition
    noise_schedule: nn.Module
    objective: Objective
    device: torch.device
    precision: str = "bf16"
    num_steps: int = 50
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str = "ddim"
    spacing: str | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.noise_schedule)
        check_objective(self.objective, self.noise_schedule)
        self.times = self.schedule.times(self.num_steps, self.step_spacing)
        self.solve = samplers.sampler_for(self.sampler, self.schedule, self.eta)

    @property
    def step_spacing(self) -> str:
        """Return the spacing of the steps, the sampler's own where none is set."""
        return self.spacing or samplers.spacing_for(self.sampler, self.schedule)

    def __call__(self, batch: Mapping[str, Any], seed: int = 0) -> torch.Tensor:
        """Return volumes (B, C, D, H, W) for the conditions of a batch as stage 2 trains on."""
        mean, _, condition = latent_batch(batch, self.codec, self.condition, self.device)
        return self.sample(mean.shape[1:], condition, [seed] * len(mean))

    @property
    def num_calls(self) -> int:
        """Return how often the sampler asks for a prediction."""
        return 2 * self.num_steps - 1 if self.sampler == "heun" else self.num_steps

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        condition: Condition,
        seeds: Sequence[int],
        window: Sequence[int] | None = None,
        memory_gb: float | None = None,
        known: Known | None = None,
    ) -> torch.Tensor:
        """Return one volume a seed, (B, C, D, H, W) in [0, 1].

        Args:
            shape: of one volume's latents, (C', D/f, H/f, W/f).
            condition: of B volumes, on any device; an unconditional model's is empty.
            seeds: one a volume; its noise depends on it alone.
            window: (d, h, w), at most the latents': larger ones are denoised by windows of that size, see
                `latent_windows`, with a progress bar; None: at once.
            memory_gb: for decoding, see `LatentCodec.decode`.
            known: latents of which only the free cells are sampled; all where None.

        Raises:
            InputError: too little memory for decoding, before anything is denoised.
        """
        size = tuple(shape[1:])
        windows = None if window is None or tuple(window) == size else LatentWindows(size, tuple(window))
        if memory_gb is not None:
            self.codec.decoding_tiles(size, memory_gb)
        self.denoiser.eval()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
        condition = condition.to(self.device)

        def split(z: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
            def predict(noisy: torch.Tensor, given: Condition) -> torch.Tensor:
                timesteps = torch.full((len(noisy),), t, device=noisy.device)
                with autocast(self.device, self.precision):
                    return predicted(self.denoiser, noisy, timesteps, given).float()

            alpha, sigma = (level.to(z) for level in self.schedule.alpha_sigma(torch.tensor(t, device=z.device)))

            def guided(noisy: torch.Tensor, given: Condition) -> torch.Tensor:
                return self.guidance(predict, noisy, given, sigma.item())

            if windows is None:
                prediction = guided(z, condition)
            else:
                prediction = windows.prediction(guided, z, condition, bar.update)
            return self.objective.split(prediction, z, alpha, sigma)

        noise = noise.to(self.device)
        blend = split if known is None else known.blended(split, noise, self.schedule)
        number = 0 if windows is None else windows.number * self.num_calls
        with progress_bar(total=number, desc="denoising", unit="window", leave=False, disable=not number) as bar:
            latents = self.solve(blend, noise, self.times, self.schedule, generators=generators)
        return self.codec.decode(latents, memory_gb=memory_gb).clamp(0, 1)
