"""What stage 2 trains on: crops in latent space from the cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latdiff3d.batches import PerItem
from latdiff3d.crop_windows import centred_start, random_start
from latdiff3d.latent_entries import Entry, Flip, all_flips
from latdiff3d.layouts import Case

# What the cache holds in place of a case's files.
_ENCODED = ("image", "mask", "patient")


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
        super().__init__()
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
