"""How near do the samplers come to data they could know exactly, in how many steps?

    python benchmarks/samplers.py [--short]

For a Gaussian and for two modes, the exact denoiser is known in closed form; what is left is the samplers' own error.
Prints the mean and the standard deviation that each ends with, over 20 000 samples, beside MONAI's DDIM, DDPM and flow
schedulers (with `set_timesteps`, as its inferers use them) and beside the truth; the noise that all begin with has mean
0 and standard deviation 1 to the last digit. Diffusion steps are spaced evenly in log SNR, `linear` for DDPM, flow's
evenly in time. Then the same by spacing, for 10 steps on two modes, and each one's order of convergence: by which power
of the number of steps its distance from the exact solution falls between 40 and 80 of them. The last line is a JSON
object.
"""

import argparse
import json
import math
from collections.abc import Callable

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from latdiff3d.cli import door
from latdiff3d.noise_schedules import SPACINGS, NoiseSchedule, schedule_of
from latdiff3d.samplers import FLOW_SAMPLERS, SAMPLERS, Split, dpm_solver_pp_2m, heun

SETTINGS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
DIFFUSION = schedule_of(DDPMScheduler(1000, **SETTINGS))
FLOW = schedule_of(RFlowScheduler(1000, use_discrete_timesteps=False))
STEPS = (5, 10, 25, 50)
ORDER_STEPS = (40, 80)
SPACING_STEPS = 10
MEAN, STD = 0.3, 0.5  # of the Gaussian
MODES, MODE_STD = 1.0, 0.1  # at −1 and 1, alike
TRUTHS = {"gaussian": (MEAN, STD), "two modes": (0.0, math.hypot(MODES, MODE_STD))}

Data = Callable[[NoiseSchedule], Split]


def main() -> None:
    """Sample with each and print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--short", action="store_true", help="2 000 samples, and no 1000 steps of DDPM")
    given = arguments.parse_args()
    num = 2_000 if given.short else 20_000
    noise = torch.randn((num, 1, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for data, exact in (("gaussian", gaussian), ("two modes", two_modes)):
        mean, std = TRUTHS[data]
        print(f"\n{data}: mean {mean:.3f}, std {std:.3f}")
        print(f"{'':14}" + "".join(f"{steps:>16} steps" for steps in (*STEPS, 1000)))
        for name, sample in arms(exact).items():
            counts = (*STEPS, 1000) if name.endswith("ddpm") and not given.short else STEPS
            found = {str(steps): statistics(sample(noise, steps)) for steps in counts}
            print(f"{name:14}" + "".join(f"{mean:12.3f} ± {std:.3f}  " for mean, std in found.values()))
            results.setdefault(data, {})[name] = found
    spacings = by_spacing(noise)
    print(f"\ntwo modes, std at {SPACING_STEPS} steps: " + ", ".join(SPACINGS))
    for name, stds in spacings.items():
        print(f"{name:24}" + "".join(f"{std:8.3f}" for std in stds.values()))
    orders = {name: round(order(name, noise[:200]), 2) for name in SAMPLERS if name != "ddpm"}
    print("\norder of convergence: " + ", ".join(f"{name} {value}" for name, value in orders.items()))
    print(json.dumps({"truth": TRUTHS, **results, "std_by_spacing": spacings, "orders": orders}))


def by_spacing(noise: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the standard deviation that each sampler ends with on two modes, by process and spacing."""
    found: dict[str, dict[str, float]] = {}
    for process, schedule in (("diffusion", DIFFUSION), ("flow", FLOW)):
        for name in SAMPLERS:
            if schedule is FLOW or name not in FLOW_SAMPLERS:
                found[f"{name}, {process}"] = {
                    spacing: statistics(sampled(name, two_modes, noise, SPACING_STEPS, schedule, spacing))[1]
                    for spacing in SPACINGS
                }
    return found


def statistics(samples: torch.Tensor) -> list[float]:
    """Return mean and standard deviation."""
    return [round(samples.mean().item(), 4), round(samples.std().item(), 4)]


def gaussian(schedule: NoiseSchedule) -> Split:
    """Return (E[z_0 | z_t], E[ε | z_t]) of N(MEAN, STD²)."""

    def split(z: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = schedule.alpha_sigma(torch.tensor(float(t)))
        z_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)
        return z_0, (z - alpha * z_0) / sigma

    return split


def two_modes(schedule: NoiseSchedule) -> Split:
    """Return the same of N(−MODES, MODE_STD²) and N(MODES, MODE_STD²) in equal parts."""

    def split(z: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = schedule.alpha_sigma(torch.tensor(float(t)))
        variance = alpha**2 * MODE_STD**2 + sigma**2
        mode = MODES * torch.tanh(alpha * MODES * z / variance)  # E of −MODES or MODES, given z_t
        z_0 = mode + alpha * MODE_STD**2 / variance * (z - alpha * mode)
        return z_0, (z - alpha * z_0) / sigma

    return split


def arms(data: Data) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Return samplers by name, each a function of noise and number of steps."""
    ours = {
        name: lambda noise, steps, name=name: sampled(name, data, noise, steps, *schedule_for(name))
        for name in SAMPLERS
    }
    return {
        **ours,
        "MONAI ddim": lambda noise, steps: monais(DDIMScheduler(1000, **SETTINGS), data(DIFFUSION), noise, steps),
        "MONAI ddpm": lambda noise, steps: monais(DDPMScheduler(1000, **SETTINGS), data(DIFFUSION), noise, steps),
        "MONAI flow": lambda noise, steps: monais_flow(data(FLOW), noise, steps),
    }


def schedule_for(name: str) -> tuple[NoiseSchedule, str]:
    """Return the schedule and the spacing that a sampler is shown with."""
    return (FLOW, "linear") if name in ("euler", "heun") else (DIFFUSION, "linear" if name == "ddpm" else "log_snr")


def sampled(
    name: str, data: Data, noise: torch.Tensor, steps: int, schedule: NoiseSchedule, spacing: str
) -> torch.Tensor:
    """Return what one of ours ends with; all of the samples are one volume to it, with one generator."""
    volume, generators = noise.view(1, -1, 1, 1, 1), [torch.Generator().manual_seed(1)]
    sampler = SAMPLERS[name]
    return sampler(data(schedule), volume, schedule.times(steps, spacing), schedule, generators=generators)


def monais(scheduler: DDIMScheduler | DDPMScheduler, split: Split, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what a scheduler of MONAI's ends with."""
    torch.manual_seed(1)
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps:
        z, _ = scheduler.step(split(z, int(t))[1], int(t), z)
    return z


def monais_flow(split: Split, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what MONAI's RFlowScheduler ends with."""
    scheduler = RFlowScheduler(1000, use_discrete_timesteps=False)
    scheduler.set_timesteps(steps)
    z, times = noise, [float(t) for t in scheduler.timesteps]
    for t, t_next in zip(times, [*times[1:], 0.0], strict=True):
        z_0, epsilon = split(z, t)
        z, _ = scheduler.step(z_0 - epsilon, t, z, next_timestep=t_next)
    return z


def order(name: str, noise: torch.Tensor) -> float:
    """Return by which power of the number of steps a sampler's error falls, on the Gaussian."""
    schedule, spacing = schedule_for(name)
    best = heun if schedule is FLOW else dpm_solver_pp_2m
    exact = best(gaussian(schedule), noise, schedule.times(1000, spacing), schedule)
    errors = [
        (SAMPLERS[name](gaussian(schedule), noise, schedule.times(steps, spacing), schedule) - exact).abs().max().item()
        for steps in ORDER_STEPS
    ]
    return math.log(errors[0] / errors[1]) / math.log(ORDER_STEPS[1] / ORDER_STEPS[0])


if __name__ == "__main__":
    door(main)
