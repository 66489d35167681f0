"""One update of a network's weights: from the losses of one batch, or of a group of them, to an optimiser's step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from torch import nn

from latdiff3d.distributed import average_gradients, mean_over_ranks
from latdiff3d.errors import DivergedError, InputError

# Of a loss: reached after 26 halvings in a row, where gradients overflow float16 that are 1000 times below their size.
MIN_SCALE = 2.0**-10


class LossScaler(torch.amp.GradScaler):
    """PyTorch's GradScaler for one optimiser: gradients too small for float16 are made larger on their way back.

    An update whose gradients overflow is skipped, and the scale halved; after 2000 updates without it is doubled. For
    any precision but "fp16" it does nothing. Each optimiser has its own: generator and discriminator have gradients of
    other sizes, one's overflow says nothing of the other's, and the discriminator does not always train.

    Args:
        device: where the loss is.
        precision: as of `devices.autocast`.

    Attributes:
        skipped: whether the last batch's update was skipped.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        super().__init__(device.type, enabled=precision == "fp16")
        self.skipped = False

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Set the scale of the next update by how this one went."""
        before = self.get_scale()
        super().update(new_scale)
        self.skipped = self.get_scale() < before

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a scale; an empty state, of a run of another precision, leaves it where it starts."""
        if state_dict:
            super().load_state_dict(dict(state_dict))

    def logged(self, prefix: str = "") -> dict[str, float]:
        """Return `loss_scale` and `skipped_updates`, 1 if the batch's was skipped; nothing where nothing is scaled."""
        if not self.is_enabled():
            return {}
        return {f"{prefix}loss_scale": self.get_scale(), f"{prefix}skipped_updates": float(self.skipped)}


@dataclass(frozen=True)
class Group:
    """Where a batch stands in the group of batches that share one update.

    Attributes:
        number: of the update in the whole run, from 1 on.
        size: how many batches share it.
        is_first, is_last: of those batches.
        place: the step and the cases of the batch, for messages.
    """

    number: int
    size: int
    is_first: bool
    is_last: bool
    place: str = field(default="", compare=False)


def group_of(engine: Engine, accumulate_grad_batches: int, batch: Mapping[str, Any] | None = None) -> Group:
    """Return the group of the batch that `engine` is at; of `batch`, its cases are named.

    Groups begin anew with each epoch, and what is left at its end is a smaller group of its own: so nothing is carried
    over into the next epoch, or has to be kept in a checkpoint.
    """
    cases = ", ".join(batch.get("case", [])) if batch else ""
    place = f"step {engine.state.iteration}{f', {cases}' if cases else ''}"
    if accumulate_grad_batches == 1:
        return Group(engine.state.iteration, 1, True, True, place)
    length = engine.state.epoch_length
    assert length is not None
    epochs, position = divmod(engine.state.iteration - 1, length)
    number, within = divmod(position, accumulate_grad_batches)
    size = min(accumulate_grad_batches, length - position + within)
    number += epochs * _num_groups(length, accumulate_grad_batches) + 1
    return Group(number, size, within == 0, within == size - 1, place)


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
    """Return how many updates `engine`, which is between two groups, has made."""
    length = engine.state.epoch_length
    assert length is not None
    epochs, position = divmod(engine.state.iteration, length)
    return epochs * _num_groups(length, accumulate_grad_batches) + position // accumulate_grad_batches


def completed(accumulate_grad_batches: int, every: int = 1) -> CallableEventWithFilter:
    """Return the event that a group's last batch fires, of every so many groups; to count updates, not batches."""

    def is_due(engine: Engine, _: int) -> bool:
        group = group_of(engine, accumulate_grad_batches)
        return group.is_last and group.number % every == 0

    return Events.ITERATION_COMPLETED(event_filter=is_due)


def update(
    loss: torch.Tensor,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    group: Group,
    scaler: LossScaler,
) -> None:
    """Add the gradient of a batch's `loss` to its group's, and after the last batch step `optimizer` down their mean.

    The step's gradient is the mean over the group's batches and over the ranks, no longer than `max_grad_norm`. Where
    it overflows float16, on any rank, the step is left out; see `LossScaler`.

    Raises:
        DivergedError: when the loss is not a finite number, on any rank, or its gradients are not, however little they
            are scaled; the weights are then as before.
    """
    if group.is_first:
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss / group.size).backward()
    # Asked after the backward, where ranks wait for each other anyway, and a GPU is not made to wait for the answer.
    if not torch.isfinite(mean_over_ranks(loss)):
        named = str(loss.item()) if not torch.isfinite(loss) else "no number on another rank, and stayed one here,"
        raise DivergedError(
            f"the loss of {type(network).__name__} became {named} at {group.place}; lower learning_rate, or look at "
            "the data with `latdiff3d doctor`."
        )
    scaler.skipped = False
    if not group.is_last:
        return
    average_gradients(network.parameters())  # scaled: what overflows on one rank is infinite on all, and all skip it
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() < MIN_SCALE:
        raise DivergedError(
            f"the gradients of {type(network).__name__} overflow float16 at any scale at {group.place}, the loss being "
            f"{loss.item():g}; set precision to bf16 or fp32, or lower learning_rate."
        )


def _num_groups(num_batches: int, accumulate_grad_batches: int) -> int:
    return -(-num_batches // accumulate_grad_batches)
