"""What does activation checkpointing per block save in memory, and cost in time, in a training step of each stage?

    python benchmarks/memory.py [--short] [--config configs/plain.yaml] [--crop 64] [--latent 32]

Steps of the bundle's own configuration, `train::step`, on random volumes: stage 1 on 64³ crops with the discriminator
active, stage 2's U-Net on 32³ latents, with `use_checkpoint` off and on in turn, each in fresh processes. Medians of
three rounds; --short makes one.

Memory is the highest during the steps over that before them, when weights and the optimiser's state are there and no
gradients: activations, gradients and workspaces. On a GPU it is what PyTorch allocates; on a CPU it is the process's
resident set, read from Linux' /proc. glibc's allocator keeps freed blocks and splits them, so those processes run with
every tensor in a mapping of its own (MALLOC_MMAP_THRESHOLD_); the times come from other processes, which run without.
`total` adds weights and the optimiser's state. The last line is a JSON object.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

from fresh_process import in_fresh_process

STAGES = {"stage1": "autoencoder", "unet": "diffusion"}
# Bytes from which on glibc maps a block by itself. Setting it stops glibc from raising it to 32 MB as blocks are freed.
OWN_MAPPING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
LATE = 1_000_000  # an iteration at which every term of the loss is active
MB = 1e6


def main() -> None:
    """Measure each arm in a process of its own and print."""
    arguments = argparse.ArgumentParser(description="Peak memory and time of a step, with and without checkpointing.")
    arguments.add_argument("--short", action="store_true", help="one round instead of three")
    arguments.add_argument("--config", action="append", default=[], help="an overlay of the bundle; may be repeated")
    arguments.add_argument("--crop", type=int, default=64, help="edge of stage 1's crops in voxels")
    arguments.add_argument("--latent", type=int, default=32, help="edge of stage 2's latents in cells")
    arguments.add_argument("--arm", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.arm:
        print(json.dumps(measure(**json.loads(given.arm))))
        return

    results: dict[str, Any] = {}
    print(f"{'':8}{'checkpointing':15}{'peak MB':>9}{'total MB':>10}{'s a step':>10}")
    for name, stage in STAGES.items():
        edge = given.crop if name == "stage1" else given.latent
        arms: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(1 if given.short else 3):
            for use_checkpoint, found in arms.items():
                settings = {"use_checkpoint": use_checkpoint}
                arm = {"stage": stage, "overlays": given.config, "settings": settings, "edge": edge}
                memory = in_fresh_process(__file__, {**arm, "steps": 1}, OWN_MAPPING)
                found.append({**memory, "step_s": in_fresh_process(__file__, {**arm, "steps": 3})["step_s"]})
        medians = {
            use_checkpoint: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for use_checkpoint, found in arms.items()
        }
        for use_checkpoint, row in medians.items():
            print(
                f"{name:8}{'on' if use_checkpoint else 'off':15}"
                f"{row['peak_mb']:9.0f}{row['total_mb']:10.0f}{row['step_s']:10.2f}",
                flush=True,
            )
        for quantity, key in (("peak", "peak_mb"), ("total", "total_mb"), ("time", "step_s")):
            results[f"{name}_{quantity}_ratio"] = round(medians[True][key] / medians[False][key], 3)
        for key in ("peak_mb", "total_mb", "step_s"):
            results[f"{name}_{key}"] = [round(medians[on][key], 3 if key == "step_s" else 0) for on in (False, True)]
    print(json.dumps(results))


def measure(
    stage: str, overlays: list[str], settings: dict[str, Any], steps: int, edge: int | None = None
) -> dict[str, float]:
    """Train for a warm-up step and `steps` more, and return MB and the median of the seconds a step.

    Args:
        stage: "autoencoder" or "diffusion".
        overlays, settings: of the bundle.
        steps: at least 1.
        edge: of the cubic input, voxels or latent cells; None: of `crop_to`.
    """
    import torch
    from ignite.engine import Engine

    from latdiff3d import config
    from latdiff3d.simulated_memory import NETWORKS, random_batch

    if stage == "diffusion":
        settings = {**settings, "first_stage_codec": "@codec"}  # an untrained one: its batches are latents already
    parser = config.training_workflow(overlays, settings, stage).parser
    if edge is not None:
        factor = parser.get_parsed_content("codec").factor if stage == "diffusion" else 1
        parser = config.training_workflow(overlays, {**settings, "crop_to": [edge * factor] * 3}, stage).parser
    device = parser.get_parsed_content("device")
    torch.manual_seed(0)
    bare = memory_now(device)
    step = parser.get_parsed_content("train::step")
    networks = [parser.get_parsed_content(name) for name in NETWORKS[stage]]
    average = copy.deepcopy(networks[0]) if "ema" in parser["train"] else None  # whose handler would ask for the data
    batch = random_batch(stage, parser)
    engine = Engine(step)
    group = parser.get_parsed_content("accumulate_grad_batches")
    engine.state.epoch_length = 2 * LATE * group

    seconds = []
    for warmed_up in [False] + [True] * steps:
        for network in networks:
            network.zero_grad(set_to_none=True)
        before = memory_now(device)
        begun = time.perf_counter()
        for number in dict.fromkeys((1, group)):  # the first and the last batch of an update
            engine.state.iteration = LATE * group + number
            step(engine, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if warmed_up:
            seconds.append(time.perf_counter() - begun)
    peak = highest_memory(device)
    del average
    return {
        "peak_mb": (peak - before) / MB,
        "total_mb": (peak - bare) / MB,
        "step_s": statistics.median(seconds),
    }


def memory_now(device: Any) -> int:
    """Return the bytes in use: allocated on a GPU, else the process's resident set."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def highest_memory(device: Any) -> int:
    """Return the most bytes that were in use since the process began."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


if __name__ == "__main__":
    main()
