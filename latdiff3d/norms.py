"""GroupNorms that see a whole volume through windows of it: what makes tiles agree with one another, and with none.

A GroupNorm's statistics are those of all it is given. A network that is given a window normalises by the window's, and
one of background and one of brain come out as if they were equally rich: on a brain, latents then differ by up to 4 of
their standard deviations where two windows meet, and no width of overlap helps.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latdiff3d.compilation import uncompiled

# (B, C, d, h, w), a window → one or more tensors (B, C', d·scale, h·scale, w·scale)
WindowFunction = Callable[[torch.Tensor], Sequence[torch.Tensor]]
# A window, and the part of it that counts, as slices within it: over all windows each voxel of the volume once.
Part = tuple[torch.Tensor, tuple[slice, ...]]


@contextmanager
def whole_volume_norms(network: nn.Module, function: WindowFunction, parts: Sequence[Part]) -> Iterator[WindowFunction]:
    """Give `function` with all its GroupNorms' statistics fixed to those of the whole volume.

    What a layer sees depends on the statistics of those before it. So they are found in order: a pass over the windows
    runs each up to the first GroupNorm whose statistics are not known yet, sums there and goes no further. A network of
    n GroupNorms needs n such passes. Guesses do not do: with the statistics of several layers taken from one pass, the
    next passes went astray by up to 3 standard deviations of the latents instead of closing in.

    Where the windows' faces lie farther from what counts than `function` sees, the result is exact.

    Args:
        network: what `function` runs; its GroupNorms are looked for at any depth.
        function: of a window (B, C, d, h, w).
        parts: of the volume.

    Yields:
        the function, to be called inside the context only.
    """
    norms = _SuccessiveNorms()
    layers = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    try:
        for layer in layers:
            layer.forward = functools.partial(norms.normalise, layer)  # type: ignore[method-assign]
        with uncompiled(network):
            while norms.measure_next(function, parts):
                pass
            yield functools.partial(norms.run, function)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _Measured(Exception):
    """Ends a window's pass where there is nothing more to learn from it."""


class _SuccessiveNorms:
    """The statistics of the first, second, … GroupNorm that a function calls, found one after the other."""

    def __init__(self) -> None:
        self.known: list[tuple[torch.Tensor, torch.Tensor]] = []  # mean and variance, (B, groups) each
        self.num_called = 0
        self.part: Part | None = None
        self.sums: torch.Tensor | None = None  # (3, B, groups): count, sum and sum of squares

    def run(self, function: WindowFunction, window: torch.Tensor) -> Sequence[torch.Tensor]:
        self.num_called = 0
        return function(window)

    def measure_next(self, function: WindowFunction, parts: Sequence[Part]) -> bool:
        """Measure the first GroupNorm that is not known yet; return False when there is none."""
        self.sums = None
        for part in parts:
            self.part = part
            try:
                self.run(function, part[0])
            except _Measured:
                continue
            return False
        assert self.sums is not None
        count, total, squares = self.sums
        mean = total / count
        self.known.append((mean, (squares / count - mean**2).clamp(min=0)))
        return True

    def normalise(self, layer: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Stand in for a GroupNorm's forward."""
        if self.num_called == len(self.known):
            assert self.part is not None
            window, own = self.part
            zoom = [Fraction(here, there) for here, there in zip(x.shape[2:], window.shape[2:], strict=True)]
            counted = _moment_sums(cut(x, [scaled(*pair) for pair in zip(own, zoom, strict=True)]), layer.num_groups)
            self.sums = counted if self.sums is None else self.sums + counted
            raise _Measured
        # Its statistics given, a GroupNorm is a BatchNorm in evaluation whose channels are those of all samples.
        per_group = x.shape[1] // layer.num_groups
        mean, variance = (m.float().repeat_interleave(per_group, 1).flatten() for m in self.known[self.num_called])
        weight, bias = (p if p is None else p.repeat(len(x)) for p in (layer.weight, layer.bias))
        self.num_called += 1
        return F.batch_norm(x.flatten(0, 1)[None], mean, variance, weight, bias, eps=layer.eps).view_as(x)


def cut(volume: torch.Tensor, box: Sequence[slice]) -> torch.Tensor:
    """Return the part of `volume` (B, C, D, H, W) that `box`, slices of D, H and W, names, as a view."""
    index: tuple[Any, ...] = (..., *box)
    return volume[index]


def scaled(part: slice, scale: Fraction | int) -> slice:
    """Return the places of a grid `scale` times as fine that `part` covers."""
    return slice(int(part.start * scale), int(part.stop * scale))


def _moment_sums(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    sums = []
    # One group at a time: in float64 all of them at once would need more memory than the network itself.
    for group in x.unflatten(1, (num_groups, -1)).unbind(1):
        values = group.double().flatten(1)  # (B, N)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        sums.append(values.shape[1] * torch.stack([torch.ones_like(mean), mean, variance + mean**2]))
    return torch.stack(sums, dim=-1)
