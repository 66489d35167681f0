"""Noise → latents: one free function per published algorithm, over an explicit list of times.

Each takes

- `split`, which is given noisy latents z_t (B, C, D, H, W) and the time t, and returns (z_0, ε) as the denoiser sees
  them;
- `noise`, the latents at the first time, standard normal;
- `times`, falling to the schedule's clean time, such as `NoiseSchedule.times` gives; `split` is called at all but that;
- `schedule`, which says α and σ at these times;

and returns clean latents of the shape of `noise`. Those that draw random numbers take a generator for each volume, so
that a volume depends on its own seed, whatever else is in its batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import FlowSchedule, NoiseSchedule

Split = Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
Generators = Sequence[torch.Generator]


class Sampler(Protocol):
    """What all samplers can be called with."""

    def __call__(
        self,
        split: Split,
        noise: torch.Tensor,
        times: Sequence[float],
        schedule: NoiseSchedule,
        *,
        generators: Generators = (),
    ) -> torch.Tensor:
        """Return clean latents."""


@torch.no_grad()
def ddim(
    split: Split,
    noise: torch.Tensor,
    times: Sequence[float],
    schedule: NoiseSchedule,
    *,
    generators: Generators = (),
    eta: float = 0.0,
) -> torch.Tensor:
    """Denoise with DDIM (Song et al. 2021, Eq. 12 and 16, arXiv:2010.02502); of first order.

    Args:
        split, noise, times, schedule: see the top of this module.
        generators: one a volume; needed for η > 0 alone.
        eta: η, how much of the noise is drawn anew at each step: 0 none, 1 as much as `ddpm`.

    Raises:
        InputError: η outside 0 … 1.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; expected 0, deterministic, to 1, ancestral.")
    z = noise
    for t, t_next in pairwise(times):
        z_0, epsilon = split(z, t)
        (alpha, sigma), (alpha_next, sigma_next) = (_levels(schedule, time) for time in (t, t_next))
        between = sigma**2 - (alpha / alpha_next * sigma_next) ** 2  # the variance that z_t has more, given z_t'
        fresh = eta * sigma_next / sigma * between**0.5
        z = alpha_next * z_0 + (sigma_next**2 - fresh**2) ** 0.5 * epsilon
        if fresh > 0:
            z = z + fresh * _drawn(z, generators)
    return z


@torch.no_grad()
def ddpm(
    split: Split, noise: torch.Tensor, times: Sequence[float], schedule: NoiseSchedule, *, generators: Generators = ()
) -> torch.Tensor:
    """Denoise by ancestral sampling on any sub-schedule (Ho et al. 2020, Alg. 2, arXiv:2006.11239).

    Each step draws from q(z_t' | z_t, z_0), the posterior with the smaller of the paper's two variances, which is
    DDIM's step for η = 1 (Song et al. 2021, Sec. 4.1, arXiv:2010.02502).
    """
    return ddim(split, noise, times, schedule, generators=generators, eta=1.0)


@torch.no_grad()
def dpm_solver_pp_2m(
    split: Split, noise: torch.Tensor, times: Sequence[float], schedule: NoiseSchedule, *, generators: Generators = ()
) -> torch.Tensor:
    """Denoise with DPM-Solver++(2M) (Lu et al. 2022, Alg. 2, arXiv:2211.01095); of second order, one call a step.

    The first step and the last, to σ = 0, are DDIM's, of first order.
    """
    z, z_0_before, h_before = noise, None, 0.0
    for t, t_next in pairwise(times):
        z_0, epsilon = split(z, t)
        (alpha, sigma), (alpha_next, sigma_next) = (_levels(schedule, time) for time in (t, t_next))
        z = alpha_next * z_0 + sigma_next * epsilon
        if sigma_next == 0 or alpha == 0:  # log(α / σ), in which steps are measured, is infinite at one end
            continue
        left = alpha * sigma_next / (alpha_next * sigma)  # e^-h, h the step in log(α / σ)
        h = -float(torch.tensor(left, dtype=torch.float64).log())
        if z_0_before is not None:
            z = z + alpha_next * (1 - left) * h / (2 * h_before) * (z_0 - z_0_before)
        z_0_before, h_before = z_0, h
    return z


@torch.no_grad()
def euler(
    split: Split, noise: torch.Tensor, times: Sequence[float], schedule: NoiseSchedule, *, generators: Generators = ()
) -> torch.Tensor:
    """Follow a flow's straight lines by Euler's method (Liu et al. 2022, arXiv:2209.03003); of first order.

    Raises:
        InputError: for a schedule that is no flow.
    """
    _require_flow(schedule, "euler")
    z = noise
    for t, t_next in pairwise(times):
        z_0, epsilon = split(z, t)
        z = z + (_levels(schedule, t_next)[1] - _levels(schedule, t)[1]) * (epsilon - z_0)  # dz / dσ = ε − z_0
    return z


@torch.no_grad()
def heun(
    split: Split, noise: torch.Tensor, times: Sequence[float], schedule: NoiseSchedule, *, generators: Generators = ()
) -> torch.Tensor:
    """Follow a flow by Heun's method (as Karras et al. 2022, Alg. 1, arXiv:2206.00364); of second order.

    Two calls a step; the last, to σ = 0, is Euler's, at one.

    Raises:
        InputError: for a schedule that is no flow.
    """
    _require_flow(schedule, "heun")
    z = noise
    for t, t_next in pairwise(times):
        z_0, epsilon = split(z, t)
        step = _levels(schedule, t_next)[1] - _levels(schedule, t)[1]
        velocity = epsilon - z_0
        if t_next != schedule.clean:
            z_0, epsilon = split(z + step * velocity, t_next)
            velocity = (velocity + epsilon - z_0) / 2
        z = z + step * velocity
    return z


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpm_solver++": dpm_solver_pp_2m,
    "euler": euler,
    "heun": heun,
}
FLOW_SAMPLERS = ("euler", "heun")


def sampler_for(name: str, schedule: NoiseSchedule, eta: float = 0.0) -> Sampler:
    """Return the sampler that the setting `sampler` names.

    Args:
        name: a key of `SAMPLERS`.
        schedule: what it is to work on.
        eta: of `ddim`.

    Raises:
        InputError: for a name that is none, a flow's sampler for a diffusion model, or η for another than `ddim`.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}.")
    if name in FLOW_SAMPLERS:
        _require_flow(schedule, name)
    if eta == 0:
        return SAMPLERS[name]
    if name != "ddim":
        raise InputError(
            f"sampling_eta is {eta}, which only the sampler 'ddim' has, and sampler is {name!r}; set it to 0."
        )
    return partial(ddim, eta=eta)


def spacing_for(name: str, schedule: NoiseSchedule) -> str:
    """Return the spacing of steps that suits a sampler best in few of them, by benchmarks/samplers.py.

    DPM-Solver++ extrapolates, which fails over the one long step of log(α / σ) that a diffusion's even times have; a
    flow's have none so long.
    """
    return "log_snr" if name == "dpm_solver++" and not isinstance(schedule, FlowSchedule) else "linear"


def _require_flow(schedule: NoiseSchedule, name: str) -> None:
    if not isinstance(schedule, FlowSchedule):
        others = ", ".join(sampler for sampler in SAMPLERS if sampler not in FLOW_SAMPLERS)
        raise InputError(f"sampler is {name!r}, which is for flow, and this is a diffusion model; expected {others}.")


def _levels(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """Return α and σ at time t."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return alpha.item(), sigma.item()


def _drawn(like: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Return standard normal noise, each volume's from its own generator."""
    if len(generators) != len(like):
        raise InputError(f"{len(like)} volumes have {len(generators)} generators; expected one each.")
    drawn = [torch.randn(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]
    return torch.stack(drawn).to(like.device)
