"""The two-rank update of the denoiser in four ways, on the same batches: what each takes in time, memory and messages.

For `benchmarks/scaling.py`, in each of two processes. Ours averages all gradients in one message after the backward.
The others are PyTorch's: buckets sent during the backward, an optimiser whose state is shared out among the ranks, and
weights, gradients and state all shared out.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ignite.engine import Engine
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from latdiff3d import updates
from latdiff3d.distributed import num_ranks, rank
from latdiff3d.training import DiffusionStep

MB = 1e6


def flat(step: DiffusionStep) -> None:
    """Leave the step as it is."""


def buckets(step: DiffusionStep) -> None:
    """Send gradients in buckets of 25 MiB, PyTorch's default, while the backward goes on."""
    step.denoiser = DistributedDataParallel(step.denoiser, gradient_as_bucket_view=True)


def sharded_optimizer(step: DiffusionStep) -> None:
    """Let each rank keep the optimiser's state of a share of the weights, step them, and send them to the others."""
    given = step.optimizer.defaults
    step.optimizer = ZeroRedundancyOptimizer(
        step.denoiser.parameters(), torch.optim.AdamW, lr=given["lr"], weight_decay=given["weight_decay"]
    )


def sharded_weights(step: DiffusionStep) -> None:
    """Let each rank keep a share of weights, gradients and state; a block's weights are gathered when it computes."""
    mesh = init_device_mesh("cpu", (num_ranks(),))
    unet: Any = step.denoiser
    for block in (*unet.down_blocks, unet.middle_block, *unet.up_blocks, unet):
        fully_shard(block, mesh=mesh)
    given = step.optimizer.defaults
    step.optimizer = torch.optim.AdamW(unet.parameters(), lr=given["lr"], weight_decay=given["weight_decay"])


# The way, and whether the step still has to average the gradients itself.
WAYS: dict[str, tuple[Callable[[DiffusionStep], None], bool]] = {
    "flat": (flat, True),
    "buckets": (buckets, False),
    "sharded_optimizer": (sharded_optimizer, True),
    "sharded_weights": (sharded_weights, False),
}


def compare(build: Callable[[], DiffusionStep], batch: dict[str, Any], num_rounds: int) -> dict[str, dict[str, float]]:
    """Train `num_rounds` updates each way, in turn, after one to warm up, and return what each way took.

    Args:
        build: makes a fresh step, whose network has no state but its weights.
        batch: of this rank.
        num_rounds: at least 1.

    Returns:
        For each way medians of a step's `step_s`, of this rank's `cpu_s`, and of `sent_mb`, what a rank sends, read
        from the loopback's counter; `weights_mb`, `gradients_mb` and `state_mb`, what a rank holds between steps; and
        the norm of the difference of its weights from those of the first way, as a share of the weights' in
        `difference` and of how far training has moved them in `difference_of_way`.
    """
    steps = {name: build() for name in WAYS}
    start = steps["flat"].denoiser.state_dict()
    for name, (change, _) in WAYS.items():
        steps[name].denoiser.load_state_dict(start)
        change(steps[name])
    before = full_weights(steps["flat"].denoiser)
    engine = Engine(lambda engine, batch: None)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu_s: dict[str, list[float]] = {name: [] for name in WAYS}
    sent: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(1 + num_rounds):
        engine.state.iteration = 1 + number
        for name, step in steps.items():
            averages_itself = WAYS[name][1]
            torch.manual_seed(num_ranks() * number + rank())
            dist.barrier()
            begun, cpu_begun, bytes_before = time.perf_counter(), time.process_time(), loopback_bytes()
            with nullcontext() if averages_itself else mock.patch.object(updates, "average_gradients", lambda _: None):
                step(engine, batch)
            dist.barrier()
            seconds[name].append(time.perf_counter() - begun)
            cpu_s[name].append(time.process_time() - cpu_begun)
            sent[name].append((loopback_bytes() - bytes_before) / num_ranks())
    expected = full_weights(steps["flat"].denoiser)
    apart = {name: (full_weights(step.denoiser) - expected).norm() for name, step in steps.items()}
    return {
        name: {
            "step_s": statistics.median(seconds[name][1:]),
            "cpu_s": statistics.median(cpu_s[name][1:]),
            "sent_mb": statistics.median(sent[name][1:]) / MB,
            "weights_mb": num_bytes(step.denoiser.parameters()) / MB,
            "gradients_mb": num_bytes(p.grad for p in step.denoiser.parameters() if p.grad is not None) / MB,
            "state_mb": num_bytes(state_tensors(step.optimizer)) / MB,
            "difference": (apart[name] / expected.norm()).item(),
            "difference_of_way": (apart[name] / (expected - before).norm()).item(),
        }
        for name, step in steps.items()
    }


def full_weights(network: nn.Module) -> torch.Tensor:
    """Return a copy of all weights, of all ranks' shares, as one vector (n,)."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in network.parameters()]
    return torch.cat([weight.detach().flatten() for weight in weights])


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return what this rank keeps beside the weights."""
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return [value for state in local.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of this rank's part of `tensors`."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def loopback_bytes() -> int:
    """Return the bytes that this machine has sent to itself, which is where two ranks on it meet; from Linux' /proc."""
    [line] = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])
