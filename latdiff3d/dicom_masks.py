"""A DICOM segmentation → one label map: each voxel's segment number, on the grid that its frames span."""

from typing import Any

import numpy as np

from latdiff3d.errors import InputError

SUFFIX = ".dcm"

_MODALITY = "SEG"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's world is LPS


def read_segmentation(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of a DICOM segmentation and where they lie.

    Slices that the file leaves out because they are empty are 0 where they lie between others; the grid ends with the
    outermost slices that it holds.

    Args:
        path: of an existing file.

    Returns:
        labels (D, H, W), the segments' numbers, 0 where there is none, along slices, rows and columns; and the (4, 4)
        affine from voxels to RAS mm.

    Raises:
        InputError: highdicom is not installed, or the file is damaged, no segmentation, one of fractions, or one whose
            segments overlap or whose slices are not equally far apart.
    """
    segmentation = _opened(path)
    if segmentation.SegmentationType == "FRACTIONAL":
        raise InputError(f"{path} holds fractions of its segments; expected a label map. Export it as binary.")
    try:
        volume = segmentation.get_volume(combine_segments=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path} is no single label map: {reason} Export it without overlaps, on slices equally far apart."
        ) from error
    return np.asarray(volume.array), _LPS_TO_RAS @ np.asarray(volume.affine, dtype=float)


def _opened(path: str) -> Any:
    try:
        from highdicom.seg import Segmentation
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} is a DICOM file, and {error.name} is not installed; pip install highdicom, or convert the "
            "file to NIfTI."
        ) from None
    try:
        dataset = dcmread(path)
        modality = dataset.get("Modality", "unknown")
        if modality == _MODALITY:
            return Segmentation.from_dataset(dataset, copy=False)
    except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path} is truncated or damaged: {reason}. Download or copy it again.") from error
    raise InputError(
        f"{path} is a DICOM file of modality {modality}; expected {_MODALITY}, a segmentation. Convert series to NIfTI."
    )
