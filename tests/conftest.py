"""Tiny NIfTI files in the layouts that the readers know, and the real volumes where they are at hand."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
MODALITIES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def real_data():
    """Return the folder of real volumes, or skip."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real volumes are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture
def write_volume():
    """Write a NIfTI file; without voxels, a ramp of 4 × 5 × 6 in int16."""

    def write(path, voxels=None, affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        voxels = np.arange(120, dtype=np.int16).reshape(4, 5, 6) if voxels is None else voxels
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
        return str(path)

    return write


@pytest.fixture
def write_brats_case(write_volume):
    """Write `<root>/<name>/<name>_<part>.nii.gz` for four modalities and a mask; `replaced` holds other voxels."""

    def write(root, name, without=(), **replaced):
        for number, part in enumerate((*MODALITIES, "seg")):
            voxels = np.arange(120, dtype=np.float32).reshape(4, 5, 6) + number
            if part == "seg":
                voxels = np.zeros((4, 5, 6), np.uint8)
                voxels[1:3, 1:3, 1:3] = 1
            if part not in without:
                write_volume(root / name / f"{name}_{part}.nii.gz", replaced.get(part, voxels))
        return root / name

    return write
