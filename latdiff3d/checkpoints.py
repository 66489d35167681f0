"""One file per checkpoint: weights, EMA, optimisers, codec statistics, position and the resolved configuration."""

import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latdiff3d import exported
from latdiff3d.errors import InputError

FOLDER = "checkpoints"
AFTER_A_FULL_DISK = "make room, and the same command goes on from the last checkpoint, which is whole."
LAST = "last.pt"
# What PyTorch's reader and ours say of a file that is cut, changed or none of theirs.
UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, zipfile.BadZipFile)
# Raised when the layout of the file changes in a way that older code cannot read.
FORMAT = 1


def save(path: Path, content: Mapping[str, Any], num_before: int = 0) -> None:
    """Write a checkpoint so that `path` holds either its old content or all of the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        content: tensors, numbers, strings, and dicts and lists of them.
        num_before: how many of the checkpoints that were at `path` before are kept, see `earlier`.

    Raises:
        InputError: the file system is full; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        # The new one first: the one at `path` may be damaged, and then takes the place of the last whole one.
        previous = path.with_name(f".{path.name}.previous")
        if num_before and path.is_file():
            _also_as(path, previous)
        temporary.replace(path)
        if previous.is_file():
            for number in range(num_before, 1, -1):
                if earlier(path, number - 1).is_file():
                    earlier(path, number - 1).replace(earlier(path, number))
            previous.replace(earlier(path, 1))
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError where the file system is full
        if not is_full(error):
            raise
        raise InputError(f"{path} cannot be written: {path.parent} has no space left; {AFTER_A_FULL_DISK}") from error
    finally:
        temporary.unlink(missing_ok=True)


def earlier(path: Path, number: int) -> Path:
    """Return where the checkpoint that was `number` ones before that at `path` is kept; `path` itself for 0."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def require_space(path: Path) -> None:
    """Refuse to go on where the next checkpoint at `path` would not fit, while the last one is still young.

    Raises:
        InputError: less space is free than the last checkpoint takes.
    """
    needed = path.stat().st_size if path.is_file() else 0
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else needed
    if free < needed:
        raise InputError(
            f"{path.parent} has {free / 1e6:.0f} MB free, the next checkpoint takes {needed / 1e6:.0f}; "
            f"{AFTER_A_FULL_DISK}"
        )


def load(path: Path, stage: str | None = None) -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Args:
        path: the file; or one with weights in an exported bundle, see exported.py.
        stage: "autoencoder" or "diffusion", if only one of them will do.

    Raises:
        InputError: missing, damaged, not ours, or of the other stage.
    """
    try:
        content = exported.as_checkpoint(path, read, FORMAT) if exported.is_weights_file(path) else read(path)
    except FileNotFoundError as error:
        missing = error.filename or path
        raise InputError(f"there is no checkpoint {missing}; expected a .pt file that latdiff3d wrote.") from None
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # EOFError says nothing
        raise InputError(f"{path} is not a readable checkpoint ({reason}); copy it again or use another.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a latdiff3d checkpoint of format {FORMAT}; train one with `latdiff3d train`.")
    if stage is not None and content["stage"] != stage:
        raise InputError(f"{path} is a checkpoint of stage '{content['stage']}'; expected one of stage '{stage}'.")
    return content


def find(place: str | Path, which: str = "best", stage: str | None = None) -> Path:
    """Return the checkpoint file that `place` names: the file itself, or a run's or an exported bundle's.

    Args:
        place: a .pt file, a folder that a training run wrote, or one that `latdiff3d export` wrote.
        which: "best" or "last", for a run's folder.
        stage: whose weights of an exported bundle; stage 2's if None.

    Raises:
        InputError: when there is none.
    """
    path = Path(place)
    candidate = path / FOLDER / f"{which}.pt" if path.is_dir() else path
    if path.is_dir() and not candidate.is_file():
        candidate = exported.weights_file(path, stage)
    if not str(place) or not candidate.is_file():
        raise InputError(f"there is no checkpoint at {place!s:.300}; expected a .pt file or the folder of a run.")
    return candidate


def load_last(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """Return the content of a run's last whole checkpoint, None where it has none yet; damaged ones are named.

    Args:
        run_dir: the run's folder.
        stage: see `load`.

    Raises:
        InputError: all are damaged, or of another stage.
    """
    last = run_dir / FOLDER / LAST
    before = last.parent.glob(f"{last.stem}-[0-9]*{last.suffix}")
    kept = [last, *sorted(before, key=lambda path: int(path.stem.rpartition("-")[2]))]
    damage = ""
    for path in filter(Path.is_file, kept):
        try:
            content = load(path, stage)
        except InputError as error:
            damage = damage or str(error)
            continue
        if damage:
            print(f"warning: {damage} Going on from {path}, the one before it.", flush=True)
        return content
    if damage:
        raise InputError(damage)
    return None


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record(place: str | Path) -> dict[str, str]:
    """Return path and SHA-256 of the checkpoint that `place` names, to keep in a checkpoint that builds on it."""
    path = find(place)
    return {"path": str(path), "sha256": sha256(path)}


def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load `weights`, all of them, into `network`.

    Raises:
        InputError: naming the first key whose shape differs, or that one of the two lacks.
    """
    own = network.state_dict()
    for key in [*own, *(key for key in weights if key not in own)]:
        found = tuple(weights[key].shape) if key in weights else "absent"
        expected = tuple(own[key].shape) if key in own else "absent"
        if found != expected:
            raise InputError(
                f"{source} does not fit this configuration: {key} is {found} there, {expected} here. "
                "Use the configuration it was trained with, the config.yaml in its run's folder."
            )
    network.load_state_dict(weights)


def require_checksums(path: Path) -> None:
    """Compare all that a file of PyTorch's, a zip archive, holds with its checksums, which PyTorch does not look at.

    Raises:
        ValueError: one of them is wrong.
    """
    if not zipfile.is_zipfile(path):
        return  # no file of ours, or a cut one; what it is, PyTorch says
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")


def read(path: Path) -> Any:
    """Return what a file of PyTorch's holds: tensors, numbers, strings and containers of them; code is refused.

    Raises:
        OSError and those of `UNREADABLE`.
    """
    require_checksums(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def is_full(error: BaseException | None) -> bool:
    """Say whether the system refused to write any more, at the bottom of whatever PyTorch makes of it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return error is not None and is_full(error.__cause__ or error.__context__)


def _also_as(path: Path, other: Path) -> None:
    """Let `other` be what `path` is, at once."""
    temporary = other.with_name(f".{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    temporary.replace(other)
