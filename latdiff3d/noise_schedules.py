"""How much noise lies over the latents at which time: z_t = α_t · z_0 + σ_t · ε, for training and sampling alike.

A bundle's YAML holds MONAI's scheduler, which stays usable by MONAI's inferers; ours is built from it. Times have the
unit that the denoiser is given: for diffusion 0 … T − 1, and −1 is clean; for flow 0, which is clean, … T.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch import nn

from latdiff3d.errors import InputError

SPACINGS = ("linear", "trailing", "log_snr")
TIME_DISTRIBUTIONS = ("uniform", "logit-normal")
# The noise levels between which flow places steps evenly in log(α / σ), which is infinite at its ends.
FLOW_ENDS = (0.999, 0.001)
# What MONAI's schedulers can do besides, and ours do not: elsewhere than here it would silently have no effect.
ONLY = {
    "clip_sample": False,
    "variance_type": "fixed_small",
    "sample_method": "uniform",
    "use_timestep_transform": False,
}


class NoiseSchedule(ABC):
    """α and σ as functions of time.

    Attributes:
        num_train_timesteps: T.
        noisiest: the time at which sampling begins.
        clean: the time at which it ends, where α = 1 and σ = 0.
    """

    num_train_timesteps: int
    noisiest: float
    clean: float

    @abstractmethod
    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α and σ, in float64, at times `t` of any shape between `clean` and `noisiest`."""

    @abstractmethod
    def time_at(self, fraction: torch.Tensor) -> torch.Tensor:
        """Return the training times at fractions in [0, 1) of the way from clean to noisiest."""

    @abstractmethod
    def even_times(self, num_steps: int, spacing: str) -> np.ndarray:
        """Return `num_steps` times by the spacings `linear` or `trailing`, from the noisiest down, clean left out."""

    @abstractmethod
    def log_snr_times(self, num_steps: int) -> np.ndarray:
        """Return `num_steps` times evenly spaced in log(α / σ), from the noisiest down, clean left out."""

    def draw(self, num: int, distribution: str, device: torch.device) -> torch.Tensor:
        """Return `num` training times, drawn from PyTorch's global generator.

        Args:
            num: how many.
            distribution: of them, `uniform` or `logit-normal`: the logistic function of a unit normal, which prefers
                the middle (Esser et al. 2024, Sec. 3.1, arXiv:2403.03206).
            device: where.

        Raises:
            InputError: for any other distribution.
        """
        if distribution not in TIME_DISTRIBUTIONS:
            raise InputError(f"time_distribution is {distribution!r}; expected 'uniform' or 'logit-normal'.")
        if distribution == "uniform":
            return self.time_at(torch.rand(num, device=device))
        return self.time_at(torch.randn(num, device=device).sigmoid())

    def times(self, num_steps: int, spacing: str = "linear") -> list[float]:
        """Return `num_steps` + 1 times that fall from the noisiest to clean.

        Args:
            num_steps: 1 … T.
            spacing: `linear`, even steps from the noisiest time to the least noisy one trained on, then clean, as
                MONAI's schedulers place them; `trailing`, even steps from the noisiest time to clean (Lin et al. 2024,
                Sec. 3.3, arXiv:2305.08891); `log_snr`, even steps of log(α / σ), what DPM-Solver's order is stated for
                (Lu et al. 2022, arXiv:2211.01095). "Leading" steps begin below the noisiest time, with latents that
                still hold signal, which the noise that sampling begins with does not; so they are not here.

        Raises:
            InputError: for another number of steps or spacing.
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise InputError(f"steps is {num_steps}; expected 1 to {self.num_train_timesteps}.")
        if spacing not in SPACINGS:
            raise InputError(f"sampling_spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}.")
        times = self.log_snr_times(num_steps) if spacing == "log_snr" else self.even_times(num_steps, spacing)
        times[0] = self.noisiest
        return [*times.tolist(), self.clean]


class DiffusionSchedule(NoiseSchedule):
    """A variance-preserving process of T discrete times: α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t) (arXiv:2006.11239).

    Between whole times, where sampling may stop, log ᾱ is interpolated (Lu et al. 2022, App. D.1, arXiv:2206.00927).

    Args:
        alphas_cumprod: ᾱ (T,), falling.
    """

    clean = -1.0

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.num_train_timesteps = len(alphas_cumprod)
        self.noisiest = self.num_train_timesteps - 1.0
        # From clean on: entry t + 1 is that of time t.
        self.log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), alphas_cumprod.double().cpu().log()])

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α and σ, in float64, at times `t`, −1 … T − 1."""
        table = self.log_alpha_bar.to(t.device)
        place = t.double() + 1
        before = place.floor().clamp(max=self.num_train_timesteps - 1).long()
        log_alpha_bar = torch.lerp(table[before], table[before + 1], place - before)
        return (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()

    def time_at(self, fraction: torch.Tensor) -> torch.Tensor:
        """Return whole times 0 … T − 1."""
        return (fraction * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def even_times(self, num_steps: int, spacing: str) -> np.ndarray:
        """Return whole times, as the denoiser has been trained on."""
        step = np.arange(num_steps)
        if spacing == "linear":
            return np.round(self.noisiest - step * self.noisiest / max(num_steps - 1, 1))
        return np.round(self.num_train_timesteps * (1 - step / num_steps)) - 1

    def log_snr_times(self, num_steps: int) -> np.ndarray:
        """Return times between T − 1 and 0; see `NoiseSchedule.log_snr_times`."""
        alpha, sigma = self.alpha_sigma(torch.tensor([self.noisiest, 0.0]))
        first, last = (alpha / sigma).log().tolist()
        log_snr = np.linspace(first, last, num_steps)
        log_alpha_bar = -np.logaddexp(0, -2 * log_snr)  # ᾱ is the logistic function of 2 log(α / σ)
        return np.interp(-log_alpha_bar, -self.log_alpha_bar.numpy(), np.arange(-1.0, self.num_train_timesteps))


class FlowSchedule(NoiseSchedule):
    """A straight way from latents to noise: σ_t = t / T, α_t = 1 − σ_t (Liu et al. 2022, arXiv:2209.03003).

    Args:
        num_train_timesteps: T.
    """

    clean = 0.0

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.noisiest = float(num_train_timesteps)

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α and σ, in float64, at times `t`, 0 … T."""
        sigma = t.double() / self.num_train_timesteps
        return 1 - sigma, sigma

    def time_at(self, fraction: torch.Tensor) -> torch.Tensor:
        """Return times 0 … T, whole or not."""
        return fraction * self.num_train_timesteps

    def even_times(self, num_steps: int, spacing: str) -> np.ndarray:
        """Return even steps to 0; `linear` and `trailing` are one here."""
        return self.noisiest * (1 - np.arange(num_steps) / num_steps)

    def log_snr_times(self, num_steps: int) -> np.ndarray:
        """Return times between `FLOW_ENDS`; see `NoiseSchedule.log_snr_times`."""
        first, last = (float(np.log(end / (1 - end))) for end in FLOW_ENDS)
        log_odds = np.linspace(first, last, num_steps)
        return self.noisiest / (1 + np.exp(-log_odds))


def schedule_of(scheduler: nn.Module) -> NoiseSchedule:
    """Return the schedule by which MONAI's `scheduler` noises latents.

    Raises:
        InputError: for another scheduler than DDPMScheduler, or its children, and RFlowScheduler, or one with a setting
            that training and samplers here would not follow.
    """
    for setting, followed in ONLY.items():
        found = getattr(scheduler, setting, followed)
        if found != followed:
            advice = "; set time_distribution" if setting == "sample_method" else ""
            raise InputError(
                f"noise_schedule::{setting} is {found}, which is not followed; expected {followed}{advice}."
            )
    if isinstance(scheduler, RFlowScheduler):
        return FlowSchedule(scheduler.num_train_timesteps)
    if isinstance(scheduler, DDPMScheduler):
        alphas_cumprod = scheduler.alphas_cumprod
        assert isinstance(alphas_cumprod, torch.Tensor)
        return DiffusionSchedule(alphas_cumprod)
    raise InputError(
        f"noise_schedule is a {type(scheduler).__name__}; expected MONAI's DDPMScheduler, or RFlowScheduler for flow."
    )
