"""What the denoiser is asked to predict, and how its answer splits noisy latents into clean latents and noise.

Noisy latents are z_t = α_t · z_0 + σ_t · ε. In every class `target` is what the denoiser should say, and `split`
returns (z_0, ε) as its prediction implies them; α and σ broadcast to the latents (B, C, D, H, W). `clean_error` is how
large an error of z_0 an error of 1 in the prediction makes. `prediction_type` is MONAI's name of it.
"""

from typing import ClassVar

import torch
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import FlowSchedule, schedule_of

Pair = tuple[torch.Tensor, torch.Tensor]


class Epsilon:
    """The denoiser predicts the noise (Ho et al. 2020, Eq. 14, arXiv:2006.11239)."""

    prediction_type: ClassVar[str] = "epsilon"

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Return ε."""
        return noise

    def split(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> Pair:
        """Return (z_0, ε); α must not be 0, where the noise says nothing about z_0."""
        return (noisy - sigma * prediction) / alpha, prediction

    def clean_error(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return σ / α."""
        return sigma / alpha


class VPrediction:
    """The denoiser predicts v = α ε − σ z_0, where α² + σ² = 1 (Salimans and Ho 2022, Sec. 4, arXiv:2202.00512).

    Its targets have variance 1 at every time, and a few large steps forgive it more than `Epsilon`, whose errors are
    divided by a small α where sampling begins.
    """

    prediction_type: ClassVar[str] = "v_prediction"

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Return α ε − σ z_0."""
        return alpha * noise - sigma * latents

    def split(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> Pair:
        """Return (z_0, ε)."""
        return alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction

    def clean_error(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return σ."""
        return sigma


class Sample:
    """The denoiser predicts the clean latents (Ho et al. 2020, Sec. 3.2, arXiv:2006.11239)."""

    prediction_type: ClassVar[str] = "sample"

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Return z_0."""
        return latents

    def split(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> Pair:
        """Return (z_0, ε); σ must not be 0."""
        return prediction, (noisy - alpha * prediction) / sigma

    def clean_error(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return 1."""
        return torch.ones_like(sigma)


class Flow:
    """The denoiser predicts the velocity z_0 − ε, where α + σ = 1: rectified flow (Liu et al. 2022, arXiv:2209.03003).

    The sign is that of MONAI's RFlowScheduler: time runs from the latents to the noise, the velocity back.
    """

    prediction_type: ClassVar[str] = "v_prediction"

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Return z_0 − ε."""
        return latents - noise

    def split(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> Pair:
        """Return (z_0, ε)."""
        return noisy + sigma * prediction, noisy - alpha * prediction

    def clean_error(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return σ."""
        return sigma


Objective = Epsilon | VPrediction | Sample | Flow


def check_objective(objective: Objective, scheduler: nn.Module) -> None:
    """Refuse an objective that MONAI's `scheduler`, or the process behind it, does not go with.

    Raises:
        InputError: a flow's velocity of a diffusion process or the reverse, or another `prediction_type`.
    """
    if isinstance(objective, Flow) != isinstance(schedule_of(scheduler), FlowSchedule):
        raise InputError(
            f"the objective is {type(objective).__name__} and noise_schedule a {type(scheduler).__name__}; expected "
            "Flow with RFlowScheduler, as configs/flow.yaml has them, or another objective with DDPMScheduler."
        )
    there = getattr(scheduler, "prediction_type", objective.prediction_type)
    if there != objective.prediction_type:
        raise InputError(
            f"noise_schedule has prediction_type {there}, {type(objective).__name__} predicts "
            f"{objective.prediction_type}; set noise_schedule::prediction_type to that, for MONAI's inferers."
        )


def min_snr_weight(objective: Objective, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the weight of the squared error at each time (Hang et al. 2023, Sec. 3.4, arXiv:2303.09556).

    Errors of z_0 weigh min(SNR, γ), SNR = α² / σ², whatever the denoiser predicts: for `Epsilon` that is
    min(SNR, γ) / SNR, for `VPrediction` min(SNR, γ) / (SNR + 1), for `Sample` min(SNR, γ).

    Args:
        objective: what is predicted.
        alpha: α at the times, of any shape.
        sigma: σ at the times, above 0.
        gamma: γ, above 0; 5 in the paper.
    """
    return (alpha / sigma).square().clamp(max=gamma) * objective.clean_error(alpha, sigma).square()
