"""What latents come from, as hashes: source files by their content, transforms and codecs by what changes a result."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import nn

from latdiff3d import __version__
from latdiff3d.codec import LatentCodec
from latdiff3d.errors import InputError
from latdiff3d.readers import read_volume

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_LIBRARIES = ("monai", "torch", "numpy", "builtins")  # their versions, not their files, are hashed
_NO_SETTINGS = ("training", "_is_full_backward_hook", "use_checkpoint", "use_checkpointing")
_SELF_CONTAINED = (".nii", ".nii.gz")  # the other formats may keep their voxels in a file beside the one named


def of_volume(path: str) -> str:
    """Return a hash of a volume file's content; its name and its times count for nothing.

    Raises:
        InputError: it cannot be read.
    """
    parts: list[Any] = [of_file(Path(path))]
    if not path.lower().endswith(_SELF_CONTAINED):
        volume = read_volume(path)
        parts += [volume.as_tensor(), volume.affine]
    return of(parts)


def of_file(path: Path) -> str:
    """Return a hash of a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); copy it again or drop the case.") from None
    return digest.hexdigest()


def of_codec(codec: LatentCodec) -> str:
    """Return a hash of weights, statistics, precision and of every module's settings.

    The device and `use_checkpoint` change no result, but by rounding, and do not count.
    """
    modules = [(name, _kind(module), _settings(module)) for name, module in codec.named_modules()]
    return of([_versions(), modules, dict(codec.state_dict())])


def of_transforms(transforms: Any) -> str:
    """Return a hash of transforms as they were built: their classes' code and every setting, defaults included."""
    return of([_versions(), transforms])


def of(thing: Any) -> str:
    """Return a hash of numbers, strings, arrays, classes, functions, and of objects by what they hold.

    The same in every process. What a random generator holds does not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(thing, ()):
        digest.update(len(part).to_bytes(8, "little"))  # so that ["ab"] is not ["a", "b"]
        digest.update(part)
    return digest.hexdigest()


def _parts(thing: Any, around: tuple[int, ...]) -> Iterator[bytes]:
    """Yield pieces that tell `thing` from others; `around`: the ids of what holds it, to end circles."""
    if id(thing) in around:
        yield b"itself"
        return
    inside = (*around, id(thing))
    yield type(thing).__name__.encode()
    if isinstance(thing, Enum):
        yield repr(thing).encode()
    elif isinstance(thing, torch.Tensor):
        yield str((thing.dtype, tuple(thing.shape))).encode()
        yield thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, (np.ndarray, np.generic)) and thing.dtype != object:
        yield str((thing.dtype, thing.shape)).encode()
        yield thing.tobytes()
    elif isinstance(thing, (*_PLAIN, Path, torch.dtype, torch.device, np.dtype)):
        yield repr(thing).encode()
    elif isinstance(thing, (np.random.RandomState, np.random.Generator, torch.Generator)):
        yield b"random"
    elif isinstance(thing, Mapping):
        yield from _parts(list(thing.items()), inside)
    elif isinstance(thing, (set, frozenset)):
        yield from _parts(sorted(map(repr, thing)), inside)
    elif isinstance(thing, (list, tuple, np.ndarray)):
        for item in thing:
            yield from _parts(item, inside)
        yield b"end"
    elif inspect.isclass(thing) or inspect.isroutine(thing):
        yield from _parts(_code(thing), inside)
    else:
        yield from _parts((_code(type(thing)), dict(sorted(vars(thing).items()))), inside)


def _code(thing: Callable[..., Any]) -> tuple[str, str]:
    """Return where a class or function is defined and, unless a library's version says it, a hash of that file."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name.split(".")[0] in _LIBRARIES:
        return name, ""
    try:
        source = inspect.getsourcefile(thing)
    except TypeError:  # built into Python
        source = None
    return name, of_file(Path(source)) if source and Path(source).is_file() else ""


def _kind(module: nn.Module) -> tuple[str, str]:
    """Return the class that decides what `module` computes: MONAI's or PyTorch's, where ours is a variant of it."""
    bases = (base for base in type(module).__mro__ if base is not nn.Module)
    return _code(next((base for base in bases if base.__module__.split(".")[0] in ("monai", "torch")), type(module)))


def _settings(module: nn.Module) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(is_plain, value)))

    own = {name: value for name, value in vars(module).items() if name not in _NO_SETTINGS and is_plain(value)}
    return dict(sorted(own.items()))


def _versions() -> tuple[str, str]:
    return __version__, monai.__version__
