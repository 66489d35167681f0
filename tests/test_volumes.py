"""Where a volume lies in the world."""

import json
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from scipy import ndimage
from scipy.spatial.transform import Rotation

from latdiff3d import config
from latdiff3d.errors import InputError
from latdiff3d.volumes import (
    case_name,
    centred_affine,
    mask_on_model_grid,
    median_spacing_mm,
    read_mask,
    write_synthetic,
)

SPACING_MM = (1.0, 1.5, 3.0)
SHAPE = (20, 24, 18)
BLOB = (slice(5, 8), slice(9, 13), slice(6, 8))


def affine_for(axes, spacing_mm=SPACING_MM):
    """An affine of these axis codes, or a rotated one for "oblique", off the origin."""
    if axes == "oblique":
        turn = Rotation.from_euler("xyz", [12, -20, 33], degrees=True).as_matrix()
    else:
        turn = np.zeros((3, 3))
        for column, code in enumerate(axes):
            row = ["RL", "AP", "SI"].index(next(pair for pair in ("RL", "AP", "SI") if code in pair))
            turn[row, column] = 1 if code in "RAS" else -1
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing_mm)
    affine[:3, 3] = (-31.5, 17.25, 40.0)
    return affine


def preprocessing(**settings):
    """The bundle's own transforms."""
    parser = ConfigParser(config.merged([config.DEFAULT_BUNDLE / "configs" / config.COMMON]))
    for key, value in settings.items():
        parser[key] = value
    return Compose(parser.get_parsed_content("preprocessing"))


def blob(shape=SHAPE, where=BLOB):
    """A box of label 1 with one voxel of label 2 as its landmark."""
    mask = np.zeros(shape, np.uint8)
    mask[where] = 1
    mask[tuple(part.start for part in where)] = 2
    return mask


def written(path, mask, affine):
    nib.save(nib.Nifti1Image(mask, affine), path)
    return path


def world_of(label, mask, affine):
    """World coordinates of a label's centroid."""
    return nib.affines.apply_affine(affine, np.argwhere(np.asarray(mask) == label).mean(0))


FRAMES = ["RAS", "LPS", "PIL", "SAR", "ALI", "oblique"]


@pytest.mark.parametrize("axes", FRAMES)
@pytest.mark.parametrize(
    "crop_to", [(16, 16, 16), (32, 32, 32), (16, 32, 24)], ids=["smaller", "larger", "smaller-and-larger"]
)
def test_a_mask_comes_back_to_its_own_grid_voxel_for_voxel(tmp_path, axes, crop_to):
    mask = blob()
    grid = mask_on_model_grid(written(tmp_path / "a_seg.nii.gz", mask, affine_for(axes)), preprocessing(), crop_to)
    assert grid.mask.shape == (1, *crop_to)
    back = grid.to_mask_grid(grid.mask.as_tensor().float())
    assert back.shape == (1, *SHAPE) and back.dtype == np.float32
    assert np.array_equal(back[0], mask)


@pytest.mark.parametrize("axes", FRAMES)
@pytest.mark.parametrize("crop_to", [(16, 16, 16), (32, 32, 32), (16, 32, 24)])
def test_a_landmark_keeps_its_world_coordinates(tmp_path, axes, crop_to):
    mask, affine = blob(), affine_for(axes)
    grid = mask_on_model_grid(written(tmp_path / "a_seg.nii.gz", mask, affine), preprocessing(), crop_to)
    on_grid = np.asarray(grid.mask[0])
    for label in (1, 2):
        there = world_of(label, on_grid, np.asarray(grid.mask.affine))
        assert np.allclose(there, world_of(label, mask, affine), atol=1e-4)
    if axes != "oblique":
        assert nib.aff2axcodes(np.asarray(grid.mask.affine)) == ("R", "A", "S")


@pytest.mark.parametrize("axes", FRAMES)
def test_a_volume_of_several_channels_comes_back_like_its_mask(tmp_path, axes):
    mask = blob()
    grid = mask_on_model_grid(written(tmp_path / "a_seg.nii.gz", mask, affine_for(axes)), preprocessing(), (16, 16, 16))
    volume = torch.cat([grid.mask.as_tensor().float() * k for k in (1, 2, 3, 4)])
    back = grid.to_mask_grid(volume)
    assert back.shape == (4, *SHAPE)
    for k in range(4):
        assert np.array_equal(back[k], mask * np.float32(k + 1))


def test_outside_the_crop_a_volume_is_0(tmp_path):
    path = written(tmp_path / "a_seg.nii.gz", blob(), affine_for("LPS"))
    grid = mask_on_model_grid(path, preprocessing(), (8, 16, 8))
    back = grid.to_mask_grid(torch.ones(1, 8, 16, 8))
    assert back.sum() == 8 * 16 * 8
    assert back[0][BLOB].all()


@pytest.mark.parametrize("corner", [(0, 0, 0), (17, 20, 16)])
def test_a_label_at_the_volumes_edge_is_in_the_crop(tmp_path, corner):
    where = tuple(slice(first, first + 2) for first in corner)
    mask = blob(where=where)
    grid = mask_on_model_grid(written(tmp_path / "a.nii", mask, affine_for("PIL")), preprocessing(), (16, 16, 16))
    assert (grid.mask > 0).sum() == (mask > 0).sum()
    assert np.array_equal(grid.to_mask_grid(grid.mask.as_tensor().float())[0], mask)


def test_an_empty_mask_is_cut_at_its_middle(tmp_path):
    mask, affine = np.zeros(SHAPE, np.uint8), affine_for("RAS")
    grid = mask_on_model_grid(written(tmp_path / "a.nii", mask, affine), preprocessing(), (16, 16, 16))
    middle = nib.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    crop_middle = nib.affines.apply_affine(np.asarray(grid.mask.affine), np.full(3, 7.5))
    assert np.allclose(middle, crop_middle, atol=np.array(SPACING_MM))
    assert grid.to_mask_grid(torch.ones(1, 16, 16, 16)).sum() == 16**3


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIL", "oblique"])
@pytest.mark.parametrize("crop_to", [(16, 16, 16), (48, 48, 48)])
def test_resampled_to_a_spacing_a_blob_stays_within_half_a_voxel(tmp_path, axes, crop_to):
    mask, affine = blob(), affine_for(axes)
    spacing_mm = [2.0, 2.0, 2.0]
    grid = mask_on_model_grid(
        written(tmp_path / "a_seg.nii.gz", mask, affine), preprocessing(spacing=spacing_mm), crop_to
    )
    assert np.allclose(nib.affines.voxel_sizes(np.asarray(grid.mask.affine)), spacing_mm, atol=1e-4)
    here = world_of(1, np.asarray(grid.mask[0]) > 0, np.asarray(grid.mask.affine))
    assert np.linalg.norm(here - world_of(1, mask > 0, affine)) < 0.5 * np.linalg.norm(spacing_mm)

    volume = torch.from_numpy(ndimage.gaussian_filter((np.asarray(grid.mask) > 0).astype(np.float32), 0.5))
    back = grid.to_mask_grid(volume)
    assert back.shape == (1, *SHAPE)
    centre = ndimage.center_of_mass(back[0])
    expected = ndimage.center_of_mass(mask > 0)
    assert np.abs(np.array(centre) - expected).max() < 0.5 * max(spacing_mm) / min(SPACING_MM)


@pytest.mark.parametrize("axes", FRAMES)
def test_resampled_back_a_volume_keeps_its_place_to_a_hundredth_of_a_voxel(tmp_path, axes):
    # Each channel is a world coordinate, which trilinear interpolation reproduces.
    affine = affine_for(axes)
    path = written(tmp_path / "a_seg.nii.gz", blob(), affine)
    grid = mask_on_model_grid(path, preprocessing(spacing=[2.0, 2.0, 2.0]), (48, 48, 48))
    voxels = np.stack(np.meshgrid(*(np.arange(48),) * 3, indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(np.asarray(grid.mask.affine), voxels)  # (D, H, W, 3)
    back = grid.to_mask_grid(torch.from_numpy(np.moveaxis(world, -1, 0)).float())
    there = np.argwhere(blob() > 0)
    assert np.allclose(
        back[:, BLOB[0], BLOB[1], BLOB[2]].reshape(3, -1).T, nib.affines.apply_affine(affine, there), atol=0.01
    )


def test_resampling_rotates_nothing_of_a_constant_volume(tmp_path):
    path = written(tmp_path / "a_seg.nii.gz", blob(), affine_for("oblique"))
    grid = mask_on_model_grid(path, preprocessing(spacing=[2.0, 2.0, 2.0]), (48, 48, 48))
    back = grid.to_mask_grid(torch.full((1, 48, 48, 48), 0.5))
    assert np.allclose(back[0][BLOB], 0.5, atol=1e-5)


# Files


@pytest.fixture
def made(tmp_path):
    volume = np.random.default_rng(0).random((2, 5, 6, 7))
    mask, affine = blob((5, 6, 7), (slice(1, 3),) * 3), affine_for("oblique")

    def write(folder):
        return write_synthetic(tmp_path / folder, "case_1", volume, affine, ["t1", "t2"], {"Seed": 3}, mask)

    return write, (volume, mask, affine)


def test_what_is_written_opens_and_lies_where_it_should(made, tmp_path):
    write, (volume, mask, affine) = made
    paths = write("out")
    assert [path.name for path in paths] == ["case_1_t1.nii.gz", "case_1_t2.nii.gz"]
    for path, channel in zip(paths, volume, strict=True):
        image = nib.load(path)
        assert np.array_equal(image.get_fdata(dtype=np.float32), channel.astype(np.float32))
        assert np.allclose(image.affine, affine, atol=1e-5)
        assert image.get_data_dtype() == np.float32
        assert image.header.get_xyzt_units()[0] == "mm"
    labels, there = read_mask(tmp_path / "out/case_1/case_1_seg.nii.gz")
    assert np.array_equal(labels, mask) and np.allclose(there, affine, atol=1e-5)


def test_every_header_says_synthetic(made, tmp_path):
    made[0]("out")
    for path in (tmp_path / "out/case_1").glob("*.nii.gz"):
        assert "SYNTHETIC" in bytes(nib.load(path).header["descrip"]).decode()


def test_the_sidecar_says_what_made_it(made, tmp_path):
    made[0]("out")
    sidecar = json.loads((tmp_path / "out/case_1/case_1.json").read_text())
    assert sidecar["SyntheticData"] is True
    assert sidecar["GeneratedBy"]["Name"] == "latdiff3d" and sidecar["GeneratedBy"]["Version"]
    assert sidecar["Seed"] == 3


def test_the_same_volume_is_the_same_bytes_at_another_time(made, tmp_path, monkeypatch):
    made[0]("one")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    made[0]("two")
    names = sorted(path.name for path in (tmp_path / "one/case_1").iterdir())
    assert names == [
        "case_1.json",
        "case_1_seg.nii.gz",
        "case_1_t1.nii.gz",
        "case_1_t2.nii.gz",
    ]
    for name in names:
        assert (tmp_path / "one/case_1" / name).read_bytes() == (tmp_path / "two/case_1" / name).read_bytes()


def test_too_few_names_for_the_channels_are_no_silent_loss(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_synthetic(tmp_path, "case_1", np.zeros((2, 4, 4, 4)), np.eye(4), ["t1"], {})


# Names and sizes


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a/x_seg.nii.gz", "x"),
        ("x.nii", "x"),
        ("x_seg_seg.nii", "x_seg"),
        ("x.y.nii.gz", "x.y"),
        ("x_seg.mha", "x"),
    ],
)
def test_a_case_is_named_after_its_mask(file, name):
    assert case_name(file) == name


def test_a_mask_of_another_format_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"x\.png is no volume that can be read; expected \.nii\.gz, \.nii, \.mha"):
        read_mask(tmp_path / "x.png")


def test_the_median_spacing_is_in_ras_order(tmp_path):
    cases = [
        {"image": [str(written(tmp_path / f"{axes}.nii", blob(), affine_for(axes, spacing)))]}
        for axes, spacing in (("RAS", (1, 2, 3)), ("SRA", (3, 1, 2)), ("LPS", (9, 9, 9)))
    ]
    assert median_spacing_mm(cases) == pytest.approx([1, 2, 3], abs=1e-5)


def test_a_centred_grids_middle_is_the_worlds_origin():
    affine = centred_affine((4, 5, 6), (1.0, 2.0, 3.0))
    assert np.allclose(nib.affines.apply_affine(affine, (1.5, 2.0, 2.5)), 0)
    assert nib.affines.voxel_sizes(affine).tolist() == [1, 2, 3]
