"""How much faster do two ranks train than one, and what would keep 8, 64 or 512 GPUs from it?

    python benchmarks/scaling.py [--short] [--alternatives] [--config configs/hippocampus.yaml] [--gpu-step-s 0.05]

Steps of the configuration's `train::step` on random batches in float32 on the CPU, each process with `--threads` of its
own: stage 2's U-Net, and stage 1 with the discriminator active, as docs/benchmarks/hippocampus.md trains them. In turn,
blocks of steps of one process alone, of two independent ones side by side, and of two ranks that train together, each
after a step that does not count, for an idle process's memory grows cold; medians of five rounds, of two with --short.
What two independent ones reach together is the host's ceiling: cores share their memory and clock.
`share_2_if_waiting` is what is left of it where the same two, in each step, wait for the slower, as ranks have to.

Beside that: the bytes and messages of a step, counted in the collectives and on the loopback, and the time of the
all-reduce alone. --alternatives compares our update with PyTorch's other ways, see sharding.py. The table for many GPUs
is a model, see scaling_model.py: of the bytes counted here, of links as given, and of a step that computes as long as
here, or for `--gpu-step-s`. The last line is a JSON object.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import scaling_model as model
import sharding
import torch
from ignite.engine import Engine
from memory import LATE
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from latdiff3d import config, distributed
from latdiff3d.config import CONFIG_FOLDER
from latdiff3d.simulated_memory import random_batch

STAGES = {"unet": "diffusion", "stage1": "autoencoder"}
NUM_RANKS = 2
NUMS_GPUS = (8, 64, 512)
SCALAR_BYTES = 1024  # a message up to this is one of a few numbers, not of gradients
MB = 1e6


def main() -> None:
    """Measure each stage, then the alternatives, and print the model's table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--short", action="store_true", help="2 rounds of 1 step instead of 5 of 3")
    arguments.add_argument("--config", action="append", help="an overlay; default: the Hippocampus recipe")
    arguments.add_argument("--threads", type=int, default=1, help="of each process")
    arguments.add_argument("--latent", type=int, help="edge of stage 2's latents in cells; default: the crop's")
    arguments.add_argument("--crop", type=int, help="edge of stage 1's crops in voxels; default: the crop's")
    arguments.add_argument("--stage", choices=STAGES, action="append", help="measure this one alone; may be repeated")
    arguments.add_argument("--alternatives", action="store_true", help="compare PyTorch's other ways for stage 2")
    arguments.add_argument("--gpu-step-s", type=float, nargs="+", default=[0.01, 0.05, 0.2], help="assumed, on a GPU")
    links = model.Links()
    arguments.add_argument("--node-size", type=int, default=links.node_size, help="GPUs of a node")
    arguments.add_argument("--node-gb-s", type=float, default=links.node_gb_s, help="within a node, one direction")
    arguments.add_argument("--network-gb-s", type=float, default=links.network_gb_s, help="of a node, one direction")
    given = arguments.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "CUDA_VISIBLE_DEVICES": ""}  # of the processes started here

    figures: dict[str, Any] = {"threads": given.threads}
    for name in given.stage or STAGES:
        found = measured(name, given)
        figures |= found if name == "unet" else {f"{name}_{key}": value for key, value in found.items()}
    if given.alternatives:
        figures["alternatives"] = alternatives(given)
    if "gradient_mb" in figures:
        figures["model"] = extrapolated(figures, given)
    print(json.dumps(figures))


class Worker:
    """A process that trains on its own, or as a rank of two, whenever it is asked to; it costs nothing until then."""

    def __init__(self, stage: str, given: argparse.Namespace, rank: int = 0, port: int | None = None) -> None:
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        edge = given.crop if stage == "autoencoder" else given.latent
        settings = (other, stage, given.config or recipe(stage), edge, given.threads, rank, port)
        self.process = context.Process(target=serve, args=settings, daemon=True)
        self.process.start()
        other.close()

    def close(self) -> None:
        """Let the process end."""
        self.connection.send(None)
        self.process.join()


def recipe(stage: str) -> list[Any]:
    """Return the overlays that docs/benchmarks/hippocampus.md trains a stage with."""
    return [CONFIG_FOLDER / "hippocampus.yaml", CONFIG_FOLDER / f"hippocampus_{stage}.yaml"]


def asked(workers: Sequence[Worker], what: str, *arguments: Any) -> list[Any]:
    """Let each worker do the same at once, and return what each one found."""
    for worker in workers:
        worker.connection.send((what, arguments))
    try:
        return [worker.connection.recv() for worker in workers]
    except EOFError:
        sys.exit("a process that trains has failed; its own words are above.")


def two_ranks(stage: str, given: argparse.Namespace) -> list[Worker]:
    """Start two ranks of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Worker(stage, given, rank, port) for rank in range(NUM_RANKS)]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Race one process, two independent ones and two ranks of a stage, print, and return its figures."""
    stage = STAGES[name]
    num_rounds, num_steps = (2, 1) if given.short else (5, 3)
    independent, ranks = [Worker(stage, given) for _ in range(NUM_RANKS)], two_ranks(stage, given)
    arms = {"alone": independent[:1], "side by side": independent, "two ranks": ranks}
    rates, cpu_s, waiting, loopback = race(arms, num_rounds, num_steps)
    messages = asked(ranks, "messages")[0]
    gradient_bytes = sum(size for size in messages if size > SCALAR_BYTES)
    reduce_s = max(asked(ranks, "all_reduce", gradient_bytes, num_rounds))
    [batch_size], [flop] = asked(independent[:1], "num_samples"), asked(independent[:1], "flop")
    for worker in (*independent, *ranks):
        worker.close()

    alone, ceiling, together = (statistics.median(rates[arm]) for arm in arms)
    shares = [two / both for two, both in zip(rates["two ranks"], rates["side by side"], strict=True)]
    figures = {
        "speedup_2": round(together / alone, 3),
        "host_ceiling_2": round(ceiling / alone, 3),
        "share_2": round(together / ceiling, 3),
        "share_2_range": [round(min(shares), 3), round(max(shares), 3)],
        "share_2_if_waiting": round(statistics.median(waiting["side by side"]), 3),
        "share_2_model": round(model.efficiency(NUM_RANKS * batch_size / ceiling, reduce_s), 3),
        "step_s": round(batch_size / alone, 3),
        "cpu_s": [round(statistics.median(cpu_s[arm]), 3) for arm in ("side by side", "two ranks")],
        "gflop": round(flop / 1e9, 2),
        "num_messages": len(messages),
        "num_scalars": sum(size <= SCALAR_BYTES for size in messages),
        "gradient_mb": gradient_bytes / MB,
        "sent_mb": round(model.ring_bytes(sum(messages), NUM_RANKS) / MB, 4),
        "loopback_mb": round(statistics.median(loopback) / MB, 4),
        "all_reduce_s": round(reduce_s, 4),
    }
    print(f"{name}: samples/s alone {alone:.3f}, two side by side {ceiling:.3f}, two ranks {together:.3f}")
    print(
        "  two ranks reach {share_2} of two independent ones; in the rounds {share_2_range[0]} to {share_2_range[1]}\n"
        "  independent ones that waited for each other after each step would reach {share_2_if_waiting}\n"
        "  CPU time of a process, a step: {cpu_s[0]} s, of a rank {cpu_s[1]} s\n"
        "  a step: {gflop} GFLOP; {num_messages} messages, of which {num_scalars} of a few numbers\n"
        "  a rank sends {sent_mb} MB in a ring; on the loopback it sent {loopback_mb} MB\n"
        "  the all-reduce alone: {all_reduce_s} s; by the model two ranks would reach {share_2_model}".format(
            **figures
        ),
        flush=True,
    )
    return figures


def race(
    arms: dict[str, list[Worker]], num_rounds: int, num_steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Let each arm's workers train in turn.

    Returns:
        For each arm and round the samples/s of its workers together, the CPU seconds of one of them a step, and the
        share of those samples/s that would be left if each step took as long as the slowest worker's; and for each
        round the bytes that a worker of the last arm sent over the loopback in a step.
    """
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    cpu_s: dict[str, list[float]] = {arm: [] for arm in arms}
    waiting: dict[str, list[float]] = {arm: [] for arm in arms}
    sent = []
    for _ in range(num_rounds):
        for arm, workers in arms.items():
            asked(workers, "train", 1)
            before = sharding.loopback_bytes()
            found = asked(workers, "train", num_steps)
            rates[arm].append(sum(rate for rate, _, _ in found))
            cpu_s[arm].append(statistics.mean(seconds for _, seconds, _ in found))
            steps = [step_s for _, _, step_s in found]
            independent = sum(num_steps / sum(own) for own in steps)
            waiting[arm].append(len(steps) * num_steps / sum(map(max, *steps)) / independent if len(steps) > 1 else 1.0)
        sent.append((sharding.loopback_bytes() - before) / len(workers) / num_steps)
    return rates, cpu_s, waiting, sent


def alternatives(given: argparse.Namespace) -> dict[str, Any]:
    """Compare the ways of sharding.py on two ranks, print them, and return their figures."""
    ranks = two_ranks("diffusion", given)
    found: dict[str, dict[str, float]] = asked(ranks, "compare", 3 if given.short else 5)[0]
    for worker in ranks:
        worker.close()
    columns = {"step_s": "s a step", "cpu_s": "CPU s", "sent_mb": "sent MB", "weights_mb": "weights MB"}
    columns |= {"gradients_mb": "gradients MB", "state_mb": "state MB"}
    columns |= {"difference": "difference", "difference_of_way": "of the way"}
    print(f"{'':18}" + "".join(f"{title:>14}" for title in columns.values()))
    for name, row in found.items():
        print(f"{name:18}" + "".join(f"{row[key]:14.3g}" for key in columns))
    for name, row in found.items():
        if row["difference"] > 1e-5:
            print(f"{name} ends with other weights than ours: {row['difference']:.2g}; expected 1e-5 at most.")
    return {name: {key: float(f"{value:.4g}") for key, value in row.items()} for name, row in found.items()}


def extrapolated(figures: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Print the model's table for stage 2, and return its efficiencies and limits by assumed seconds a step."""
    links = model.Links(given.node_size, given.node_gb_s, given.network_gb_s)
    print(
        f"\na model, nothing of it measured on a GPU: {figures['gradient_mb']:.1f} MB of gradients, nodes of "
        f"{links.node_size}, {links.node_gb_s:g} GB/s within and {links.network_gb_s:g} GB/s between them"
    )
    print(f"{'computing s':>12}{'GPUs':>6}{'one message ms':>16}{'efficiency':>12}{'buckets ms':>12}{'efficiency':>12}")
    summary: dict[str, Any] = {}
    for compute_s in (figures["step_s"], *given.gpu_step_s):
        step = model.Step(compute_s, figures["gradient_mb"] * MB, figures["num_scalars"])
        rows = model.rows(step, links, NUMS_GPUS)
        for row in rows:
            print(
                f"{compute_s:12.3f}{row['gpus']:6.0f}{1e3 * row['flat_s']:16.2f}{row['efficiency']:12.3f}"
                f"{1e3 * row['bucketed_s']:12.2f}{row['efficiency_bucketed']:12.3f}"
            )
        summary[f"{compute_s:g}"] = {
            "efficiency": [round(row["efficiency"], 3) for row in rows],
            "efficiency_bucketed": [round(row["efficiency_bucketed"], 3) for row in rows],
            "below_0.9_at": model.limit(step, links),
            "below_0.9_at_bucketed": model.limit(step, links, bucketed=True),
            "shortest_step_s": [round(row["shortest_step_s"], 4) for row in rows],
        }
    return summary


def serve(
    connection: Connection, stage: str, overlays: list[Any], edge: int | None, threads: int, rank: int, port: int | None
) -> None:
    """Be a worker: do what is asked until asked to end."""
    if port is not None:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
        os.environ |= meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(threads)
    distributed.start()
    training = Training(stage, overlays, edge)
    while (order := connection.recv()) is not None:
        what, arguments = order
        connection.send(getattr(training, what)(*arguments))
    distributed.end()


class Training:
    """A stage's step and a random batch for it.

    Args:
        stage: "autoencoder" or "diffusion".
        overlays: of the bundle.
        edge: of the cubic input; None: that of the configuration's crop.
    """

    def __init__(self, stage: str, overlays: list[Any], edge: int | None) -> None:
        self.stage, self.overlays = stage, overlays
        parser = self.fresh_parser()
        self.step = parser.get_parsed_content("train::step")
        factor = parser.get_parsed_content("codec").factor if stage == "diffusion" else 1
        sized = self.fresh_parser()
        if edge is not None:
            sized["crop_to"] = [edge * factor] * 3
        self.batch = random_batch(stage, sized)
        self.engine = Engine(lambda engine, batch: None)
        self.engine.state.iteration = LATE

    def fresh_parser(self) -> Any:
        """Return the stage's configuration, of which nothing is built yet."""
        settings: dict[str, Any] = {"precision": "fp32"}
        if self.stage == "diffusion":
            settings["first_stage_codec"] = "@codec"  # an untrained one: the step's batches are latents already
        torch.manual_seed(0)
        return config.training_workflow(self.overlays, settings, self.stage).parser

    def num_samples(self) -> int:
        """Return how many volumes a batch holds."""
        return len(next(iter(self.batch.values())))

    def train(self, num_steps: int) -> tuple[float, float, list[float]]:
        """Return the samples/s of `num_steps` steps, the CPU seconds of one, and the seconds that each took.

        Other programs disturb CPU seconds less.
        """
        cpu_begun, ends = time.process_time(), [time.perf_counter()]
        for _ in range(num_steps):
            self.engine.state.iteration += 1
            self.step(self.engine, self.batch)
            ends.append(time.perf_counter())
        cpu_s = time.process_time() - cpu_begun
        step_s = [end - begun for begun, end in itertools.pairwise(ends)]
        return num_steps * self.num_samples() / sum(step_s), cpu_s / num_steps, step_s

    def flop(self) -> int:
        """Return the multiplications and additions of a step's convolutions and products, counted as they run."""
        with FlopCounterMode(display=False) as counter:
            self.train(1)
        return counter.get_total_flops()

    def messages(self) -> list[int]:
        """Return the bytes of each message of a step."""
        sizes = []
        all_reduce = dist.all_reduce

        def counted(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
            sizes.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *arguments, **settings)

        with mock.patch.object(dist, "all_reduce", counted):
            self.train(1)
        return sizes

    def all_reduce(self, num_bytes: int, num_times: int) -> float:
        """Return the median seconds of the all-reduce of so many bytes."""
        gradients = torch.zeros(num_bytes // 4)
        seconds = []
        for _ in range(1 + num_times):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(gradients)
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[1:])

    def compare(self, num_rounds: int) -> dict[str, dict[str, float]]:
        """Return what each way of sharding.py takes."""
        return sharding.compare(lambda: self.fresh_parser().get_parsed_content("train::step"), self.batch, num_rounds)


if __name__ == "__main__":
    main()
