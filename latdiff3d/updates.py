"""One update of a network's weights: from the losses of one batch, or of a group of them, to an optimiser's step."""

from dataclasses import dataclass

import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from torch import nn

from latdiff3d.distributed import average_gradients, mean_over_ranks
from latdiff3d.errors import InputError


@dataclass(frozen=True)
class Group:
    """Where a batch stands in the group of batches that share one update.

    Attributes:
        number: of the update in the whole run, from 1 on.
        size: how many batches share it.
        is_first, is_last: of those batches.
    """

    number: int
    size: int
    is_first: bool
    is_last: bool


def group_of(engine: Engine, accumulate_grad_batches: int) -> Group:
    """Return the group of the batch that `engine` is at.

    Groups begin anew with each epoch, and what is left at its end is a smaller group of its own: so nothing is carried
    over into the next epoch, or has to be kept in a checkpoint.
    """
    if accumulate_grad_batches == 1:
        return Group(engine.state.iteration, 1, True, True)
    length = engine.state.epoch_length
    assert length is not None
    epochs, position = divmod(engine.state.iteration - 1, length)
    number, place = divmod(position, accumulate_grad_batches)
    size = min(accumulate_grad_batches, length - position + place)
    return Group(
        epochs * _num_groups(length, accumulate_grad_batches) + number + 1, size, place == 0, place == size - 1
    )


def num_updates(num_epochs: int, num_batches: int, accumulate_grad_batches: int) -> int:
    """Return the number of updates in so many epochs of `num_batches` batches each.

    Raises:
        InputError: for groups larger than an epoch.
    """
    if accumulate_grad_batches > num_batches:
        raise InputError(
            f"accumulate_grad_batches is {accumulate_grad_batches}, an epoch has {num_batches} batch(es); expected at "
            "most that, for an epoch's end ends its last group too. Lower it, or batch_size."
        )
    return num_epochs * _num_groups(num_batches, accumulate_grad_batches)


def num_updates_done(engine: Engine, accumulate_grad_batches: int) -> int:
    """Return how many updates `engine`, at an epoch's end or before the first, has made."""
    length = engine.state.epoch_length
    assert length is not None
    return engine.state.iteration // length * _num_groups(length, accumulate_grad_batches)


def completed(accumulate_grad_batches: int) -> CallableEventWithFilter:
    """Return the event that a group's last batch fires; for what counts updates and not batches."""

    def is_last(engine: Engine, _: int) -> bool:
        return group_of(engine, accumulate_grad_batches).is_last

    return Events.ITERATION_COMPLETED(event_filter=is_last)


def update(
    loss: torch.Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, group: Group
) -> None:
    """Add the gradient of a batch's `loss` to its group's, and after the last batch step `optimizer` down their mean.

    The step's gradient is the mean over the group's batches and over the ranks, no longer than `max_grad_norm`.

    Raises:
        InputError: when the loss is not a finite number, on any rank; the weights are then as before.
    """
    if not torch.isfinite(mean_over_ranks(loss)):
        raise InputError(
            f"the loss of {type(network).__name__} became {loss.item()}; lower learning_rate, or look at the data with "
            "`latdiff3d doctor`. The last checkpoint is from before this step."
        )
    if group.is_first:
        optimizer.zero_grad(set_to_none=True)
    (loss / group.size).backward()
    if not group.is_last:
        return
    average_gradients(network.parameters())
    nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    optimizer.step()


def _num_groups(num_batches: int, accumulate_grad_batches: int) -> int:
    return -(-num_batches // accumulate_grad_batches)
