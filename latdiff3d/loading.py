"""How batches come to the device: loaded ahead by as many workers as the machine has cores to spare."""

import os
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Dataset

AUTO = "auto"
MAX_WORKERS = 8  # each holds whole volumes; by then a GPU is seldom kept waiting, and `num_workers` may say more
PREFETCH = 2  # PyTorch's


def num_workers_for(num_workers: int | str, device: torch.device) -> int:
    """Return how many processes load ahead for this one.

    "auto" is none where the networks compute on the CPU: their threads have all the cores already, and what a worker
    takes, a step waits for. On a GPU a process takes its share of the machine's cores, less the one from which it
    feeds the GPU, up to `MAX_WORKERS`.

    Args:
        num_workers: from 0 on, or "auto".
        device: where the networks compute.
    """
    if num_workers != AUTO:
        return int(num_workers)
    if device.type == "cpu":
        return 0
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 0), MAX_WORKERS)


def loader(
    dataset: Dataset,
    device: torch.device,
    num_workers: int | str = AUTO,
    prefetch_factor: int | None = None,
    **settings: Any,
) -> DataLoader:
    """Return MONAI's loader, whose batches do not depend on how they are loaded.

    On a GPU they come in pinned memory, from which they are copied while it computes. Workers stay from one epoch to
    the next, as `batches.PerItem` allows.

    Args:
        dataset: whose items follow from their indices.
        device: where the batches are needed.
        num_workers: see `num_workers_for`.
        prefetch_factor: batches that each worker has ready; None for `PREFETCH`.
        settings: more of PyTorch's, such as a sampler.
    """
    workers = num_workers_for(num_workers, device)
    ahead: dict[str, Any] = {}
    if workers > 0:
        ahead = {"persistent_workers": True, "prefetch_factor": prefetch_factor or PREFETCH}
    elif prefetch_factor is not None:
        print(f"warning: prefetch_factor {prefetch_factor} has no effect, for there are no workers here.", flush=True)
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or another number of workers would leave other random numbers to the networks
        **ahead,
        **settings,
    )
