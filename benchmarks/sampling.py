"""Are volumes made in a dozen calls of the network as good as those of 50 steps of DDIM, and in how much of the time?

    python benchmarks/sampling.py --data DATA --run runs/diffusion --segmenter runs/judge [--guidance 2] [--cases 5]

For each validation mask and three seeds, in turn on one network, one volume at a time:

- ours: DPM-Solver++(2M) with even steps of log(α / σ), in as many steps as `--calls` calls of the denoiser allow: with
  guidance, a step takes two. Calls are counted, not computed.
- ddim: our DDIM in 50 steps, with the right times.
- monai: MONAI's LatentDiffusionInferer with its DDIMScheduler, or RFlowScheduler for a flow, in 50 steps.

Time is that of a volume from the mask's file to intensities. Quality is the unbiased squared MMD between the real
volumes and those made for their masks, on the evaluation segmenter's features (mean and standard deviation of each
channel over the volume's own voxels, in units of their spread over the real volumes), with the kernel of the kernel
inception distance and with a Gaussian one whose width is the real volumes' median distance. `mmd_ratio` is the median
over the seeds of ours over the better of the two others, by the first kernel; `time_ratio` our time over that of the
one with the lower median. Variety is MS-SSIM between neighbouring cases' volumes, higher where they are more alike.
Intervals, of 95 %, are by bootstrap over cases. How far the training volumes are from those of validation is printed.

`--run` is stage 2's run; it, its first stage and the judge are trained where they are missing. The last line is a JSON
object.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from judging import Judging, arguments, real_volumes
from monai.bundle import ConfigParser
from monai.inferers import LatentDiffusionInferer
from torch import nn

from latdiff3d.bootstrap import interval, mean_interval
from latdiff3d.cli import door
from latdiff3d.devices import autocast
from latdiff3d.diversity import likeness
from latdiff3d.errors import InputError
from latdiff3d.kernel_distance import (
    Kernel,
    Similarities,
    gaussian_kernel,
    median_distance,
    paired_squared_mmd,
    polynomial_kernel,
    similarities,
    squared_mmd,
    standardised,
)
from latdiff3d.model_cases import cases_of_split
from latdiff3d.noise_schedules import FlowSchedule
from latdiff3d.plain_figures import rounded
from latdiff3d.synthesis import Model

STEPS = 50  # of the two others

Arm = Callable[[str, int], torch.Tensor]  # mask and seed → volume (C, D, H, W)


class Measured(NamedTuple):
    """What is known of an arm's volumes, or of the real ones, for each seed.

    Attributes:
        features: (N, F).
        alike: MS-SSIM of each volume and the next case's, (N,).
    """

    features: list[np.ndarray]
    alike: list[np.ndarray]


def main() -> None:
    """Sample in turn, measure and print."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=12, help="of the denoiser, for a volume of ours")
    parser.add_argument("--guidance", type=float, help="its scale, for all (default: the configuration's)")
    parser.add_argument("--seeds", type=int, default=3, help="volumes for each mask")
    given = parser.parse_args()
    if given.calls < 1 or given.seeds < 1:
        raise InputError(f"{given.calls} calls, {given.seeds} seeds; expected 1 at least.")
    judging = Judging.prepared(given, given.guidance)
    model, cases = judging.model, judging.cases
    real = Measured([judging.features(judging.reals)], [neighbours(judging.reals)])
    others, _, others_own = real_volumes(model, cases_of_split(model, given.data, "train")[: len(cases)])
    other_features = judging.features(others, others_own)

    arms, calls = arms_of(model, given.calls), CallCounter(model.synthesizer.denoiser)
    counted = {name: calls.of(arm, cases[0]["mask"]) for name, arm in arms.items()}  # and warmed up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    made = {name: Measured([], []) for name in arms}
    for seed in range(given.seeds):
        volumes: dict[str, list[torch.Tensor]] = {name: [] for name in arms}
        for number, case in enumerate(cases):
            for name, arm in arms.items():
                begun = time.perf_counter()
                own_seed = seed * len(cases) + number  # its own noise for each volume, the same for all arms
                volumes[name].append(arm(case["mask"], own_seed))  # on the CPU, so that a GPU is waited for
                seconds[name].append(time.perf_counter() - begun)
        for name, found in volumes.items():
            made[name].features.append(judging.features(found))
            made[name].alike.append(neighbours(found))
        print(f"seed {seed}: {3 * len(cases)} volumes", flush=True)
    summary = summarised(real, other_features, made, seconds, counted)
    print_table(summary)
    print(json.dumps(summary))


def arms_of(model: Model, num_calls: int) -> dict[str, Arm]:
    """Return the three samplers by name."""
    synthesizer = model.synthesizer
    is_flow, per_step = isinstance(synthesizer.schedule, FlowSchedule), 1 if synthesizer.guidance.scale == 1 else 2
    few = {"sampler": "dpm_solver++", "num_steps": max(1, num_calls // per_step), "spacing": "log_snr"}
    many = {"sampler": "ddim", "num_steps": STEPS, "spacing": "linear"}
    ours = replace(model, synthesizer=replace(synthesizer, eta=0.0, **few))
    ddim = replace(model, synthesizer=replace(synthesizer, eta=0.0, **many))
    return {
        "ours": lambda mask, seed: ours.sample(mask, seed).volume,
        "ddim": lambda mask, seed: ddim.sample(mask, seed).volume,
        "monai": monais(model, monais_scheduler(model, is_flow)),
    }


def monais_scheduler(model: Model, is_flow: bool) -> nn.Module:
    """Return MONAI's scheduler for sampling, of the noise schedule that was trained on."""
    definition = {**model.config["noise_schedule"], **({} if is_flow else {"_target_": "DDIMScheduler"})}
    scheduler = ConfigParser({**model.config.get(), "noise_schedule": definition}).get_parsed_content("noise_schedule")
    scheduler.set_timesteps(STEPS)
    return scheduler


def monais(model: Model, scheduler: nn.Module) -> Arm:
    """Return MONAI's inferer with the same network, in the same precision, from the same noise."""
    synthesizer = model.synthesizer
    inferer = LatentDiffusionInferer(scheduler, scale_factor=1.0)
    guidance = synthesizer.guidance

    def denoiser(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        with autocast(synthesizer.device, synthesizer.precision):
            return synthesizer.denoiser(x, timesteps).float()

    def sample(mask: str, seed: int) -> torch.Tensor:
        grid = model.grid_of(mask)
        assert grid is not None
        condition = synthesizer.condition(grid.mask.as_tensor()[None]).to(synthesizer.device)
        shape = (len(synthesizer.codec.latent_mean), *condition.shape[2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None].to(synthesizer.device)
        synthesizer.denoiser.eval()
        volume = inferer.sample(
            noise, synthesizer.codec, denoiser, conditioning=condition, mode="concat", verbose=False,
            cfg=None if guidance.scale == 1 else guidance.scale, cfg_fill_value=guidance.null_value,
        )  # fmt: skip
        return volume[0].clamp(0, 1).cpu()

    return sample


class CallCounter:
    """Counts how often the denoiser sees a volume; in a batch of two, twice."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.num_calls = 0
        denoiser.register_forward_pre_hook(self._count)

    def of(self, arm: Arm, mask: str) -> int:
        """Return how many calls an arm makes for a volume."""
        self.num_calls = 0
        arm(mask, 0)
        return self.num_calls

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.num_calls += len(inputs[0])


def neighbours(volumes: Sequence[torch.Tensor]) -> np.ndarray:
    """Return MS-SSIM of each case's volume and the next one's (N,); NaN where volumes are too small for it."""
    whole = np.ones_like(volumes[0][:1].numpy())
    pairs = zip(volumes, [*volumes[1:], volumes[0]], strict=True)
    return np.array([likeness(one.numpy(), other.numpy(), whole) for one, other in pairs])


def summarised(
    real: Measured,
    other_features: np.ndarray,
    made: dict[str, Measured],
    seconds: dict[str, list[float]],
    counted: dict[str, int],
) -> dict[str, Any]:
    """Return the figures of the last line."""
    scaled = standardised(real.features[0])
    reference = scaled(real.features[0])
    kernels: dict[str, Kernel] = {"kid": polynomial_kernel, "gaussian": gaussian_kernel(median_distance(reference))}
    summary: dict[str, Any] = {}
    for kernel_name, kernel in kernels.items():
        between = {
            arm: [similarities(reference, scaled(features), kernel) for features in found.features]
            for arm, found in made.items()
        }
        distances = {arm: [paired_squared_mmd(one) for one in found] for arm, found in between.items()}
        prefix = "" if kernel_name == "kid" else f"{kernel_name}_"
        summary |= {
            f"{prefix}mmd_ratio": rounded(median_ratio(between)),
            f"{prefix}mmd_ratio_interval": interval(lambda w, b=between: median_ratio(b, w), len(reference)),
            **{f"{prefix}mmd_{arm}": [rounded(value) for value in found] for arm, found in distances.items()},
            f"{prefix}mmd_train": rounded(squared_mmd(similarities(reference, scaled(other_features), kernel))),
        }
        if kernel_name == "kid":
            better = min(("ddim", "monai"), key=lambda arm: np.median(distances[arm]))
    per_volume = {arm: float(np.mean(found)) for arm, found in seconds.items()}
    alike = {"real": real.alike, **{arm: found.alike for arm, found in made.items()}}
    return {
        "time_ratio": rounded(per_volume["ours"] / per_volume[better]),
        "better": better,
        **summary,
        **{f"seconds_{arm}": rounded(value) for arm, value in per_volume.items()},
        **{f"calls_{arm}": value for arm, value in counted.items()},
        **{f"ms_ssim_{name}": rounded(float(np.mean(values))) for name, values in alike.items()},
        **{f"ms_ssim_{name}_interval": mean_interval(np.mean(values, axis=0)) for name, values in alike.items()},
        "num_cases": len(reference),
        "num_seeds": len(made["ours"].features),
        "num_threads": torch.get_num_threads(),
    }


def median_ratio(between: dict[str, list[Similarities]], weights: np.ndarray | None = None) -> float:
    """Return the median over the seeds of our squared MMD over the better of the others'; NaN where that is not > 0."""
    ratios = []
    for ours, *others in zip(between["ours"], between["ddim"], between["monai"], strict=True):
        best = min(paired_squared_mmd(one, weights) for one in others)
        ratios.append(paired_squared_mmd(ours, weights) / best if best > 0 else math.nan)
    return float(np.median(ratios))


def print_table(summary: dict[str, Any]) -> None:
    """Print a line for each arm."""
    print(f"{'':8}{'calls':>6}{'s a volume':>12}{'MMD² (KID kernel)':>22}{'MMD² (Gaussian)':>22}{'MS-SSIM':>10}")
    for arm in ("ours", "ddim", "monai"):
        distances = [
            f"{np.median(found):.3g} ({min(found):.3g} to {max(found):.3g})"
            for found in (summary[f"mmd_{arm}"], summary[f"gaussian_mmd_{arm}"])
        ]
        print(
            f"{arm:8}{summary[f'calls_{arm}']:6}{summary[f'seconds_{arm}']:12.2f}{distances[0]:>22}{distances[1]:>22}"
            f"{summary[f'ms_ssim_{arm}'] or math.nan:10.3f}"
        )
    print(
        f"real volumes: MS-SSIM {summary['ms_ssim_real'] or math.nan:.3f}; those of training are at MMD² "
        f"{summary['mmd_train']:.3g} and {summary['gaussian_mmd_train']:.3g}\n"
        f"ours over {summary['better']}: {summary['time_ratio']} of its time; MMD² ratio to the better of the two "
        f"{summary['mmd_ratio']}, 95 % {summary['mmd_ratio_interval']}"
    )


if __name__ == "__main__":
    door(main)
