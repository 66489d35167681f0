"""Which cases a step trains on: an epoch's order, each rank's part of each batch, and random numbers for each item."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.data import Dataset as Images
from monai.data.utils import set_rnd
from torch.utils.data import Dataset, Sampler, get_worker_info

from latdiff3d.distributed import num_ranks, rank
from latdiff3d.errors import InputError

MEASURING = 0  # the epoch, before the first, whose crops are measured on


class ShuffledBatches(Sampler[list[int]]):
    """An epoch's batches of indices in an order that the seed and the epoch decide.

    Over several ranks a batch of N · `batch_size` cases is cut into as many parts: the ranks together see what one
    process with that batch size would. Cases that fill no whole batch are left out of the epoch, other ones each time;
    a set smaller than a batch is one batch.

    Args:
        cases: as many as there are of them.
        batch_size: of each rank.
        seed: of the run.

    Raises:
        InputError: several ranks, and too few cases to give each a whole batch.

    Attributes:
        epoch: whose order is drawn.
        first: number of batches of the epoch that were trained on before; they are passed over.
    """

    def __init__(self, cases: Sized, batch_size: int, seed: int) -> None:
        self.num_cases, self.batch_size, self.seed = len(cases), batch_size, seed
        self.epoch, self.first = MEASURING, 0
        self.joint_size = batch_size * num_ranks()
        if num_ranks() > 1 and self.num_cases < self.joint_size:
            raise InputError(
                f"{num_ranks()} ranks with a batch_size of {batch_size} want {self.joint_size} training cases, there "
                f"are {self.num_cases}; lower batch_size, or start fewer processes."
            )

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return max(1, self.num_cases // self.joint_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the epoch's batches, this rank's part of each."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_cases).tolist()
        for number in range(self.first, len(self)):
            start = number * self.joint_size + rank() * self.batch_size
            yield order[start : start + self.batch_size]


class EveryNth(Sampler[int]):
    """This rank's part of a set, so that the ranks together look at each case once: every N-th, in their order.

    Args:
        cases: as many as there are of them.

    Raises:
        InputError: fewer cases than ranks.
    """

    def __init__(self, cases: Sized) -> None:
        self.num_cases = len(cases)
        if self.num_cases < num_ranks():
            raise InputError(f"{num_ranks()} ranks, {self.num_cases} validation cases; expected one each at least.")

    def __len__(self) -> int:
        """Return the number of this rank's cases."""
        return len(range(rank(), self.num_cases, num_ranks()))

    def __iter__(self) -> Iterator[int]:
        """Return their indices."""
        return iter(range(rank(), self.num_cases, num_ranks()))


class PerItem(Dataset):
    """A data set whose item depends, in an epoch, on the seed and its index alone: on no worker, and no other item.

    MONAI's `set_rnd`, and so `Seeds`, sets the seed. A worker's own, which its number decides, is not
    heard; the one that is set later reaches workers that are at work already.
    """

    def __init__(self) -> None:
        self._seed = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> "PerItem":
        """Take the epoch's seed; MONAI's name."""
        if seed is not None and get_worker_info() is None:
            self._seed.fill_(int(seed))
        return self

    def random_state(self, index: int) -> np.random.RandomState:
        """Return the random numbers of an item."""
        return np.random.RandomState([int(self._seed), index])


class ImageCrops(PerItem):
    """Crops of images, transformed at random.

    Args:
        images: whose transform makes `image` (C, D, H, W) and what goes with it.
    """

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return the item, its random transforms seeded for it."""
        seed = self.random_state(index).randint(2**32, dtype=np.uint32)
        self.images.transform.set_random_state(seed=int(seed))
        return self.images[index]


class Seeds:
    """Derives all that is random in training from the seed and the place in the run, so that no state need be kept.

    Order and crops follow from (seed, epoch, index), the noise and times of a step from (seed, iteration, rank): a run
    that stops after any step goes on as if it had not, whatever the number of workers.

    Args:
        seed: of the run.
        loader: the training loader, with a `ShuffledBatches`, over a data set that MONAI's `set_rnd` seeds.
    """

    def __init__(self, seed: int, loader: DataLoader) -> None:
        assert isinstance(loader.batch_sampler, ShuffledBatches)
        self.seed, self.loader, self.batches = seed, loader, loader.batch_sampler

    def attach(self, engine: Engine) -> None:
        """Seed what is measured before training, each epoch before its first batch is drawn, and each step."""
        engine.add_event_handler(Events.STARTED, lambda _: self.at_epoch())
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_step)

    def at_epoch(self, epoch: int = MEASURING, first: int = 0) -> None:
        """Let the loader draw `epoch`, from its batch number `first` on."""
        self.batches.epoch, self.batches.first = epoch, first
        seed = self._drawn(epoch)
        self.loader.generator.manual_seed(seed)
        set_rnd(self.loader.dataset, seed)

    def _start_epoch(self, engine: Engine) -> None:
        self.at_epoch(engine.state.epoch, engine.state.iteration - (engine.state.epoch - 1) * len(self.loader))

    def _start_step(self, engine: Engine) -> None:
        torch.manual_seed(self._drawn(engine.state.iteration, rank()))

    def _drawn(self, *place: int) -> int:
        return int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0])
