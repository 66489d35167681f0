"""What the processes of one run agree on: sums, means and gradients over all ranks; on one process, nothing to do."""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
from ignite import distributed as idist
from torch import distributed as dist

from latdiff3d.errors import InputError, place_error, root_input_error

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


# How long a rank waits for the others, of which the first alone measures and writes; torchrun ends them sooner.
TIMEOUT = timedelta(minutes=30)


def start() -> None:
    """Join the processes that a launcher such as torchrun has started, if it started several.

    NCCL carries their messages between GPUs, gloo between CPUs.

    Raises:
        InputError: no way to the others, or fewer GPUs than processes here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = torch.cuda.device_count()
    if num_gpus and local_rank >= num_gpus:
        raise InputError(
            f"process {local_rank} of this machine finds {num_gpus} GPUs; start as many at most, --nproc_per_node "
            f"{num_gpus}, or none on GPUs: CUDA_VISIBLE_DEVICES=''."
        )
    if num_gpus:
        torch.cuda.set_device(local_rank)
    if "SLURM_JOB_ID" in os.environ:  # Ignite would take SLURM's number of torchrun itself for that of its processes
        os.environ["SLURM_LOCALID"] = str(local_rank)
    try:
        store, rank_here, num = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(_life(), store)
        dist.init_process_group(
            "nccl" if num_gpus else "gloo", timeout=TIMEOUT, store=store, rank=rank_here, world_size=num
        )
        idist.sync()  # Ignite's metrics look for the group at their first use; all ranks have to be there
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        wanted = os.environ["WORLD_SIZE"]
        raise InputError(f"WORLD_SIZE is {wanted}, but the others are not found ({reason}); use torchrun.") from error


def end() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them, from 0 on."""
    return dist.get_rank() if num_ranks() > 1 else 0


def gather(value: T) -> list[T]:
    """Return what each rank gives, in the order of the ranks; who comes first waits for the last."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def together(call: Callable[[], T]) -> list[T]:
    """Return what `call` returns on each rank; nobody goes on before all are there.

    Raises:
        InputError: on all ranks, what one of them refuses, so that none waits in vain.
    """
    result: Any = None
    cause: Exception | None = None
    mistake: InputError | None = None
    try:
        result = call()
    except Exception as error:
        cause, mistake = error, root_input_error(error) or place_error(error)
        if mistake is None:
            raise
    for problem in gather(None if mistake is None else str(mistake)):
        if problem is not None:
            raise InputError(problem) from cause
    return gather(result)


def shared(things: Sequence[K], function: Callable[[K], T]) -> dict[K, T]:
    """Return `function` of each thing on all ranks, each doing its share, in threads.

    Raises:
        InputError: see `together`.
    """

    def own_share() -> dict[K, T]:
        own = things[rank() :: num_ranks()]
        with ThreadPoolExecutor() as pool:
            return dict(zip(own, pool.map(function, own), strict=True))

    return {thing: value for share in together(own_share) for thing, value in share.items()}


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over all ranks, without a gradient; `tensor` itself stays as it is."""
    if num_ranks() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a floating-point `tensor` over all ranks, without a gradient."""
    return sum_over_ranks(tensor) / num_ranks()


def any_rank(happened: bool) -> bool:
    """Say whether something happened on any rank; all have to ask."""
    if num_ranks() == 1:
        return happened
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_ranks(torch.tensor(float(happened), device=device)) > 0)


@torch.no_grad()
def same_as_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give all ranks the first one's values, in place."""
    if num_ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks, in one message, of which it becomes a part.

    A step looks at a network several times and takes gradients on the way (the adaptive weight, the discriminator's
    two looks), which DistributedDataParallel's hooks are not made for; the mean is the same.
    """
    if num_ranks() == 1:
        return
    given = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for _, gradient in given])  # (n,), the one copy made
    dist.all_reduce(flat)
    flat /= num_ranks()
    means = flat.split([gradient.numel() for _, gradient in given])
    for (parameter, gradient), mean in zip(given, means, strict=True):
        parameter.grad = mean.view_as(gradient)


def _life() -> str:
    """Return a name for this start of the processes, in which torchrun may start them again and again.

    Its agent keeps one store through all of them, where a process would find the addresses of those before it, which
    are gone (pytorch/pytorch#135712). Several machines' agents count restarts each for itself, so that no name is the
    same on all of them; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun take a new store each time.
    """
    is_alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if is_alone else "start"
