"""A scan as its files store it, so that a few of its voxels can be changed and all others stay, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from latdiff3d.readers import read_header

_NIFTI_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class StoredChannel:
    """One modality of a scan: the numbers in its file, and what they stand for.

    Attributes:
        numbers: (D, H, W), of the file's type; an intensity is number · slope + inter.
        image: what else the file says: its kind, NIfTI-1 or -2, and header.
    """

    numbers: np.ndarray
    slope: float
    inter: float
    image: nib.Nifti1Image

    @property
    def intensities(self) -> np.ndarray:
        """Return (D, H, W) in the scan's units, float64."""
        return self.numbers.astype(np.float64) * self.slope + self.inter

    def changed(self, where: np.ndarray, intensities: np.ndarray) -> "StoredChannel":
        """Return the channel with other intensities in some voxels, and no other number changed.

        Args:
            where: (D, H, W), True where it changes.
            intensities: (D, H, W), in the scan's units; rounded to what the file's type holds.
        """
        numbers = self.numbers.copy()
        new = (intensities[where] - self.inter) / self.slope
        if np.issubdtype(numbers.dtype, np.integer):
            limits = np.iinfo(numbers.dtype)
            new = np.rint(new).clip(limits.min, limits.max)
        numbers[where] = new.astype(numbers.dtype)
        return StoredChannel(numbers, self.slope, self.inter, self.image)

    def as_nifti(self) -> nib.Nifti1Image:
        """Return a NIfTI image of the same numbers, slope and header, but for extensions, which may name a patient."""
        header: Any = self.image.header.copy()
        header.extensions.clear()
        header.set_data_dtype(self.numbers.dtype)
        header.set_data_shape(self.numbers.shape)
        image = type(self.image)(self.numbers, self.image.affine, header)
        is_scaled = (self.slope, self.inter) != (1.0, 0.0)
        image.header.set_slope_inter(*((self.slope, self.inter) if is_scaled else (None, None)))
        return image


def read_stored(files: Sequence[str]) -> list[StoredChannel]:
    """Return the channels of a scan as its files store them.

    Args:
        files: of one scan, see `layouts.scan_files`; one 4D file holds all channels, else each a 3D one.

    Raises:
        InputError: see `readers.read_header`.
    """
    return [channel for file in files for channel in _channels(file)]


def _channels(file: str) -> list[StoredChannel]:
    affine = read_header(file).affine
    if file.lower().endswith(_NIFTI_SUFFIXES):
        image: Any = nib.load(file)
        numbers, slope, inter = image.dataobj.get_unscaled(), float(image.dataobj.slope), float(image.dataobj.inter)
    else:
        read = sitk.ReadImage(file)
        numbers, slope, inter = sitk.GetArrayFromImage(read), 1.0, 0.0  # (W, H, D), the components last
        numbers = numbers.transpose(2, 1, 0, *range(3, numbers.ndim))
        image = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine)
        image.header.set_xyzt_units("mm")
    numbers = np.asarray(numbers)
    channels = numbers[..., None] if numbers.ndim == 3 else numbers  # (D, H, W, C)
    return [StoredChannel(channels[..., k], slope, inter, image) for k in range(channels.shape[-1])]
