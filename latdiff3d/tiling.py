"""Overlapping windows over a volume, blended into one result: for moments, predictions and voxels alike.

MONAI's `sliding_window_inference` gives all windows one map of weights. But zero padding spoils what a convolution
computes near a window's faces, and belongs to the result at the volume's: a window in the middle must not count where
one at the end is all there is. Nor can it show a network's GroupNorms the whole volume. Hence our own.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from latdiff3d.norms import WindowFunction, cut, scaled

# A box, as slices → tensors (B, C', …) of what lies in it
BoxFunction = Callable[[tuple[slice, ...]], Sequence[torch.Tensor]]


class Window(NamedTuple):
    """A box of a volume, as slices, and the part of it that lies deeper in it than in its neighbours, within the box.

    Over all windows the parts hold each voxel once.
    """

    box: tuple[slice, ...]
    own: tuple[slice, ...]


def windows(size: Sequence[int], tile: Sequence[int], overlap: int, multiple: int = 1) -> list[Window]:
    """Return the windows that cover a volume, evenly spread, the last axis fastest.

    Args:
        size: (D, H, W) of the volume, in multiples of `multiple`.
        tile: (d, h, w) of a window, in multiples of `multiple`; it spans an axis that is not longer.
        overlap: what neighbours share at least, in voxels; a multiple of `multiple`, less than a tile.
        multiple: what windows begin and end on.
    """
    per_axis = _per_axis(size, tile, overlap, multiple)
    owned = [_owned(axis, multiple) for axis in per_axis]
    return [Window(_at(per_axis, place), _at(owned, place)) for place in _places(per_axis)]


def along(length: int, tile: int, overlap: int, multiple: int = 1) -> list[slice]:
    """Return one axis' windows, evenly spread from end to end; see `windows`."""
    if tile >= length:
        return [slice(0, length)]
    assert 0 <= overlap < tile and not any(n % multiple for n in (length, tile, overlap))
    steps = math.ceil((length - tile) / (tile - overlap))
    starts = [(length - tile) // multiple * i // steps * multiple for i in range(steps + 1)]
    return [slice(start, start + tile) for start in starts]


def blended(
    function: WindowFunction,
    volume: torch.Tensor,
    tile: Sequence[int],
    overlap: int,
    margin: int = 0,
    multiple: int = 1,
    scale: Fraction | int = 1,
) -> tuple[torch.Tensor, ...]:
    """Return what `function` gives for the windows of a volume, blended into one.

    A place's value is a weighted mean over the windows that hold it. A window's weight is 0 in its outer `margin`,
    rises linearly over the rest of the overlap and is 1 beyond; where the window ends with the volume it has neither
    margin nor ramp. Where `function` sees no farther than `margin`, the result is that of the whole volume at once.

    Give it moments of a distribution, never draws: the mean of two draws has half their variance. Means and standard
    deviations so blended are those of the Wasserstein barycentre of the windows' normal distributions (Agueh & Carlier
    2011, doi:10.1137/100805741).

    Args:
        function: of a window (B, C, d, h, w); gives tensors (B, C', d·scale, h·scale, w·scale).
        volume: (B, C, D, H, W); D, H and W in multiples of `multiple`.
        tile, overlap, multiple: see `windows`; in voxels of `volume`.
        margin: in voxels of `volume`, at most half of `overlap`.
        scale: places of the result to a voxel of `volume`, such as Fraction(1, 4); `multiple` and `margin` times it
            are whole numbers.

    Returns:
        float32 tensors (B, C', D·scale, H·scale, W·scale) on the volume's device.
    """
    assert 2 * margin <= overlap
    per_axis = _per_axis(volume.shape[2:], tile, overlap, multiple)
    return blended_boxes(lambda box: function(cut(volume, box)), per_axis, volume.device, margin, scale)


def blended_boxes(
    function: BoxFunction,
    per_axis: Sequence[Sequence[slice]],
    device: torch.device,
    margin: int = 0,
    scale: Fraction | int = 1,
) -> tuple[torch.Tensor, ...]:
    """Return what `function` gives for boxes, blended as `blended` does, where it takes more than a volume's part.

    Args:
        function: of a box; gives tensors (B, C', d·scale, h·scale, w·scale).
        per_axis: of each axis the windows, see `along`; the boxes are all their combinations.
        device: of the result.
        margin, scale: see `blended`.
    """
    targets = [[scaled(window, scale) for window in axis] for axis in per_axis]
    ramps = [_ramps(axis, int(margin * scale)).to(device) for axis in targets]
    results: tuple[torch.Tensor, ...] = ()
    for place in _places(per_axis):
        outputs = function(_at(per_axis, place))
        if not results:
            size = [axis[-1].stop for axis in targets]
            results = tuple(out.new_zeros(*out.shape[:2], *size, dtype=torch.float32, device=device) for out in outputs)
        target = _at(targets, place)
        d, h, w = (ramp[i, part] for ramp, i, part in zip(ramps, place, target, strict=True))
        weight = d[:, None, None] * h[:, None] * w  # (d, h, w) of the result
        for result, out in zip(results, outputs, strict=True):
            cut(result, target).add_(out.to(result) * weight)
    return results


def tile_within(max_voxels: float, size: Sequence[int], overlap: int, multiple: int = 1) -> tuple[int, ...] | None:
    """Return the tile of at most `max_voxels` whose windows hold the fewest voxels in all; None if none is so small.

    Args:
        max_voxels: of a window.
        size, overlap, multiple: see `windows`.
    """
    counts = [
        {tile: len(along(length, tile, overlap, multiple)) for tile in _tiles(length, overlap, multiple)}
        for length in size
    ]
    total_of = {}
    for tile in itertools.product(*counts):
        if math.prod(tile) <= max_voxels:
            total_of[tile] = math.prod(n * count[n] for n, count in zip(tile, counts, strict=True))
    return min(total_of, key=lambda tile: total_of[tile], default=None)


def smallest_tile(size: Sequence[int], overlap: int, multiple: int = 1) -> tuple[int, ...]:
    """Return the smallest tile that `tile_within` can return."""
    return tuple(min(_tiles(length, overlap, multiple)) for length in size)


def _per_axis(size: Sequence[int], tile: Sequence[int], overlap: int, multiple: int) -> list[list[slice]]:
    return [along(length, part, overlap, multiple) for length, part in zip(size, tile, strict=True)]


def _owned(axis: Sequence[slice], multiple: int) -> list[slice]:
    inner = [(left.stop + right.start) // (2 * multiple) * multiple for left, right in itertools.pairwise(axis)]
    bounds = itertools.pairwise([axis[0].start, *inner, axis[-1].stop])
    return [slice(b - window.start, e - window.start) for window, (b, e) in zip(axis, bounds, strict=True)]


def _tiles(length: int, overlap: int, multiple: int) -> set[int]:
    """Return the tiles worth trying on one axis: the smallest for each number of windows."""
    counts = range(1, max(1, (length - overlap) // multiple) + 1)
    tiles = {math.ceil((length - overlap) / (count * multiple)) * multiple + overlap for count in counts}
    return {min(tile, length) for tile in tiles}


def _ramps(axis: Sequence[slice], margin: int) -> torch.Tensor:
    """Return the weights of one axis' windows, (windows, length): at each place they sum to 1."""
    centres = torch.arange(axis[-1].stop, dtype=torch.float64) + 0.5
    rows = torch.ones(len(axis), len(centres), dtype=torch.float64)
    for i, (left, right) in enumerate(itertools.pairwise(axis)):
        begin, end = right.start + margin, left.stop - margin
        rise = ((centres - begin) / max(end - begin, 1e-6)).clamp(0, 1)
        rows[i] *= 1 - rise
        rows[i + 1] *= rise
    return (rows / rows.sum(0)).float()


def _places(per_axis: Sequence[Sequence[slice]]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(axis)) for axis in per_axis))


def _at(per_axis: Sequence[Sequence[slice]], place: Sequence[int]) -> tuple[slice, ...]:
    return tuple(axis[i] for axis, i in zip(per_axis, place, strict=True))
