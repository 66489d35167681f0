"""Files → arrays: a header or voxels, NIfTI by nibabel, MetaImage and NRRD by SimpleITK, DICOM masks by highdicom."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import ImageReader, MetaTensor
from monai.transforms import LoadImage

from latdiff3d import dicom_masks
from latdiff3d.errors import InputError
from latdiff3d.layouts import MASK_SUFFIXES, VOLUME_SUFFIXES

CHANNEL_FILES = "channel_files"  # the metadata key of the file each channel came from

_NIFTI_SUFFIXES = (".nii.gz", ".nii")
# What nibabel, gzip and SimpleITK raise on a file that is no whole volume.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
)


class Header(NamedTuple):
    """What a file says of its grid: shape (D, H, W) or (D, H, W, C), and the (4, 4) affine from voxels to RAS mm.

    Beside it, whether its voxels are whole numbers by their type.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    stores_integers: bool = True


def read_header(path: str) -> Header:
    """Read a volume's shape and affine without its voxels, but for a DICOM segmentation's.

    Raises:
        InputError: the file is missing, has an unknown suffix, or its header is damaged.
    """
    _require_volume_file(path)
    if path.lower().endswith(dicom_masks.SUFFIX):
        labels, affine = dicom_masks.read_segmentation(path)
        return Header(labels.shape, affine)
    try:
        if path.lower().endswith(_NIFTI_SUFFIXES):
            nifti: Any = nibabel.load(path)
            shape, affine = tuple(int(size) for size in nifti.shape), np.asarray(nifti.affine, dtype=np.float64)
            is_scaled = (nifti.dataobj.slope, nifti.dataobj.inter) != (1, 0)
            return Header(shape, affine, bool(np.issubdtype(nifti.get_data_dtype(), np.integer)) and not is_scaled)
        reader = sitk.ImageFileReader()
        reader.SetFileName(path)
        reader.ReadImageInformation()
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    num_components = reader.GetNumberOfComponents()
    shape = reader.GetSize() + ((num_components,) if num_components > 1 else ())
    return Header(shape, _ras_affine(reader), "float" not in sitk.GetPixelIDValueAsString(reader.GetPixelID()))


def read_volume(path: str) -> MetaTensor:
    """Read a volume as float32 (C, D, H, W), with C = 1 for a 3D file; the metadata names its file.

    Raises:
        InputError: as `read_header`, or the file is truncated, or neither 3D nor 4D.
    """
    _require_volume_file(path)
    volume = _segmentation(path) if path.lower().endswith(dicom_masks.SUFFIX) else _loaded(path)
    if volume.ndim not in (3, 4):
        raise InputError(str(shape_problem(path, tuple(volume.shape), 1)))
    voxels = volume.as_tensor()
    channels = voxels[None] if voxels.ndim == 3 else voxels.movedim(3, 0)  # (C, D, H, W)
    meta = {  # a fixed set of keys, so that files of different formats collate
        "filename_or_obj": path,
        CHANNEL_FILES: channel_labels(path, len(channels)),
        "original_affine": np.asarray(volume.affine),
        "spatial_shape": np.array(channels.shape[1:]),
        "original_channel_dim": 0,
        "space": "RAS",
    }
    return MetaTensor(channels.contiguous().to(torch.float32), affine=volume.affine, meta=meta)


def shape_problem(path: str, shape: tuple[int, ...], num_channels: int) -> str | None:
    name = f"{file_label(path)} is {len(shape)}D ({size_text(shape)})"
    if len(shape) not in (3, 4):
        return f"{name}; expected a 3D volume, or a 4D one with its channels last."
    found = shape[3] if len(shape) == 4 else 1
    if found == num_channels:
        return None
    if num_channels == 1:
        return f"{name}: axis 3 holds {found} volumes; expected one 3D volume. Split it, or name {found} modalities."
    if found == 1:
        return f"{name}: one volume; expected {num_channels} channels. List a file for each, or correct modalities."
    return f"{name}: axis 3 holds {found} volumes; expected {num_channels} channels there."


class SimpleITKReader(ImageReader):
    """Read for MONAI's LoadImage what nibabel does not: MHA, MHD and NRRD."""

    def verify_suffix(self, filename: Any) -> bool:
        paths = filename if isinstance(filename, (list, tuple)) else [filename]
        return all(str(path).lower().endswith(VOLUME_SUFFIXES[2:]) for path in paths)

    def read(self, data: Any, **kwargs: Any) -> sitk.Image:
        return sitk.ReadImage(str(data[0] if isinstance(data, (list, tuple)) else data), **kwargs)

    def get_data(self, img: sitk.Image) -> tuple[np.ndarray, dict[str, Any]]:
        voxels = sitk.GetArrayFromImage(img)  # (W, H, D) or (W, H, D, C): the last spatial axis first
        num_spatial = img.GetDimension()
        voxels = voxels.transpose(*reversed(range(num_spatial)), *range(num_spatial, voxels.ndim))
        affine = _ras_affine(img)
        return voxels, {"affine": affine, "original_affine": affine.copy(), "original_channel_dim": float("nan")}


def file_label(path: str | Path) -> str:
    """Name a file in a sentence: with its folder, since an image and its mask often share a name."""
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _require_volume_file(path: str) -> None:
    if not path.lower().endswith(MASK_SUFFIXES):
        advice = " Convert a DICOM series to NIfTI first." if Path(path).is_dir() else ""
        raise InputError(
            f"{path} is no volume that can be read; expected {', '.join(VOLUME_SUFFIXES)}, or a DICOM segmentation, "
            f"{dicom_masks.SUFFIX}.{advice}"
        )
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist.")


def _segmentation(path: str) -> MetaTensor:
    labels, affine = dicom_masks.read_segmentation(path)
    return MetaTensor(labels.astype(np.float32), affine=torch.from_numpy(affine))  # (D, H, W)


def _loaded(path: str) -> MetaTensor:
    loader = LoadImage(image_only=True)
    loader.register(SimpleITKReader())
    try:
        return loader(path)  # (D, H, W) or (D, H, W, C)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: BaseException) -> InputError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return InputError(f"{path} is truncated or damaged: {reason}. Download or copy it again.")


def _ras_affine(image: Any) -> np.ndarray:
    num_axes = image.GetDimension()
    num_spatial = min(num_axes, 3)
    direction = np.reshape(image.GetDirection(), (num_axes, num_axes))[:num_spatial, :num_spatial]
    affine = np.eye(4)
    affine[:num_spatial, :num_spatial] = direction * np.array(image.GetSpacing()[:num_spatial])
    affine[:num_spatial, 3] = image.GetOrigin()[:num_spatial]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS


def channel_labels(path: str, num_channels: int) -> list[str]:
    label = file_label(path)
    return [label] if num_channels == 1 else [f"{label} (channel {channel})" for channel in range(num_channels)]


def size_text(sizes: Any) -> str:
    return "×".join(str(size) for size in sizes)
