"""What stage 2 trains on: crops in latent space from the cache, or crops of images that the step encodes itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monai.data import CacheDataset
from torch.utils.data import Dataset, get_worker_info

from latdiff3d.datalist import Case
from latdiff3d.latent_entries import Entry, Flip, all_flips
from latdiff3d.transforms import centred_start, random_start

# What the cache holds in place of a case's files.
_ENCODED = ("image", "mask", "patient")


class PerItem(Dataset):
    """A data set whose item depends, in an epoch, on the seed and its index alone: on no worker, and no other item.

    MONAI's `set_rnd`, and so `handlers.SeedEpochs`, sets the seed. A worker's own, which its number decides, is not
    heard.
    """

    seed = 0

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> "PerItem":
        """Take the epoch's seed; MONAI's name."""
        if seed is not None and get_worker_info() is None:
            self.seed = int(seed)
        return self

    def random_state(self, index: int) -> np.random.RandomState:
        """Return the random numbers of an item."""
        return np.random.RandomState([self.seed, index])


class LatentCrops(PerItem):
    """Windows of the cached latents, and of the masks that lie on them.

    Args:
        cases: in their order.
        entries: of the cache, by case and flip.
        crop_to: (D, H, W) in voxels, each a multiple of the codec's factor.
        flips: axes; each is mirrored or not by a coin. None without `random`.
        random: at a random place inside the foreground, as `RandForegroundCropd`, else in its middle, as
            `ForegroundCropd`, in whole cells.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        entries: Mapping[tuple[str, Flip], Entry],
        crop_to: Sequence[int],
        flips: Sequence[int] = (),
        random: bool = False,
    ) -> None:
        self.cases = cases
        self.entries = entries
        self.crop_to = np.array(crop_to)
        self.flips = all_flips(flips) if random else all_flips(())
        self.random = random
        self.keys = {"mean", "std"} | ({"mask"} if all("mask" in case for case in cases) else set())

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `mean` and `std` (C', d, h, w), `mask` (1, D, H, W) in uint8, and what else the case says."""
        case, random_state = self.cases[index], self.random_state(index)
        entry = self.entries[case["case"], self.flips[random_state.randint(len(self.flips))]]
        size, cells = self.crop_to // entry.factor, np.array(entry.cells)
        first, end = entry.box
        box = first // entry.factor, -(-end // entry.factor)
        start = random_start(box, size, cells, random_state) if self.random else centred_start(box, size, cells)
        crop = entry.crop(start.tolist(), size.tolist())
        said = {key: value for key, value in case.items() if key not in _ENCODED}
        return said | {key: value for key, value in crop.items() if key in self.keys}


class ImageCrops(PerItem):
    """Crops of images, transformed at random, for steps that encode on the fly.

    Args:
        images: whose transform makes `image` (C, D, H, W) and, for a conditioned model, `mask` (1, D, H, W).
    """

    def __init__(self, images: CacheDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return the item, its random transforms seeded for it."""
        seed = self.random_state(index).randint(2**32, dtype=np.uint32)
        self.images.transform.set_random_state(seed=int(seed))
        return self.images[index]
