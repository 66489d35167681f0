"""How much of many GPUs would training use? A model of a step's communication, from bytes and the speed of the links.

Every rank has a batch of its own size (weak scaling); a step computes for so many seconds, then the ranks average their
gradients. Efficiency is the share of the step that computes. No GPU is measured here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_GPUS = 4096  # how far `limit` looks


@dataclass(frozen=True)
class Links:
    """What connects the GPUs, and what they hold a step's gradients in.

    Attributes:
        node_size: GPUs of a node.
        node_gb_s: GB/s in one direction between the GPUs of a node. NVLink 4: 900 GB/s in both (NVIDIA H100 data
            sheet).
        network_gb_s: GB/s in one direction of all a node's ports together. One port of 400 Gb/s, InfiniBand NDR, as of
            a ConnectX-7; NVIDIA's DGX H100 has eight of them.
        node_latency_us, network_latency_us: of one hop. NCCL's own tuning table has these for its ring in the Simple
            protocol (src/graph/tuning.cc, hwLat, at commit 01afd20).
        memory_gb_s: GB/s of a GPU's memory, for copies. H100 SXM: 3350 (the same data sheet).
    """

    node_size: int = 8
    node_gb_s: float = 450.0
    network_gb_s: float = 50.0
    node_latency_us: float = 3.4
    network_latency_us: float = 9.6
    memory_gb_s: float = 3350.0


@dataclass(frozen=True)
class Step:
    """What a step does on each rank, as it is measured or assumed.

    Attributes:
        compute_s: seconds of forward, backward and the optimiser.
        gradient_bytes: what is averaged over the ranks.
        num_scalars: messages of a few bytes beside it, such as the loss.
        backward_share: of `compute_s`, during which gradients become ready one after another. Two products a layer
            to one of the forward.
        bucket_bytes: of a bucket that is sent as soon as it is full. DistributedDataParallel's default: 25 MiB.
    """

    compute_s: float
    gradient_bytes: float
    num_scalars: int = 0
    backward_share: float = 2 / 3
    bucket_bytes: float = 25 * 2**20


def ring_bytes(num_bytes: float, num_ranks: int) -> float:
    """Return what each rank sends, and receives, in an all-reduce of `num_bytes` around a ring."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def all_reduce_s(num_bytes: float, num_gpus: int, links: Links) -> float:
    """Return the seconds of a ring all-reduce.

    The ring enters and leaves each node once, so its slowest link sets the pace. Each of its 2 (N − 1) rounds waits for
    a hop, 2 (nodes − 1) of them between nodes: NCCL's model of itself, in src/graph/tuning.cc.
    """
    if num_gpus == 1 or num_bytes == 0:
        return 0.0
    num_nodes = math.ceil(num_gpus / links.node_size)
    slowest = links.node_gb_s if num_nodes == 1 else min(links.node_gb_s, links.network_gb_s)
    hops_between = 2 * (num_nodes - 1)
    hops_within = 2 * (num_gpus - 1) - hops_between
    latency_us = hops_within * links.node_latency_us + hops_between * links.network_latency_us
    return ring_bytes(num_bytes, num_gpus) / (slowest * 1e9) + latency_us * 1e-6


def scalar_s(num_gpus: int, links: Links) -> float:
    """Return the seconds of an all-reduce of a few bytes, for which NCCL takes a tree: up it and down again."""
    num_nodes = math.ceil(num_gpus / links.node_size)
    hops_within = min(num_gpus, links.node_size) - 1
    hops_between = math.ceil(math.log2(num_nodes))
    return 2e-6 * (hops_within * links.node_latency_us + hops_between * links.network_latency_us)


def flat_s(step: Step, num_gpus: int, links: Links) -> float:
    """Return the seconds a step communicates as it is now: after the backward, all gradients in one message.

    They are copied into it, and divided there, which reads and writes them twice.
    """
    copies_s = 0.0 if num_gpus == 1 else 4 * step.gradient_bytes / (links.memory_gb_s * 1e9)
    reduction_s = all_reduce_s(step.gradient_bytes, num_gpus, links)
    return copies_s + reduction_s + step.num_scalars * scalar_s(num_gpus, links)


def bucketed_s(step: Step, num_gpus: int, links: Links) -> float:
    """Return the seconds by which a step is longer where buckets of gradients are sent during the backward.

    Buckets fill at equal intervals; each waits for the one before it. The last fills as the backward ends.
    """
    scalars_s = step.num_scalars * scalar_s(num_gpus, links)
    if step.gradient_bytes == 0:
        return scalars_s
    num_buckets = math.ceil(step.gradient_bytes / step.bucket_bytes)
    bucket_s = all_reduce_s(step.gradient_bytes / num_buckets, num_gpus, links)
    interval_s = step.backward_share * step.compute_s / num_buckets
    return bucket_s + (num_buckets - 1) * max(0.0, bucket_s - interval_s) + scalars_s


def efficiency(compute_s: float, communication_s: float) -> float:
    """Return the share of a step that computes."""
    return compute_s / (compute_s + communication_s)


def limit(step: Step, links: Links, least: float = 0.9, bucketed: bool = False) -> int | None:
    """Return the first power of two of GPUs at which efficiency is below `least`; None if it is not up to 4096."""
    num_gpus = 2
    while num_gpus <= MOST_GPUS:
        lost_s = (bucketed_s if bucketed else flat_s)(step, num_gpus, links)
        if efficiency(step.compute_s, lost_s) < least:
            return num_gpus
        num_gpus *= 2
    return None


def rows(step: Step, links: Links, nums_gpus: Sequence[int]) -> list[dict[str, float]]:
    """Return a row of the table for each number of GPUs.

    `shortest_step_s` is the least computing with which one flat message leaves an efficiency of 0.9.
    """
    found = []
    for num_gpus in nums_gpus:
        flat, bucketed = flat_s(step, num_gpus, links), bucketed_s(step, num_gpus, links)
        found.append(
            {
                "gpus": num_gpus,
                "flat_s": flat,
                "bucketed_s": bucketed,
                "efficiency": efficiency(step.compute_s, flat),
                "efficiency_bucketed": efficiency(step.compute_s, bucketed),
                "shortest_step_s": 9 * flat,
            }
        )
    return found
