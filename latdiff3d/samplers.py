"""Noise → latents: one free function per published algorithm, over an explicit list of times."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from latdiff3d.errors import InputError

# The time after the last step: clean latents, where ᾱ = 1.
CLEAN = -1


def time_pairs(num_steps: int, num_train_timesteps: int) -> list[tuple[int, int]]:
    """Return (t, t_next) from the noisiest timestep down to `CLEAN`, evenly spaced.

    Args:
        num_steps: how often the denoiser is called, 1 … num_train_timesteps.
        num_train_timesteps: T of the noise schedule.

    Raises:
        InputError: for a number of steps outside that range.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise InputError(f"steps is {num_steps}; expected 1 to {num_train_timesteps}.")
    last = num_train_timesteps - 1
    times = [round(last - step * last / max(num_steps - 1, 1)) for step in range(num_steps)]
    return list(zip(times, [*times[1:], CLEAN], strict=True))


def alphas_cumprod(noise_schedule: nn.Module) -> torch.Tensor:
    """Return ᾱ (T,) of a MONAI noise schedule."""
    values = noise_schedule.alphas_cumprod
    assert isinstance(values, torch.Tensor)
    return values


@torch.no_grad()
def ddim(
    split: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    noise: torch.Tensor,
    times: Iterable[tuple[int, int]],
    alpha_bars: torch.Tensor,
) -> torch.Tensor:
    """Denoise with DDIM at η = 0 (Song et al. 2021, Eq. 12, arXiv:2010.02502).

    Args:
        split: takes noisy latents z_t (B, C, D, H, W) and t; returns (z_0, ε) as the denoiser sees them.
        noise: z_T, standard normal.
        times: (t, t_next) pairs such as `time_pairs` gives.
        alpha_bars: ᾱ of the noise schedule, (T,).

    Returns:
        clean latents, of the shape of `noise`.
    """
    z = noise
    for t, t_next in times:
        z_0, epsilon = split(z, t)
        alpha_bar_next = alpha_bars[t_next].to(z) if t_next != CLEAN else torch.ones((), device=z.device)
        z = alpha_bar_next.sqrt() * z_0 + (1 - alpha_bar_next).sqrt() * epsilon
    return z
