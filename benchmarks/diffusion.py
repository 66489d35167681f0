"""How many samples a second does stage 2 train on: encoding anew at every step in float32, or from the latent cache?

    python benchmarks/diffusion.py --data DATA --run runs/ae [--config configs/hippocampus.yaml] [--short]

Three arms of one U-Net and one batch size, in turn in one process, in blocks of steps; loading is timed too:

- recipe: as MONAI's 3D latent diffusion tutorial has it: the images are kept in memory, and each step crops and encodes
  them; float32, attention spelt out, PyTorch's own convolutions, AutoencoderKL with (32, 64, 64) channels and one
  residual block a level, without its attention, which would only take longer. Its weights are random, which changes no
  time; its latents have the size of ours.
- same_codec: the same steps with our codec, so that its share in the difference is seen.
- ours: the latent cache, bfloat16 where the processor has it, PyTorch's scaled dot-product attention, our convolutions.

What a cache gains depends on how much of a step is left to the U-Net, so there are two of them: the configured one,
and the tutorial's, with (32, 64, 64) channels.

Prints the medians of the blocks, what a step's parts take, and what building the cache takes in time and disk, with the
number of steps after which it has paid for itself. `--run` is stage 1's run; what is missing of it is trained. The
cache is built beside it, anew, and deleted at the end. The last line is a JSON object: of the configured U-Net, and,
under `tutorials_unet`, of the other.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from latdiff3d import checkpoints, runs
from latdiff3d.cli import door
from latdiff3d.codec import LatentCodec
from latdiff3d.config import CONFIG_FOLDER, training_workflow
from latdiff3d.cpu_convolutions import without_cpu_convolutions
from latdiff3d.training import latent_batch

PEERS = {"encode": "on_the_fly", "precision": "fp32", "denoiser_def::use_flash_attention": False}
ARMS: dict[str, dict[str, Any]] = {
    "recipe": PEERS,
    "same_codec": PEERS,
    "ours": {"encode": "cached", "denoiser_def::use_flash_attention": True},
}
MONAI_CHANNELS, MONAI_NORM_NUM_GROUPS = [32, 64, 64], 16
TUTORIALS_UNET = {
    "denoiser_def::channels": MONAI_CHANNELS,
    "denoiser_def::attention_levels": [False, True, True],
    "denoiser_def::num_head_channels": [0, 64, 64],
}
BATCH_SIZE = 8
WARM_UP = 2  # steps


def main() -> None:
    """Build both arms, let them train in turn, and print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--data", required=True, help="the data set's folder")
    arguments.add_argument("--run", required=True, help="stage 1's run; trained there if there is none")
    arguments.add_argument("--config", default=str(CONFIG_FOLDER / "hippocampus.yaml"), help="overlay for the data set")
    arguments.add_argument("--short", action="store_true", help="3 blocks of 3 steps instead of 9 of 10")
    given = arguments.parse_args()
    num_blocks, num_steps = (3, 3) if given.short else (9, 10)
    if not (Path(given.run) / checkpoints.FOLDER / "best.pt").is_file():
        overlays = [given.config, CONFIG_FOLDER / "hippocampus_autoencoder.yaml"]
        runs.start(overlays, [], {"dataset_dir": given.data, "run_dir": given.run}, "autoencoder")

    with tempfile.TemporaryDirectory(dir=Path(given.run).parent) as cache:
        seconds, start_s = compared(given, {}, cache, num_blocks, num_steps)
        cache_bytes = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
        building = building_figures(seconds, start_s, cache_bytes)
        print(
            f"the cache: built in {building['cache_s']:.1f} s, networks and all; {building['cache_gb']:.3f} GB; "
            f"paid for after {building['paid_after_steps']} steps"
        )
        print("with the tutorial's U-Net, the cache being there:")
        of_tutorials, _ = compared(given, TUTORIALS_UNET, cache, num_blocks, num_steps)
    print(json.dumps({**speeds(seconds), **building, "tutorials_unet": speeds(of_tutorials)}))


def compared(
    given: argparse.Namespace, unet: dict[str, Any], cache: str, num_blocks: int, num_steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Build the arms of one U-Net and let them train in turn.

    Prints what a step of each takes, and returns the seconds a step of each arm's blocks, and of its start.
    """
    arms: dict[str, Arm] = {}
    start_s: dict[str, float] = {}
    for name in reversed(ARMS):  # ours first: the recipe's autoencoder is to have its downsampling
        set_determinism(0)
        settings = {**ARMS[name], **(tutorials_codec(arms["ours"].step.codec) if name == "recipe" else {}), **unet}
        begun = time.perf_counter()
        arms[name] = Arm(given, {**settings, "latent_cache": cache})
        start_s[name] = time.perf_counter() - begun
    for name in ("recipe", "same_codec"):
        without_cpu_convolutions(arms[name].step.denoiser)
        without_cpu_convolutions(arms[name].step.codec)
    for arm in arms.values():
        arm.train(WARM_UP)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(num_blocks):
        for name, arm in arms.items():
            seconds[name].append(arm.train(num_steps) / num_steps)
    print_table(seconds, {name: arms[name].parts(num_steps) for name in ARMS}, start_s)
    return seconds, start_s


class Arm:
    """A stage 2 as configured, with its data set in memory or in the cache, that trains step by step."""

    def __init__(self, given: argparse.Namespace, settings: dict[str, Any]) -> None:
        named = {"dataset_dir": given.data, "first_stage": given.run, "batch_size": BATCH_SIZE, **settings}
        self.parser: ConfigParser = training_workflow([given.config], named, "diffusion").parser
        self.loader = self.parser.get_parsed_content("train::dataloader")
        self.step = self.parser.get_parsed_content("train::step")
        self.step.codec.requires_grad_(False).eval().num_volumes.fill_(1)  # the recipe's is random, and not measured
        self.batches = self.endless()
        self.engine = SimpleNamespace(state=SimpleNamespace(iteration=0))

    def endless(self) -> Iterator[dict[str, Any]]:
        """Yield epoch after epoch."""
        while True:
            yield from self.loader

    def train(self, num_steps: int) -> float:
        """Return the seconds that so many steps take, loading included."""
        begun = time.perf_counter()
        for _ in range(num_steps):
            self.engine.state.iteration += 1
            self.step(self.engine, next(self.batches))
        wait_for(self.step.device)
        return time.perf_counter() - begun

    def parts(self, num_batches: int) -> tuple[float, float]:
        """Return the median seconds of loading a batch, and of encoding it or taking it as it is."""
        loading, encoding = [], []
        for _ in range(num_batches):
            times = [time.perf_counter()]
            batch = next(self.batches)
            times.append(time.perf_counter())
            latent_batch(batch, self.step.codec, self.step.condition, self.step.device)
            wait_for(self.step.device)
            times.append(time.perf_counter())
            loading.append(times[1] - times[0])
            encoding.append(times[2] - times[1])
        return statistics.median(loading), statistics.median(encoding)


def tutorials_codec(codec: LatentCodec) -> dict[str, Any]:
    """Return the settings of MONAI's AutoencoderKL, with the downsampling that `codec` has."""
    num_levels = codec.factor.bit_length()  # factor 2^(levels − 1)
    return {
        "first_stage_codec": "@codec",
        "wavelet_levels": 0,
        "latent_noise": 0,
        "autoencoder_def::channels": (MONAI_CHANNELS + MONAI_CHANNELS[-1:] * num_levels)[:num_levels],
        "autoencoder_def::attention_levels": [False] * num_levels,
        "autoencoder_def::norm_num_groups": MONAI_NORM_NUM_GROUPS,
        "autoencoder_def::num_res_blocks": 1,
    }


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return how fast the arms of one U-Net are, of the seconds a step of each block."""
    step_s = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = [recipe / ours for recipe, ours in zip(seconds["recipe"], seconds["ours"], strict=True)]
    return {
        "train_speedup": round(step_s["recipe"] / step_s["ours"], 2),
        "train_speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "train_speedup_same_codec": round(step_s["same_codec"] / step_s["ours"], 2),
        **{f"{name}_samples_per_s": round(BATCH_SIZE / value, 2) for name, value in step_s.items()},
    }


def building_figures(seconds: dict[str, list[float]], start_s: dict[str, float], cache_bytes: int) -> dict[str, Any]:
    """Return what building the cache took, and after how many steps it has paid for itself."""
    saved_s = statistics.median(seconds["recipe"]) - statistics.median(seconds["ours"])
    extra_s = start_s["ours"] - start_s["recipe"]
    return {
        "cache_s": round(start_s["ours"], 1),
        "cache_gb": round(cache_bytes / 1e9, 4),
        "paid_after_steps": max(0, math.ceil(extra_s / saved_s)) if saved_s > 0 else None,
        "num_threads": torch.get_num_threads(),
    }


def print_table(
    seconds: dict[str, list[float]], parts: dict[str, tuple[float, float]], start_s: dict[str, float]
) -> None:
    """Print what a step of each arm takes, and the start."""
    print(f"{'':11}{'samples/s':>10}{'s a step':>10}{'loading':>9}{'latents':>9}{'U-Net':>8}{'s to start':>12}")
    for name, (loading, encoding) in parts.items():
        step_s = statistics.median(seconds[name])
        print(
            f"{name:11}{BATCH_SIZE / step_s:10.2f}{step_s:10.3f}{loading:9.3f}{encoding:9.3f}"
            f"{step_s - loading - encoding:8.3f}{start_s[name]:12.1f}"
        )


if __name__ == "__main__":
    door(main)
