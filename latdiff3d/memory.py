"""A function of a whole volume in the memory there is: at once, or by tiles as large as fit."""

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.profiler import profile

from latdiff3d.errors import InputError
from latdiff3d.norms import WindowFunction, cut, whole_volume_norms
from latdiff3d.tiling import blended, smallest_tile, tile_within, windows

PROBE = 13  # edge, in multiples, of the window whose memory is measured; beyond it memory grows with the voxels
FARTHEST = 12  # in multiples; a network that sees farther is taken for one that sees everything
HEADROOM = 1.15  # what the process holds, for what its tensors fill


PROGRAM_GB = 1.0  # that Python, PyTorch and MONAI hold on a CPU before anything is done, rounded up
COPIES = 5  # of a volume, that are held at once when it is brought to its mask's grid and written


class Tiles(NamedTuple):
    """How a volume is cut: tiles, what neighbours share, and the outer part of each that does not count, in voxels."""

    tile: tuple[int, ...]
    overlap: int
    margin: int


def gigabytes(text: str) -> float:
    """Return GB of "6", "6GB" or "0.5 GB".

    Raises:
        InputError: for anything else, or nothing above 0.
    """
    number = text.strip().upper().removesuffix("GB").strip()
    if not re.fullmatch(r"\d+(\.\d+)?", number) or not float(number):
        raise InputError(f"memory is {text!r}; expected GB above 0, such as 6 or 6GB.")
    return float(number)


def left_of(
    memory_gb: float, device: torch.device, networks: Sequence[nn.Module], held_bytes: int, volume_bytes: int
) -> float:
    """Return how much of a budget for the whole process a last network's pass may take, its result included, in GB.

    Counted, not read off the process, so that the same budget makes the same tiles, and the same voxels.

    Args:
        memory_gb: that the process may hold in all; on a GPU, that its tensors there may.
        device: the networks'.
        networks: whose weights are held.
        held_bytes: what else is, at that time.
        volume_bytes: of the result, which is copied when it is written.

    Raises:
        InputError: the budget is less than all that, or than what writing takes.
    """
    weights = sum(part.nbytes for network in networks for part in network.state_dict().values())
    on_cpu = device.type == "cpu"
    held_gb = (PROGRAM_GB if on_cpu else 0.0) + (weights + held_bytes) / 1e9
    needed_gb = held_gb + (COPIES if on_cpu else 1) * volume_bytes / 1e9
    if memory_gb < needed_gb:
        raise InputError(
            f"memory is {memory_gb:g} GB; the program, the model and this volume need {needed_gb:.1f}, and decoding "
            "needs more. Give at least that."
        )
    return memory_gb - held_gb


def within_memory(
    network: nn.Module,
    function: WindowFunction,
    volume: torch.Tensor,
    memory_gb: float,
    multiple: int = 1,
    scale: Fraction | int = 1,
    held_bytes: int = 0,
) -> Sequence[torch.Tensor]:
    """Return `function` of a volume: at once where that fits the memory, else by tiles as large as fit.

    Tiles overlap by twice as far as the network sees, their GroupNorms have the whole volume's statistics, and the
    result differs from that at once by rounding alone. A network with attention sees everything: a warning is given,
    and its tiles are blended over wide ramps.

    Args:
        network: what `function` runs.
        function, volume, multiple, scale: see `blended`.
        memory_gb: by how much memory may rise, in GB of 1e9 bytes, on the network's device; results included.
        held_bytes: what is held for this purpose already, to be counted in.

    Raises:
        InputError: less memory than the smallest tile needs.
    """
    tiles = tiles_within(network, function, volume, memory_gb, multiple, held_bytes)
    if tiles is None:
        return function(volume)
    if 2 * tiles.margin < tiles.overlap:
        warnings.warn("the network sees farther than its tiles overlap; blended tiles approximate it.", stacklevel=2)
    boxes = windows(volume.shape[2:], tiles.tile, tiles.overlap, multiple)
    parts = [(cut(volume, window.box), window.own) for window in boxes]
    with whole_volume_norms(network, function, parts) as normed:
        return blended(normed, volume, *tiles, multiple, scale)


def tiles_within(
    network: nn.Module,
    function: WindowFunction,
    volume: torch.Tensor,
    memory_gb: float,
    multiple: int = 1,
    held_bytes: int = 0,
) -> Tiles | None:
    """Return the tiles by which `within_memory` works; None where it works at once.

    Args:
        network, function, volume, memory_gb, multiple, held_bytes: see there. Of the volume a corner is looked at,
            so that it may be an expanded tensor, which takes no memory.

    Raises:
        InputError: see there.
    """
    size = volume.shape[2:]
    corner = cut(volume, [slice(min(length, PROBE * multiple)) for length in size]).contiguous()
    outputs: list[torch.Tensor] = []
    device = next((parameter.device for parameter in network.parameters()), volume.device)
    rise = peak_bytes(lambda: outputs.extend(function(corner)), device)
    share = corner[0, 0].numel() / math.prod(size)
    per_voxel = HEADROOM * rise / corner[0, 0].numel()
    if held_bytes + per_voxel * math.prod(size) <= memory_gb * 1e9:
        return None
    held = held_bytes + sum(4 * out.numel() for out in outputs) / share  # float32
    reach = sees(network, function, volume, multiple)
    margin = reach if reach < FARTHEST * multiple else reach // (2 * multiple) * multiple
    tile = tile_within((memory_gb * 1e9 - held) / per_voxel, size, 2 * reach, multiple)
    if tile is None:
        smallest = smallest_tile(size, 2 * reach, multiple)
        needed = math.ceil((held + per_voxel * math.prod(smallest)) / 1e6) / 1e3
        raise InputError(
            f"memory_gb is {memory_gb:g}; the result for this volume and the smallest tile, "
            f"{' × '.join(map(str, smallest))}, need {needed:g}. Give at least that."
        )
    return Tiles(tile, 2 * reach, margin)


def sees(network: nn.Module, function: WindowFunction, volume: torch.Tensor, multiple: int = 1) -> int:
    """Return how far a voxel is felt, GroupNorms' statistics aside, in whole multiples; at most `FARTHEST` of them.

    Measured: along the last axis, on noise, where the outputs change by more than 1e-6 of their largest change.

    Args:
        network, function, multiple: see `within_memory`.
        volume: whose batch size, channels, type and device `function` takes.
    """
    size = (5 * multiple, 5 * multiple, (2 * FARTHEST + 1) * multiple)
    noise = torch.rand(volume.shape[1], *size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(volume).expand(len(volume), *noise.shape)
    middle = slice(FARTHEST * multiple, (FARTHEST + 1) * multiple)
    changed = noise.clone()
    changed[..., middle] = 1 - noise[..., middle]
    with whole_volume_norms(network, function, [(noise, tuple(slice(0, length) for length in size))]) as normed:
        changes = [(a.float() - b.float()).abs() for a, b in zip(normed(noise), normed(changed), strict=True)]
    farthest = 0
    for change in changes:
        felt = (change > 1e-6 * change.max()).flatten(0, -2).any(0)  # (W·scale,)
        cells = felt.view(2 * FARTHEST + 1, -1).any(1).nonzero()
        farthest = max([farthest, *(cells - FARTHEST).abs().flatten().tolist()])
    return farthest * multiple


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return by how much memory held on `device`, for tensors and as scratch space, rises at most during `call`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler prints two lines on stderr
    with profile(profile_memory=True) as profiler:
        call()
    assert profiler.kineto_results is not None
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))
