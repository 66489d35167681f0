"""One file per checkpoint: weights, EMA, optimisers, codec statistics, position and the resolved configuration."""

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latdiff3d.errors import InputError

FOLDER = "checkpoints"
# Raised when the layout of the file changes in a way that older code cannot read.
FORMAT = 1


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either its old content or all of the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        content: tensors, numbers, strings, and dicts and lists of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, stage: str | None = None) -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Args:
        path: the file.
        stage: "autoencoder" or "diffusion", if only one of them will do.

    Raises:
        InputError: missing, damaged, not ours, or of the other stage.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}; expected a .pt file that latdiff3d wrote.") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # EOFError says nothing
        raise InputError(f"{path} is not a readable checkpoint ({reason}); copy it again or use another.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a latdiff3d checkpoint of format {FORMAT}; train one with `latdiff3d train`.")
    if stage is not None and content["stage"] != stage:
        raise InputError(f"{path} is a checkpoint of stage '{content['stage']}'; expected one of stage '{stage}'.")
    return content


def find(place: str | Path, which: str = "best") -> Path:
    """Return the checkpoint file that `place` names: the file itself, or a run's folder.

    Args:
        place: a .pt file or a folder that a training run wrote.
        which: "best" or "last", for a folder.

    Raises:
        InputError: when there is none.
    """
    path = Path(place)
    candidate = path / FOLDER / f"{which}.pt" if path.is_dir() else path
    if not str(place) or not candidate.is_file():
        raise InputError(f"there is no checkpoint at {place!s:.300}; expected a .pt file or the folder of a run.")
    return candidate


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
