"""What the processes of one run agree on: sums, means and gradients over all ranks; on one process, nothing to do."""

from collections.abc import Iterable

import torch
from torch import distributed as dist


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks, in one message.

    A step looks at a network several times and takes gradients on the way (the adaptive weight, the discriminator's
    two looks), which DistributedDataParallel's hooks are not made for; the mean is the same.
    """
    if num_ranks() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = mean_over_ranks(flat)
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
