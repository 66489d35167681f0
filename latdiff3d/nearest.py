"""How far a volume lies from others when a small shift does not count, on the voxels that both own."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

MIN_OVERLAP = 0.5  # of the smaller of two volumes; at a shift that leaves less, they are not compared
FLAT = 1e-5  # of a volume's energy; less variance than that is rounding


class Volume(Protocol):
    """What is compared with others, real or synthetic."""

    @property
    def name(self) -> str:
        """Return its case's name."""

    @property
    def image(self) -> np.ndarray:
        """Return its voxels, (C, D, H, W) in [0, 1]."""

    @property
    def own(self) -> np.ndarray:
        """Return 1 on the voxels that are its own, (1, D, H, W)."""


class NamedVolume(NamedTuple):
    """A `Volume` at hand."""

    name: str
    image: np.ndarray
    own: np.ndarray


class View(NamedTuple):
    """A volume as it is compared with others.

    Attributes:
        values: (C, D, H, W), in any units.
        own: (1, D, H, W), 1 on the voxels, or cells, that count.
    """

    values: torch.Tensor
    own: torch.Tensor


class Matches(NamedTuple):
    """How a volume compares with N references.

    Attributes:
        apart: (N,), distances from 0 on.
        shift: (N, 3), by which the volume, moved, lies best on each of them, in its own grid's steps.
    """

    apart: torch.Tensor
    shift: torch.Tensor


class ShiftedCorrelation:
    """Compares volumes with references by their correlation, the highest over shifts along all three axes at once.

    Each channel's mean is taken off first, over the voxels that both own at a shift, and the channels are then pooled;
    so neither an offset nor a factor counts. `apart` is √(2 − 2 r), the Euclidean distance of two volumes of unit norm:
    0 for a volume and itself, √2 for two that have nothing in common. For as few shifts as are wanted here, products of
    matrices are twice as fast as Fourier transforms of the same.

    Args:
        references: at least one, all on one grid.
        reach: the largest shift along each axis, in steps of that grid.

    Raises:
        ValueError: grids that differ, or no reference.
    """

    def __init__(self, references: Sequence[View], reach: int) -> None:
        self.shape, self.reach = _one_shape(references), reach
        self.own, self.squares, self.values = _split(torch.stack([_layers(view) for view in references]))  # (N, …, V)

    def __call__(self, view: View) -> Matches:
        """Return how a volume compares with each reference.

        Raises:
            ValueError: it lies on another grid.
        """
        if view.values.shape != self.shape:
            raise ValueError(f"a volume of {tuple(view.values.shape)} and references of {tuple(self.shape)}.")
        reach, lags = self.reach, range(-self.reach, self.reach + 1)
        layers = _layers(view)
        padded = F.pad(layers, [reach] * 6)
        found = []
        for first in lags:  # so many shifts are in memory at once
            starts = itertools.product([reach - first], *([reach - step for step in lags] for _ in range(2)))
            boxes = [[slice(k, k + n) for k, n in zip(start, self.shape[1:], strict=True)] for start in starts]
            moves = torch.stack([padded[:, d, h, w] for d, h, w in boxes])  # (S, C + 2, D, H, W)
            found.append(self._correlations(moves, float(layers[0].sum())))
        best, place = torch.cat(found, dim=1).max(1)
        shift = torch.stack(torch.unravel_index(place, (len(lags),) * 3), dim=1) - reach
        return Matches((2 - 2 * best).clamp(min=0).sqrt(), shift)

    def _correlations(self, moves: torch.Tensor, num_view: float) -> torch.Tensor:
        """Return r of each reference with a volume's layers at S shifts, (N, S), −1 where too little overlaps."""
        own, squares, values = _split(moves)  # (S, …, V)
        counted = self.own @ own.T  # (N, S)
        num = counted.clamp(min=1)
        sums = self.values.transpose(0, 1) @ own.T  # (C, N, S)
        sums_moved = self.own @ values.permute(1, 2, 0)
        square, square_moved = self.squares @ own.T, self.own @ squares.T
        covariance = self.values.flatten(1) @ values.flatten(1).T - (sums * sums_moved).sum(0) / num
        variance, variance_moved = square - (sums**2).sum(0) / num, square_moved - (sums_moved**2).sum(0) / num
        varies = (variance > FLAT * square.amax()) & (variance_moved > FLAT * square_moved.amax())
        r = torch.where(varies, covariance / (variance * variance_moved).clamp(min=1e-30).sqrt(), 0.0)
        enough = counted >= MIN_OVERLAP * self.own.sum(1, keepdim=True).clamp(max=num_view)
        return torch.where(enough, r.clamp(-1, 1), -1.0)


def _layers(view: View) -> torch.Tensor:
    """Return (C + 2, D, H, W): what counts, and of that the squares' sum over channels and the centred values."""
    own = view.own.float()
    centre = (view.values * own).sum((1, 2, 3), keepdim=True) / own.sum().clamp(min=1)
    values = (view.values - centre) * own  # near 0 on the whole, so that little is lost in differences
    return torch.cat([own, (values**2).sum(0, keepdim=True), values])


def _split(layers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return of layers (N, C + 2, D, H, W) what counts (N, V), the squares (N, V) and the values (N, C, V)."""
    flat = layers.flatten(2)
    return flat[:, 0], flat[:, 1], flat[:, 2:]


class StandardisedDistance:
    """Compares features with references' by their Euclidean distance, in units of each one's spread over the latter.

    Args:
        references: at least two, whose `values` hold F features each.
        floor: the least spread, as a share of the median one; a feature that hardly varies would decide everything.
    """

    def __init__(self, references: Sequence[View], floor: float = 0.1) -> None:
        features = torch.stack([view.values.flatten().double() for view in references])  # (N, F)
        spread = features.std(0)
        self.spread = spread.clamp(min=floor * float(spread.median()))
        self.features = features / self.spread

    def __call__(self, view: View) -> Matches:
        """Return how features compare with each reference's; there is nothing to shift."""
        apart = (self.features - view.values.flatten().double() / self.spread).norm(dim=1)
        return Matches(apart.float(), torch.zeros(len(apart), 3, dtype=torch.long))


def coarse(view: View, longest: int = 32) -> tuple[View, int]:
    """Return means over cubes of voxels, of those that count, and a cube's edge, the least that leaves `longest` cubes.

    A cube counts where half of its voxels do.
    """
    cell = max(1, math.ceil(max(view.values.shape[1:]) / longest))
    missing = [n for size in reversed(view.values.shape[1:]) for n in (0, -size % cell)]
    own = view.own.float()
    share = F.avg_pool3d(F.pad(own, missing)[None], cell)[0]
    values = F.avg_pool3d(F.pad(view.values * own, missing)[None], cell)[0]
    counts = (share >= 0.5).float()
    return View(values / share.clamp(min=0.5) * counts, counts), cell


def flipped(volume: torch.Tensor, flip: Sequence[int]) -> torch.Tensor:
    """Return a volume (C, D, H, W) mirrored along spatial axes."""
    return torch.flip(volume, [axis + 1 for axis in flip])


def moved(volume: torch.Tensor, shift: Sequence[int]) -> torch.Tensor:
    """Return a volume (C, D, H, W) shifted by whole voxels, 0 where nothing comes from."""
    volume = volume.clone()
    for axis, step in enumerate((int(s) for s in shift), start=1):
        volume = torch.roll(volume, step, dims=axis)
        emptied = slice(0, step) if step > 0 else slice(volume.shape[axis] + step, None)
        if step:
            volume.movedim(axis, 0)[emptied] = 0
    return volume


def _one_shape(references: Sequence[View]) -> torch.Size:
    shapes = {view.values.shape for view in references}
    if len(shapes) != 1:
        raise ValueError(f"references of the shapes {sorted(map(tuple, shapes))}; give one at least, all on one grid.")
    return shapes.pop()
