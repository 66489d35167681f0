"""A scan's numbers as its files store them: kept bit for bit, whatever their type, scaling and format."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from latdiff3d.stored_scans import read_stored

DTYPES = ["<u1", "<i2", ">i2", "<u2", "<i4", "<i8", "<f4", ">f4", "<f8"]
AFFINE = np.array([[-0.9, 0.1, 0, 40], [0.1, -0.9, 0, -3], [0, 0, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def where():
    where = np.zeros((5, 6, 7), bool)
    where[1:3, 2:4, 3:6] = True
    return where


def stored(path, dtype, slope=None, inter=None, kind=nib.Nifti1Image):
    numbers = np.random.default_rng(0).integers(3, 250, (5, 6, 7)).astype(dtype)
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = kind(numbers, AFFINE, header)
    image.header.set_slope_inter(slope, inter)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"John Doe"))
    nib.save(image, path)
    return numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slope", "inter"), [(None, None), (0.037, -12.5)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_numbers_type_scaling_and_place_stay(tmp_path, where, dtype, slope, inter, kind):
    numbers = stored(tmp_path / "scan.nii.gz", dtype, slope, inter, kind)
    [channel] = read_stored([str(tmp_path / "scan.nii.gz")])
    assert np.allclose(channel.intensities, numbers * (slope or 1.0) + (inter or 0.0))
    wanted = 100.3 * (slope or 1.0) + (inter or 0.0)
    nib.save(channel.changed(where, np.full(where.shape, wanted)).as_nifti(), tmp_path / "new.nii.gz")
    new, old = nib.load(tmp_path / "new.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    raw = new.dataobj.get_unscaled()
    assert type(new) is kind and raw.dtype == old.get_data_dtype() and np.array_equal(raw[~where], numbers[~where])
    assert (new.dataobj.slope, new.dataobj.inter) == (old.dataobj.slope, old.dataobj.inter)
    assert np.array_equal(new.affine, old.affine) and new.header["sform_code"] == old.header["sform_code"]
    step = (slope or 1) if np.issubdtype(raw.dtype, np.integer) else 1e-4
    assert np.abs(new.get_fdata()[where] - wanted).max() <= step / 2
    assert not new.header.extensions  # which may name a patient


def test_what_a_type_cannot_hold_is_cut_to_its_ends(tmp_path, where):
    stored(tmp_path / "scan.nii", "<u1")
    [channel] = read_stored([str(tmp_path / "scan.nii")])
    assert (channel.changed(where, np.full(where.shape, 300.0)).numbers[where] == 255).all()
    assert (channel.changed(where, np.full(where.shape, -3.0)).numbers[where] == 0).all()


def test_a_4d_file_has_a_channel_for_each_volume(tmp_path, where):
    numbers = np.arange(420, dtype=np.int16).reshape(5, 6, 7, 2)
    nib.save(nib.Nifti1Image(numbers, AFFINE), tmp_path / "scan.nii.gz")
    channels = read_stored([str(tmp_path / "scan.nii.gz")])
    assert [np.array_equal(channel.numbers, numbers[..., k]) for k, channel in enumerate(channels)] == [True, True]
    assert channels[1].as_nifti().shape == (5, 6, 7)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_become_nifti_of_the_same_numbers_in_the_same_place(tmp_path, where, suffix):
    numbers = np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    image = sitk.GetImageFromArray(numbers.transpose(2, 1, 0))
    image.SetSpacing((0.9, 1.0, 2.5))
    image.SetOrigin((3, -4, 5))
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    [channel] = read_stored([str(tmp_path / f"scan{suffix}")])
    nifti = channel.as_nifti()
    assert np.array_equal(channel.numbers, numbers) and nifti.get_data_dtype() == np.int16
    assert np.allclose(nifti.affine, np.array([[-0.9, 0, 0, -3], [0, -1, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1]]))
