"""One volume's latents on disk: memory-mapped arrays in a folder that is there whole or not at all.

    <entry>/{mean,std,mask}.npy, entry.json

An entry is written to a folder beside its place and renamed. entry.json holds a hash of each array, so that one that a
crash of the machine tore is seen, and made again.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch.nn import functional as F

from latdiff3d import fingerprints
from latdiff3d.codec import LatentCodec
from latdiff3d.crop_windows import Box, foreground_box
from latdiff3d.errors import InputError

ABOUT = "entry.json"
TORN_AFTER_S = 3600  # a folder older than that is not being written any more

Flip = tuple[int, ...]  # the spatial axes that are mirrored, ascending


@dataclass(frozen=True)
class Entry:
    """One volume's posterior and mask where they lie.

    Attributes:
        box: the foreground's, in voxels of the padded volume.
        cells: (d, h, w), the latents' size.
        factor: f, the voxels along a cell's edge.
    """

    folder: Path
    box: Box
    cells: tuple[int, int, int]
    factor: int

    def crop(self, start: Sequence[int], size: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return `mean` and `std` (C', *size) and, if there is one, `mask` (1, *size · f) in uint8.

        The files are mapped anew each time, which is cheap, and holds nothing that a worker would have to inherit.

        Args:
            start, size: of the window, in cells.
        """
        found = {}
        for path in sorted(self.folder.glob("*.npy")):
            scale = self.factor if path.stem == "mask" else 1
            window = [slice(s * scale, (s + n) * scale) for s, n in zip(start, size, strict=True)]
            array = np.load(path, mmap_mode="r")
            found[path.stem] = torch.from_numpy(np.array(array[tuple([slice(None), *window])]))
        return found


def all_flips(axes: Sequence[int]) -> list[Flip]:
    """Return the combinations of `axes`, none of them first."""
    return [flip for n in range(len(axes) + 1) for flip in itertools.combinations(sorted(axes), n)]


def encoded(
    volume: Mapping[str, torch.Tensor],
    flip: Flip,
    codec: LatentCodec,
    device: torch.device,
    at_once: int,
    memory_gb: float | None,
) -> tuple[dict[str, np.ndarray], Box]:
    """Return the arrays of an entry, and its foreground's box, of a preprocessed `volume`.

    Args:
        volume: `image` (C, D, H, W), in [0, 1], and perhaps `mask` (1, D, H, W), in uint8.
        at_once: so many voxels fit the memory whatever `memory_gb` says.
    """
    image, *mask = (torch.flip(v, [axis + 1 for axis in flip]) for v in volume.values())
    budget = None if image[0].numel() <= at_once else memory_gb
    mean, std = (moment[0].cpu() for moment in codec.encode(image[None].to(device), budget))  # (C', d, h, w)
    arrays = {"mean": mean.numpy(), "std": std.numpy()}
    for labels in mask:
        end = [cells * codec.factor - n for cells, n in zip(mean.shape[1:], labels.shape[1:], strict=True)]
        arrays["mask"] = F.pad(labels, [n for more in reversed(end) for n in (0, more)]).numpy()
    return arrays, foreground_box(image)


def write(path: Path, arrays: Mapping[str, np.ndarray], box: Box, about: Mapping[str, Any]) -> None:
    """Write an entry, whole or not at all; one that another process has finished meanwhile is left as it is."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        hashes = {file.name: fingerprints.of_file(file) for file in sorted(temporary.iterdir())}
        content = {**about, "foreground": [corner.tolist() for corner in box], "files": hashes}
        (temporary / ABOUT).write_text(json.dumps(content))
        for written in temporary.iterdir():
            with written.open("rb+") as file:
                os.fsync(file.fileno())
        if path.exists() and not is_whole(path):
            shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError:
            if not is_whole(path):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Say whether an entry is there, each array as it was written."""
    try:
        files = json.loads((path / ABOUT).read_bytes())["files"]
        return all(fingerprints.of_file(path / name) == value for name, value in files.items())
    except (OSError, InputError, ValueError, KeyError):
        return False


def read(path: Path, factor: int) -> Entry:
    """Return the entry at `path`.

    Raises:
        InputError: there is none.
    """
    try:
        first, end = json.loads((path / ABOUT).read_bytes())["foreground"]
    except OSError:
        raise InputError(
            f"the latents at {path} are not there, though a rank has written them; expected a latent_cache on a disk "
            "that all ranks share."
        ) from None
    shape = np.load(path / "mean.npy", mmap_mode="r").shape
    return Entry(path, (np.array(first), np.array(end)), (shape[1], shape[2], shape[3]), factor)


def sweep(place: Path) -> None:
    """Delete what a killed build left half written."""
    for path in place.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > TORN_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # another rank was first
            continue
