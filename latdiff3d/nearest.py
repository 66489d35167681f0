"""How far a volume lies from others when a small shift does not count, on the voxels that both own.

Correlations at all shifts come from Fourier transforms of values, of their squares and of the voxels that count
(Padfield 2012, IEEE Trans. Image Process. 21(5), 10.1109/TIP.2011.2181402).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch.nn import functional as F

MIN_OVERLAP = 0.5  # of the smaller of two volumes; at a shift that leaves less, they are not compared
FLAT = 1e-5  # of a volume's energy; less variance than that is rounding
AT_ONCE = 32  # references whose correlations are held in memory together


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
    0 for a volume and itself, √2 for two that have nothing in common.

    Args:
        references: at least one, all on one grid.
        reach: the largest shift along each axis, in steps of that grid.

    Raises:
        ValueError: grids that differ, or no reference.
    """

    def __init__(self, references: Sequence[View], reach: int) -> None:
        self.shape = _one_shape(references)
        self.size = [int(next_fast_len(n + min(reach, n - 1), real=True)) for n in self.shape[1:]]
        self.lags = [torch.arange(-min(reach, n - 1), min(reach, n - 1) + 1) for n in self.shape[1:]]
        self.num_own = torch.stack([view.own.sum() for view in references])
        self.spectra = torch.stack([self._spectra(view) for view in references])  # (N, C + 2, …)

    def __call__(self, view: View) -> Matches:
        """Return how a volume compares with each reference.

        Raises:
            ValueError: it lies on another grid.
        """
        if view.values.shape != self.shape:
            raise ValueError(f"a volume of {tuple(view.values.shape)} and references of {tuple(self.shape)}.")
        spectra = self._spectra(view).conj()
        parts = zip(self.spectra.split(AT_ONCE), self.num_own.split(AT_ONCE), strict=True)
        r = torch.cat([self._correlations(part, spectra, view.own.sum(), own) for part, own in parts])  # (N, …)
        best, place = r.flatten(1).max(1)
        places = torch.unravel_index(place, r.shape[1:])
        shift = torch.stack([lags[index] for lags, index in zip(self.lags, places, strict=True)], dim=1)
        return Matches((2 - 2 * best).clamp(min=0).sqrt(), shift)

    def _spectra(self, view: View) -> torch.Tensor:
        """Return the transforms of what counts, of the centred values, and of their squares' sum over channels."""
        own = view.own.float()
        centre = (view.values * own).sum((1, 2, 3), keepdim=True) / own.sum().clamp(min=1)
        values = (view.values - centre) * own  # near 0 on the whole, so that little is lost below
        return torch.fft.rfftn(torch.cat([own, values, (values**2).sum(0, keepdim=True)]), s=self.size, dim=(1, 2, 3))

    def _correlations(
        self, references: torch.Tensor, view: torch.Tensor, num_view: torch.Tensor, num_own: torch.Tensor
    ) -> torch.Tensor:
        """Return r at each shift, (N, lags, lags, lags), −1 where too little overlaps."""
        own, values, squares = references[:, :1], references[:, 1:-1], references[:, -1:]
        of_view = view[:1], view[1:-1], view[-1:]
        both = [(values * of_view[1]).sum(1, keepdim=True), squares * of_view[0], own * of_view[2]]
        products = torch.cat([own * of_view[0], *both, values * of_view[0], own * of_view[1]], dim=1)
        maps = torch.fft.irfftn(products, s=self.size, dim=(2, 3, 4))
        for axis, lags in enumerate(self.lags, start=2):
            maps = maps.index_select(axis, lags % maps.shape[axis])
        counted, product, square, square_view = maps[:, :4].unbind(1)
        sums, sums_view = maps[:, 4:].chunk(2, dim=1)  # (N, C, …) each
        num = counted.clamp(min=1)
        covariance = product - (sums * sums_view).sum(1) / num
        variance = square - (sums**2).sum(1) / num
        variance_view = square_view - (sums_view**2).sum(1) / num
        varies = (variance > FLAT * _largest(square)) & (variance_view > FLAT * _largest(square_view))
        r = torch.where(varies, covariance / (variance * variance_view).clamp(min=1e-30).sqrt(), 0.0)
        enough = counted >= MIN_OVERLAP * torch.minimum(num_own, num_view).view(-1, 1, 1, 1)
        return torch.where(enough, r.clamp(-1, 1), -1.0)


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


def _largest(maps: torch.Tensor) -> torch.Tensor:
    return maps.amax((1, 2, 3), keepdim=True)


def _one_shape(references: Sequence[View]) -> torch.Size:
    shapes = {view.values.shape for view in references}
    if len(shapes) != 1:
        raise ValueError(f"references of the shapes {sorted(map(tuple, shapes))}; give one at least, all on one grid.")
    return shapes.pop()
