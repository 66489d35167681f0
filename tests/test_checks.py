"""What is wrong with a case, in sentences: from its headers, then from its voxels."""

import nibabel
import numpy as np
import pytest
import torch

from latdiff3d.checks import affine_problem, grid_problem, header_problems, require_sound_headers, voxel_problems
from latdiff3d.datalist import read_cases
from latdiff3d.errors import InputError
from latdiff3d.readers import Header

RAMP = np.arange(120, dtype=np.float32).reshape(4, 5, 6)


# Headers


def test_a_sound_case_has_no_problem(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1")
    [case] = cases = read_cases(tmp_path)
    assert header_problems(case, 4) == []
    assert require_sound_headers(cases, 4) == cases


def test_a_4d_file_is_told_by_its_axis(tmp_path, write_volume):
    path = write_volume(tmp_path / "hippocampus_001.nii.gz", np.ones((4, 5, 6, 2), np.int16))
    [problem] = header_problems({"case": "x", "image": [path]}, 1)
    assert "hippocampus_001.nii.gz is 4D (4×5×6×2): axis 3 holds 2 volumes; expected one 3D volume" in problem
    assert header_problems({"case": "x", "image": [path]}, 2) == []
    [problem] = header_problems({"case": "x", "image": [path]}, 4)
    assert "axis 3 holds 2 volumes; expected 4 channels" in problem


def test_a_last_axis_of_length_one_is_no_channel_axis(tmp_path, write_volume):
    path = write_volume(tmp_path / "a.nii.gz", RAMP[..., None])
    assert header_problems({"case": "x", "image": [path], "mask": path}, 1) == []


def test_too_few_files_or_dimensions_are_told(tmp_path, write_volume):
    volume, flat = write_volume(tmp_path / "a.nii.gz"), write_volume(tmp_path / "b.nii.gz", RAMP[0])
    assert "a.nii.gz is 3D (4×5×6): one volume; expected 4" in header_problems({"case": "x", "image": [volume]}, 4)[0]
    assert "x has 2 image files; expected 4" in header_problems({"case": "x", "image": [volume, volume]}, 4)[0]
    assert "b.nii.gz is 2D (5×6); expected a 3D volume" in header_problems({"case": "x", "image": [flat]}, 1)[0]


def test_a_mask_of_another_shape_is_told(tmp_path, write_volume):
    image, mask = write_volume(tmp_path / "a.nii.gz"), write_volume(tmp_path / "a_seg.nii.gz", RAMP[:, :, :5])
    [problem] = header_problems({"case": "x", "image": [image], "mask": mask}, 1)
    assert "a_seg.nii.gz (4×5×5) and" in problem and "a.nii.gz (4×5×6) have different shapes" in problem


def test_a_shifted_mask_is_told_in_millimetres(tmp_path, write_volume):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    image = write_volume(tmp_path / "a.nii.gz", affine=affine)
    near, far = affine.copy(), affine.copy()
    near[0, 3] += 1e-3
    far[:3, 3] += (3, 4, 0)
    mask = write_volume(tmp_path / "near.nii.gz", affine=near)
    assert header_problems({"case": "x", "image": [image], "mask": mask}, 1) == []
    mask = write_volume(tmp_path / "far.nii.gz", affine=far)
    [problem] = header_problems({"case": "x", "image": [image], "mask": mask}, 1)
    assert "far.nii.gz lies off" in problem and "a corner 5 mm apart" in problem


def test_the_largest_corner_distance_sees_a_rotation_about_the_origin(tmp_path, write_volume):
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    paths = [write_volume(tmp_path / "a.nii.gz"), write_volume(tmp_path / "b.nii.gz", affine=flipped)]
    [problem] = header_problems({"case": "x", "image": paths}, 2)
    assert "a corner 6 mm apart" in problem  # the far side, x = 3, lands at −3


def test_a_singular_affine_is_told(tmp_path):
    image = nibabel.Nifti1Image(RAMP, None)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
    image.header["pixdim"][1:4] = 1
    nibabel.save(image, tmp_path / "a.nii.gz")
    [problem] = header_problems({"case": "x", "image": [str(tmp_path / "a.nii.gz")]}, 1)
    assert "a.nii.gz has a singular affine ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])" in problem


def test_micrometre_voxels_are_no_singular_affine(tmp_path, write_volume):
    path = write_volume(tmp_path / "a.nii.gz", affine=np.diag([5e-3, 5e-3, 5e-3, 1]))
    assert header_problems({"case": "x", "image": [path]}, 1) == []


@pytest.mark.parametrize("content", [b"", b"not a volume", b"\x1f\x8b\x08\x00"])
def test_a_damaged_header_is_told(tmp_path, content):
    (tmp_path / "a.nii.gz").write_bytes(content)
    [problem] = header_problems({"case": "x", "image": [str(tmp_path / "a.nii.gz")]}, 1)
    assert "a.nii.gz is truncated or damaged" in problem and "copy it again" in problem


def test_only_a_flat_affine_is_a_problem():
    oblique = np.array([[1, 1, 0, 5], [-1, 1, 0, 5], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    assert affine_problem("d/a.nii.gz", oblique) is None
    for flat in (np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan), oblique[[0, 0, 2, 3]]):
        assert "d/a.nii.gz has a singular affine" in affine_problem("d/a.nii.gz", flat)


def test_grids_are_one_within_a_hundredth_of_a_millimetre():
    near, far = np.eye(4), np.eye(4)
    near[2, 3], far[2, 3] = 0.009, 0.011
    header = Header((4, 5, 6), np.eye(4))
    assert grid_problem("b", Header((4, 5, 6, 2), near), "a", header) is None  # channels are no part of a grid
    assert "b lies off a" in grid_problem("b", Header((4, 5, 6), far), "a", header)
    assert "b (4×5×7) and a (4×5×6) have different shapes" in grid_problem("b", Header((4, 5, 7), near), "a", header)


def test_sound_headers_are_required_with_the_number_of_problems(tmp_path, write_volume):
    path = write_volume(tmp_path / "a.nii.gz", np.ones((4, 5, 6, 2), np.int16))
    cases = [{"case": str(i), "image": [path]} for i in range(3)]
    with pytest.raises(InputError, match=r"is 4D .*\(and 2 more; `latdiff3d doctor DIR` lists them all\)"):
        require_sound_headers(cases, 1)


# Voxels


def test_sound_voxels_have_no_problem():
    mask = np.zeros((1, 4, 5, 6), np.float32)
    mask[0, 0] = 4
    assert voxel_problems(RAMP[None], mask, [0, 1, 2, 4], ["a"], "m") == []
    assert voxel_problems(torch.from_numpy(RAMP)[None], torch.from_numpy(mask), [0, 4], ["a"], "m") == []


def test_nan_and_infinite_voxels_are_counted_in_their_channels_file():
    image = np.stack([RAMP, RAMP])
    image[1, 0, 0, :3] = (np.nan, np.nan, np.inf)
    [problem] = voxel_problems(image, None, [0], ["a_t1.nii.gz", "a_t2.nii.gz"], "")
    assert problem.startswith("a_t2.nii.gz has 2 NaN and 1 infinite of 120 voxels")


@pytest.mark.parametrize(("value", "said"), [(0, "a is 0 in every voxel"), (7, "a is 7 in every voxel")])
def test_a_constant_volume_is_told(value, said):
    [problem] = voxel_problems(np.full((1, 4, 5, 6), value), None, [0], ["a"], "")
    assert problem.startswith(said)


def test_unknown_labels_are_told_beside_the_known():
    mask = np.zeros((1, 4, 5, 6), np.uint8)
    mask[0, 0, 0, 0] = 7
    [problem] = voxel_problems(None, mask, [0, 1, 2, 4], [], "case_017_seg.nii.gz")
    assert problem.startswith(
        "case_017_seg.nii.gz has labels {7}; this configuration knows {0, 1, 2, 4}. Map or drop it: "
    )
    assert "Decathlon" not in problem
    assert voxel_problems(None, mask, None, [], "") == []


def test_decathlons_labels_under_a_brats_configuration_get_a_hint():
    mask = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2)
    [problem] = voxel_problems(None, mask, [0, 1, 2, 4], [], "m")
    assert "labels {3}" in problem and "Decathlon's BrainTumour {0, 1, 2, 3} with 1 and 2 swapped" in problem


def test_fractional_labels_are_no_label_map():
    mask = np.array([0, 1, 0.5, np.nan], np.float32).reshape(1, 1, 2, 2)
    [problem] = voxel_problems(None, mask, [0, 1], [], "m")
    assert problem.startswith("m has 2 voxels whose labels are no integers (0.5, nan)")


# Real volumes


def test_the_real_hippocampus_headers_are_sound(real_data):
    assert len(require_sound_headers(read_cases(real_data / "Task04_Hippocampus"), 1)) == 191


def test_the_real_odd_files_are_told(real_data):
    odd = real_data / "odd"
    for name, channels in (
        ("nibabel_example4d.nii.gz", "128×96×24×2"),
        ("nibabel_example_nifti2.nii.gz", "32×20×12×2"),
    ):
        [problem] = header_problems({"case": "x", "image": [str(odd / name)]}, 1)
        assert f"{name} is 4D ({channels}): axis 3 holds 2 volumes" in problem
    pair = {"case": "stroke", "image": [str(odd / "stroke_T2.nii.gz")], "mask": str(odd / "stroke_lesion.nii.gz")}
    assert header_problems(pair, 1) == []
