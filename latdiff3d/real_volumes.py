"""Real volumes as a model sees them, each kept on disk under a hash of its files and of what is done with them."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from monai.transforms import Compose, SpatialPad, SpatialPadd

from latdiff3d import fingerprints, whole_files
from latdiff3d.handlers import progress_bar
from latdiff3d.layouts import files_of
from latdiff3d.synthesis import Model
from latdiff3d.transforms import ForegroundCropd, MarkValidd
from latdiff3d.volumes import place_mask

STEPS = 65535  # of stored intensities: a step costs a volume nothing below 100 dB
FORMAT = 1  # raised when the meaning of what is stored changes


@dataclass(frozen=True)
class RealVolume:
    """A real volume as the model sees it.

    Attributes:
        name: of its case.
        image: (C, D, H, W) in [0, 1], cut around its mask as a sample for that mask is; around its foreground, of a
            model without masks.
        mask: (1, D, H, W), classes 0 … K − 1; None of a model without masks.
        own: (1, D, H, W), 1 on the volume's own voxels, 0 on padding.
        spacing_mm: of its voxels, (3,).
    """

    name: str
    image: np.ndarray
    mask: np.ndarray | None
    own: np.ndarray
    spacing_mm: np.ndarray


class RealVolumes(Sequence[RealVolume]):
    """Real volumes, each read and preprocessed when it is first asked for, and then from the folder's file of it.

    Attributes:
        keys: of each, a hash of its files and of what is done with them.
    """

    def __init__(
        self, model: Model, cases: Sequence[Mapping[str, Any]], folder: Path, keys: Sequence[str] | None = None
    ) -> None:
        self.model, self.cases, self.folder = model, cases, folder
        self.keys = self._keys() if keys is None else keys

    def _keys(self) -> list[str]:
        model = self.model
        how = [FORMAT, fingerprints.of_transforms(model.preprocessing), model.crop_to, model.is_conditional]
        return [
            fingerprints.of([how, [fingerprints.of_volume(file) for file in files_of(dict(case))]])
            for case in progress_bar(self.cases, desc="looking for changes", unit="case", leave=False)
        ]

    def spread(self, number: int) -> "RealVolumes":
        """Return at most `number` of them, evenly spread, whose files are not looked at again."""
        chosen = spread(range(len(self.cases)), number)
        return RealVolumes(self.model, [self.cases[k] for k in chosen], self.folder, [self.keys[k] for k in chosen])

    def __len__(self) -> int:
        return len(self.cases)

    @overload
    def __getitem__(self, index: int) -> RealVolume: ...
    @overload
    def __getitem__(self, index: slice) -> list[RealVolume]: ...
    def __getitem__(self, index: int | slice) -> RealVolume | list[RealVolume]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        path, case = self.folder / f"{self.keys[index]}.npz", self.cases[index]
        if not _is_whole(path):
            _store(path, real_volume(self.model, case))
        return _stored(path, _name(case))


def real_volume(model: Model, case: Mapping[str, Any]) -> RealVolume:
    """Return a case's volume as the model sees it: read, preprocessed, padded as in training and cut.

    Raises:
        InputError: a case that cannot be read, or whose image and mask do not go together.
    """
    name = _name(case)
    if not model.is_conditional:
        transforms = [
            *model.preprocessing.transforms,
            MarkValidd(),
            SpatialPadd("image", model.crop_to, mode="edge"),
            SpatialPadd("valid", model.crop_to),
            ForegroundCropd(["image", "valid"], "image", model.crop_to),
        ]
        item = Compose(transforms)({"image": case["image"]})
        spacing_mm = np.linalg.norm(np.asarray(item["image"].affine)[:3, :3], axis=0)
        return RealVolume(name, _array(item["image"]), None, _array(item["valid"]), spacing_mm)
    item = model.preprocessing({"image": case["image"], "mask": case["mask"]})
    grid = place_mask(case["mask"], item["mask"], model.preprocessing, model.crop_to)
    image = grid.crop(SpatialPad(model.crop_to, mode="edge")(item["image"]))
    own = grid.crop(grid.pad(torch.ones_like(item["image"][:1])))
    spacing_mm = np.linalg.norm(np.asarray(grid.mask.affine)[:3, :3], axis=0)
    return RealVolume(name, _array(image), _array(grid.mask), _array(own), spacing_mm)


def spread(things: Sequence[Any], number: int) -> list[Any]:
    """Return at most `number` of several things, evenly spread, from the first to the last."""
    return [things[k] for k in sorted({round(k) for k in np.linspace(0, len(things) - 1, min(len(things), number))})]


def _store(path: Path, real: RealVolume) -> None:
    image = np.round(real.image * STEPS).astype(np.uint16)
    mask = np.zeros(0) if real.mask is None else real.mask
    buffer = io.BytesIO()
    np.savez(buffer, image=image, mask=mask.astype(np.uint8), own=real.own.astype(np.uint8), spacing_mm=real.spacing_mm)
    whole_files.write(path, buffer.getvalue())


def _stored(path: Path, name: str) -> RealVolume:
    with np.load(path) as arrays:
        image = arrays["image"].astype(np.float32) / STEPS
        mask = arrays["mask"] if arrays["mask"].size else None
        return RealVolume(name, image, mask, arrays["own"], arrays["spacing_mm"])


def _is_whole(path: Path) -> bool:
    """Say whether a file of arrays is there, its checksums right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _name(case: Mapping[str, Any]) -> str:
    return Path(str(case["case"])).name


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(torch.as_tensor(tensor).as_subclass(torch.Tensor), dtype=np.float32)
