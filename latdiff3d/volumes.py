"""Where a volume lies in the world: a mask brought to the model's grid, a volume back to the mask's; NIfTI files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SpatialCrop, SpatialPad
from monai.transforms.utils import convert_applied_interp_mode, generate_spatial_bounding_box
from monai.utils import convert_to_tensor

from latdiff3d.intensities import as_int16
from latdiff3d.layouts import volume_stem
from latdiff3d.provenance import mark, sidecar_of
from latdiff3d.readers import read_header, read_volume


@dataclass(frozen=True)
class ModelGrid:
    """A mask on the grid a model was trained on, and the way back.

    Attributes:
        stored: (1, D', H', W'), the mask as its file has it.
        mask: (1, D, H, W), of the model's crop size or larger, mapped labels, RAS, padded with background where the
            volume ends.
    """

    stored: MetaTensor
    mask: MetaTensor
    preprocessing: Compose
    pad: SpatialPad
    crop: SpatialCrop

    def to_mask_grid(self, volume: torch.Tensor) -> np.ndarray:
        """Return `volume` (C, D, H, W), which lies on `mask`, on the mask file's own grid, 0 outside the crop."""
        operations = convert_applied_interp_mode(self.mask.applied_operations, mode="bilinear")
        placed = MetaTensor(volume, meta=self.mask.meta, applied_operations=operations)
        placed = self.pad.inverse(self.crop.inverse(placed))  # (C, D', H', W'), the whole mask's, RAS
        return np.asarray(self.preprocessing.inverse({"mask": placed})["mask"], dtype=np.float32)


def mask_on_model_grid(
    path: str | Path, preprocessing: Compose, crop_to: Sequence[int], cell: int | None = None
) -> ModelGrid:
    """Load a mask and place it on the model's grid, see `place_mask`.

    Args:
        path: any that `readers` read, of any orientation.
        preprocessing: the model's, which takes a mask alone as well.
        crop_to, cell: see `place_mask`.
    """
    stored = read_volume(str(path))
    return place_mask(stored, preprocessing({"mask": stored})["mask"], preprocessing, crop_to, cell)


def place_mask(
    stored: MetaTensor,
    mask: MetaTensor,
    preprocessing: Compose,
    crop_to: Sequence[int],
    cell: int | None = None,
    around: torch.Tensor | None = None,
) -> ModelGrid:
    """Cut the crop around a mask's labelled voxels' centre, or around its middle where it is empty; or keep it whole.

    Args:
        stored: (1, D', H', W'), as its file has it.
        mask: (1, D, H, W), which `preprocessing` has made of that.
        crop_to: (D, H, W); smaller masks are padded to it.
        cell: None for the crop; else nothing is cut, but padded to whole latent cells of so many voxels along an edge.
        around: of the mask's shape; the crop is cut around the middle of what is above 0 there instead.
    """
    if cell is not None:
        whole = [max(-(-n // cell) * cell, least) for n, least in zip(mask.shape[1:], crop_to, strict=True)]
        pad, crop = SpatialPad(spatial_size=whole), SpatialCrop(roi_start=[0, 0, 0], roi_end=whole)
        return ModelGrid(stored, convert_to_tensor(crop(pad(mask)), track_meta=True), preprocessing, pad, crop)
    pad = SpatialPad(spatial_size=crop_to)
    padded = pad(mask)
    source = padded if around is None else pad(around)
    start, end = generate_spatial_bounding_box(source, allow_smaller=True)
    empty = not bool((source > 0).any())
    size = np.array(padded.shape[1:])
    centre = size // 2 if empty else (np.array(start) + np.array(end)) // 2
    first = np.clip(centre - np.array(crop_to) // 2, 0, size - np.array(crop_to))
    crop = SpatialCrop(roi_start=first.tolist(), roi_end=(first + np.array(crop_to)).tolist())
    return ModelGrid(stored, convert_to_tensor(crop(padded), track_meta=True), preprocessing, pad, crop)


def write_synthetic(
    folder: Path,
    case: str,
    volume: np.ndarray,
    affine: np.ndarray,
    modalities: Sequence[str],
    provenance: Mapping[str, Any],
    mask: np.ndarray | None = None,
    int16: bool = False,
) -> list[Path]:
    """Write `<folder>/<case>/<case>_<modality>.nii.gz`, BraTS's layout, the mask beside them, and a JSON sidecar.

    The sidecar is written last, with the files' hashes: one that is there stands for a case that is whole.

    Args:
        volume: (C, D, H, W), one channel a modality.
        affine: (4, 4), voxel to RAS mm.
        provenance: what made it: model, seed, sampler; see `provenance.sidecar_of`.
        mask: (D, H, W) as in the mask's file, written as `_seg`.
        int16: see `write_marked`.

    Returns:
        the volumes' paths.
    """
    arrays = {modality: ("volume", channel) for channel, modality in zip(volume, modalities, strict=True)}
    if mask is not None:
        arrays["seg"] = ("mask", mask)
    return write_marked(folder, case, arrays, affine, provenance, int16)[: len(modalities)]


def write_marked(
    folder: Path,
    case: str,
    arrays: Mapping[str, tuple[str, np.ndarray | nib.Nifti1Image]],
    affine: np.ndarray,
    provenance: Mapping[str, Any],
    int16: bool = False,
) -> list[Path]:
    """Write `<folder>/<case>/<case>_<name>.nii.gz`, which say what they are, and after them the sidecar.

    Args:
        arrays: what it is, of `provenance.DESCRIPTIONS`, and its voxels (D, H, W), by name; masks keep their type, and
            a NIfTI image in place of voxels is written as it is.
        affine: (4, 4), voxel to RAS mm.
        provenance: see `provenance.sidecar_of`.
        int16: store volumes in half of float32's bytes, with a slope, see `intensities.as_int16`; else as float32.

    Returns:
        the paths of `arrays`.
    """
    sidecar = sidecar_file(folder, case)
    target = sidecar.parent
    target.mkdir(parents=True, exist_ok=True)
    sidecar.unlink(missing_ok=True)  # of what was there before; the new one comes last, once all else is whole
    files = {}
    for name, (kind, array) in arrays.items():
        path = target / f"{case}_{name}.nii.gz"
        image = _image(array, affine, int16, kind == "mask") if isinstance(array, np.ndarray) else array
        mark(image, kind, provenance)
        temporary = path.with_name(f".tmp_{path.name}")
        nib.save(image, temporary)
        temporary.replace(path)
        files[path] = kind
    temporary = target / f".tmp_{sidecar.name}"
    temporary.write_text(json.dumps(sidecar_of(provenance, files), indent=2) + "\n")
    temporary.replace(sidecar)
    return list(files)


def _image(array: np.ndarray, affine: np.ndarray, int16: bool, is_mask: bool) -> nib.Nifti1Image:
    stored, slope, inter = as_int16(array) if int16 and not is_mask else (array, None, None)
    image = nib.Nifti1Image(stored if int16 or is_mask else array.astype(np.float32), affine)
    image.header.set_slope_inter(slope, inter)
    image.header.set_xyzt_units("mm")
    return image


def sidecar_file(folder: Path, case: str) -> Path:
    """Return where the sidecar of a case is, beside its volumes."""
    return folder / case / f"{case}.json"


def read_mask(path: str | Path, label_map: Mapping[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask file's labels (D, H, W), those of `label_map` changed and others as stored; and its affine (4, 4).

    Raises:
        InputError: see `readers.read_volume`.
    """
    stored = read_volume(str(path))
    return labels_of(stored, label_map), np.asarray(stored.affine, dtype=float)


def labels_of(stored: MetaTensor, label_map: Mapping[int, int] | None = None) -> np.ndarray:
    """Return the labels (D, H, W) of a mask (1, D, H, W) as its file has it; see `read_mask`."""
    before = stored[0].numpy()
    labels = before.copy()
    for label, ours in (label_map or {}).items():
        labels[before == label] = ours
    return labels.astype(np.uint8 if labels.max() < 256 else np.int16)


def median_spacing_mm(cases: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the median voxel size of the cases' first images, in RAS axis order, in mm; header reads only."""
    return [float(value) for value in np.median([spacing_mm_of(case["image"][0]) for case in cases], axis=0)]


def spacing_mm_of(path: str) -> np.ndarray:
    """Return a file's voxel size (3,), in RAS axis order, in mm, from its header."""
    affine = read_header(path).affine
    spacing = np.empty(3)
    spacing[nib.orientations.io_orientation(affine)[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    return spacing


def centred_affine(shape: Sequence[int], spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the RAS affine of a grid whose middle is the world's origin."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -np.array(spacing_mm) * (np.array(shape) - 1) / 2
    return affine


def case_name(mask: str | Path) -> str:
    """Return a mask file's name without its ending and without `_seg`."""
    return volume_stem(str(mask)).removesuffix("_seg")
