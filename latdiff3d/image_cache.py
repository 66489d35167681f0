"""Where preprocessed volumes wait for their next epoch: in memory, in files that runs share, or nowhere.

    <folder>/<source files>-<transforms>.pt

Nothing in the folder is ever deleted but a file that is damaged, or that was never finished.
"""

import os
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.transforms import Compose

from latdiff3d import fingerprints
from latdiff3d.checkpoints import is_full, require_checksums
from latdiff3d.datalist import COARSE
from latdiff3d.distributed import rank, shared
from latdiff3d.errors import InputError, place_error
from latdiff3d.layouts import Case, files_of

CACHES = ("memory", "disk", "none")
FORMAT = 1  # raised when a file's layout or meaning changes
TORN_AFTER_S = 3600  # an unfinished file older than that is not being written any more

# What PyTorch's reader and ours say of a file that is cut or changed.
_DAMAGE = (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, zipfile.BadZipFile)


def images(
    cases: Sequence[Case], transform: Compose, cache: str = "memory", cache_rate: float = 1.0, folder: str = ""
) -> Dataset:
    """Return MONAI's data set of `cases` that keeps them, as they are before the first random transform, in `cache`.

    An item is the same in each, to the bit.

    Args:
        transform: makes `image` (C, D, H, W), and what goes with it, of a case.
        cache: "memory", MONAI's CacheDataset, filled here; "disk", see `DiskCache`; or "none".
        cache_rate: of "memory", the share of the cases that are kept there, in [0, 1].
        folder: of "disk".

    Raises:
        InputError: another cache, a `cache_rate` that has no effect, or a case that cannot be read.
    """
    if cache not in CACHES:
        raise InputError(f"cache is {cache!r}; expected one of {', '.join(CACHES)}.")
    if cache != "memory" and cache_rate != 1:
        raise InputError(f"cache_rate {cache_rate} is for cache=memory, and cache is {cache}; leave cache_rate out.")
    if cache == "memory":
        return CacheDataset(cases, transform, cache_rate=cache_rate, progress=False)
    return DiskCache(cases, transform, folder) if cache == "disk" else Dataset(cases, transform)


class DiskCache(PersistentDataset):
    """MONAI's PersistentDataset with files that are found by what they come from, and are whole.

    A file's name holds a hash of the source files' contents, and one of the transforms before the first random one,
    settings and code. It is written at the case's first use, beside its place, and renamed after an fsync; its
    checksums are compared when it is read, and nothing in it is ever run. MONAI's own files go by the sources' names,
    are torn where a move between file systems is cut off, and are of no use for a MetaTensor, which it would only read
    by running what is in them.

    Args:
        cases: of one split; all ranks must have the same.
        transform: sees of a case its files and whether its mask is coarse.
        folder: made if need be.

    Raises:
        InputError: on all ranks: a source file cannot be read.
    """

    def __init__(self, cases: Sequence[Case], transform: Compose, folder: str | Path) -> None:
        contents = shared(sorted({path for case in cases for path in files_of(case)}), fingerprints.of_volume)
        Path(folder).mkdir(parents=True, exist_ok=True)
        super().__init__(
            cases, transform, folder, hash_func=partial(_source_hash, contents), hash_transform=_transform_hash
        )
        _sweep(Path(folder))
        if rank() == 0:
            whole = sum(self.place(case).is_file() for case in cases)
            print(f"image cache {folder}: {whole} of {len(cases)} volumes are there, the others will be", flush=True)

    def place(self, case: Case) -> Path:
        """Return the file of a case."""
        return Path(str(self.cache_dir)) / f"{self.hash_func(case).decode()}-{self.transform_hash}.pt"

    def _cachecheck(self, item_transformed: Case) -> dict[str, Any]:
        """Return a case after the transforms before the first random one."""
        case, path = item_transformed, self.place(item_transformed)
        kept = {key: value for key, value in case.items() if key in ("image", "mask", COARSE)}
        said = {key: value for key, value in case.items() if key not in kept}
        parts = _read(path)
        if parts is None:
            parts = {key: _parts(value) for key, value in self._pre_transform(kept).items()}
            _write(path, parts)
        return said | {key: _whole(value) for key, value in parts.items()}


def _source_hash(contents: Mapping[str, str], case: Case) -> bytes:
    """Return a hash of a case's files, in their order, and of what its mask becomes."""
    hashes = [contents[path] for path in files_of(case)]
    return fingerprints.of([FORMAT, hashes, "mask" in case, bool(case.get(COARSE, False))]).encode()


def _transform_hash(transforms: list[Callable[..., Any]]) -> bytes:
    return fingerprints.of_transforms(transforms).encode()


def _parts(value: Any) -> Any:
    """Return what a file holds of a value: of a MetaTensor its voxels and affine."""
    if not isinstance(value, MetaTensor):
        return value
    # A clone, or a crop would be written with all of the volume that it is a view of.
    return {"voxels": value.as_tensor().clone(memory_format=torch.contiguous_format), "affine": value.affine.clone()}


def _whole(value: Any) -> Any:
    return MetaTensor(value["voxels"], affine=value["affine"]) if isinstance(value, dict) else value


def _read(path: Path) -> dict[str, Any] | None:
    """Return a file's content, or None: there is none, or it was damaged and has been taken away."""
    try:
        require_checksums(path)
        return torch.load(path, weights_only=True)
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        if place_error(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: {path} is damaged ({reason}); it is made again.", flush=True)
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, parts: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all; of several writers of the same one the last wins, with the same content."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(parts), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        raise InputError(
            f"the image cache {path.parent} has no space left; make room, set image_cache to another disk, or set "
            "cache=none. The same command goes on from the last checkpoint."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Delete what a killed run left half written."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > TORN_AFTER_S:
                path.unlink()
        except FileNotFoundError:  # another rank was first
            continue
