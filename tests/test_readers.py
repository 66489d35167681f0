"""Files → arrays: one volume whatever the format, and one line where there is none."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import truncate
from monai.data import list_data_collate

from latdiff3d.errors import InputError
from latdiff3d.readers import (
    CHANNEL_FILES,
    channel_labels,
    file_label,
    read_header,
    read_volume,
    shape_problem,
    size_text,
)

RAMP = np.arange(120, dtype=np.float32).reshape(4, 5, 6)


# Headers


def test_a_missing_file_and_an_unknown_suffix_are_told(tmp_path):
    with pytest.raises(InputError, match=r"a.nii.gz does not exist"):
        read_header(str(tmp_path / "a.nii.gz"))
    with pytest.raises(InputError, match=r"is no volume that can be read; expected .nii.gz, .nii.*DICOM"):
        read_header(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a volume", b"\x1f\x8b\x08\x00"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_damaged_header_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is truncated or damaged: .+\. Download or copy it again") as error:
        read_header(str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_header_is_read_without_its_voxels(tmp_path, write_volume):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    path = write_volume(tmp_path / "a.nii", np.ones((4, 5, 6, 2), np.int16), affine)
    truncate(path, 0.75)
    header = read_header(path)
    assert header.shape == (4, 5, 6, 2) and np.array_equal(header.affine, affine)
    with pytest.raises(InputError, match="truncated"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize(("dtype", "integers"), [(np.uint8, True), (np.int16, True), (np.float32, False)])
def test_a_header_says_whether_voxels_are_whole_numbers(tmp_path, suffix, dtype, integers):
    path = str(tmp_path / f"a{suffix}")
    sitk.WriteImage(sitk.GetImageFromArray(RAMP.astype(dtype)), path)
    assert read_header(path).stores_integers is integers


def test_whole_numbers_with_a_slope_are_none(tmp_path):
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_header(str(tmp_path / "a.nii")).stores_integers is False


# Voxels


def test_a_4d_file_is_read_with_its_channels_first(tmp_path, write_volume):
    voxels = np.arange(240, dtype=np.int16).reshape(4, 5, 6, 2)
    volume = read_volume(write_volume(tmp_path / "a.nii.gz", voxels))
    assert volume.shape == (2, 4, 5, 6) and volume.dtype == torch.float32
    assert np.array_equal(volume.numpy(), voxels.transpose(3, 0, 1, 2))
    assert volume.meta[CHANNEL_FILES][1].endswith("a.nii.gz (channel 1)")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_truncated_voxels_are_told(tmp_path, suffix):
    path = str(tmp_path / f"a{suffix}")
    noise = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(noise), path)
    truncate(path)
    with pytest.raises(InputError, match=r"is truncated or damaged: .+\. Download or copy it again"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_itk_formats_lie_where_their_nifti_does(tmp_path, suffix):
    image = sitk.GetImageFromArray(RAMP)  # x has 6 voxels, z 4
    image.SetSpacing((0.5, 2, 3))
    image.SetOrigin((10, -20, 30))
    image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    nifti, other = str(tmp_path / "a.nii.gz"), str(tmp_path / f"a{suffix}")
    sitk.WriteImage(image, nifti)
    sitk.WriteImage(image, other)
    assert read_header(other).shape == read_header(nifti).shape == (6, 5, 4)
    assert np.allclose(read_header(other).affine, read_header(nifti).affine, atol=1e-5)
    assert torch.equal(read_volume(other).as_tensor(), read_volume(nifti).as_tensor())
    assert torch.allclose(read_volume(other).affine, read_volume(nifti).affine, atol=1e-5)


def test_what_a_format_says_of_itself_does_not_keep_it_from_collating(tmp_path):
    volumes = []
    for suffix in (".nii.gz", ".mha"):
        sitk.WriteImage(sitk.GetImageFromArray(RAMP), str(tmp_path / f"a{suffix}"))
        volumes.append(read_volume(str(tmp_path / f"a{suffix}")))
    assert set(volumes[0].meta) == set(volumes[1].meta)
    assert list_data_collate([{"image": volume} for volume in volumes])["image"].shape == (2, 1, 6, 5, 4)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6, 2, 2)])
def test_a_volume_has_three_or_four_axes(tmp_path, write_volume, shape):
    with pytest.raises(InputError, match=rf"a.nii.gz is {len(shape)}D \(.*\); expected a 3D volume, or a 4D one"):
        read_volume(write_volume(tmp_path / "a.nii.gz", np.ones(shape, np.float32)))


# Sentences


@pytest.mark.parametrize(
    ("shape", "num_channels", "said"),
    [
        ((4, 5, 6), 1, None),
        ((4, 5, 6, 1), 1, None),
        ((4, 5, 6, 2), 2, None),
        ((5, 6), 1, "d/a.nii.gz is 2D (5×6); expected a 3D volume, or a 4D one with its channels last."),
        ((4, 5, 6, 2), 1, "axis 3 holds 2 volumes; expected one 3D volume. Split it, or name 2 modalities."),
        ((4, 5, 6), 4, "one volume; expected 4 channels. List a file for each, or correct modalities."),
        ((4, 5, 6, 2), 4, "axis 3 holds 2 volumes; expected 4 channels there."),
    ],
)
def test_a_shape_that_does_not_fit_is_a_sentence(shape, num_channels, said):
    found = shape_problem("data/d/a.nii.gz", shape, num_channels)
    assert found is None if said is None else found.endswith(said)


def test_files_and_their_channels_are_named_with_their_folder():
    assert file_label("/data/images/a.nii.gz") == "images/a.nii.gz" and file_label("a.nii.gz") == "a.nii.gz"
    assert channel_labels("d/a.nii.gz", 1) == ["d/a.nii.gz"]
    assert channel_labels("d/a.nii.gz", 2) == ["d/a.nii.gz (channel 0)", "d/a.nii.gz (channel 1)"]
    assert size_text((4, 5, 6)) == "4×5×6"


# Real volumes


def test_a_real_big_endian_volume_is_read(real_data):
    volume = read_volume(str(real_data / "odd" / "nibabel_anatomical.nii"))
    assert volume.shape == (1, 33, 41, 25)
    assert (volume.min(), volume.max()) == (-610, 30393)
