"""One mask written in many frames: what is made for it lies in one place in the world, before and after resampling."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from scipy import ndimage
from scipy.spatial.transform import Rotation

from latdiff3d import config
from latdiff3d.sample_folders import sample_to_folder
from latdiff3d.synthesis import Model
from latdiff3d.volumes import mask_on_model_grid, read_mask, write_synthetic

ALIGNED = ["RAS", "LPS", "PIL", "SAR", "ALI"]
FRAMES = [*ALIGNED, "oblique"]
GRIDS = {"isotropic": ((1.5, 1.5, 1.5), (32, 36, 28)), "slices": ((0.75, 0.75, 5.5), (60, 64, 12))}  # mm, voxels; RAS
LANDMARK_MM = np.array([-7.25, 21.5, 33.0])  # the lesion's middle, a voxel of label 2 in every frame
RADIUS_MM = 11.0
RESAMPLED_MM = [2.0, 2.0, 2.0]


def preprocessing(**settings):
    """The bundle's own transforms."""
    parser = ConfigParser(config.merged([config.DEFAULT_BUNDLE / "configs" / config.COMMON]))
    for key, value in settings.items():
        parser[key] = value
    return Compose(parser.get_parsed_content("preprocessing"))


def scene(axes, spacing_mm, shape):
    """A ball of label 1 around the landmark, of label 2, as an image in a frame."""
    turn = Rotation.from_euler("xyz", [12, -20, 33], degrees=True).as_matrix() if axes == "oblique" else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing_mm)
    landmark = np.array(shape) // 2 + (3, -2, 1)
    affine[:3, 3] = LANDMARK_MM - affine[:3, :3] @ landmark
    places = nib.affines.apply_affine(affine, np.stack(np.indices(shape), axis=-1))  # (D, H, W, 3)
    labels = (np.linalg.norm(places - LANDMARK_MM, axis=-1) < RADIUS_MM).astype(np.uint8)
    labels[tuple(landmark)] = 2
    image = nib.Nifti1Image(labels, affine)
    if axes == "oblique":
        return image
    return image.as_reoriented(nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", axes))))


@pytest.fixture(params=GRIDS)
def written(request, tmp_path):
    """The mask's file in each frame."""
    files = {}
    for axes in FRAMES:
        files[axes] = tmp_path / f"{axes}_seg.nii.gz"
        image = scene(axes, *GRIDS[request.param])
        assert axes == "oblique" or "".join(nib.aff2axcodes(image.affine)) == axes
        nib.save(image, files[axes])
    return files


def made_for(path, out, transforms, crop_to, volume_of):
    """Write what stands for a model's volume as a model's is written; return it as it is read, and the model's grid."""
    grid = mask_on_model_grid(path, transforms, crop_to)
    volume = torch.from_numpy(volume_of(grid.mask[0].numpy()).astype(np.float32))[None]
    [file] = write_synthetic(out, path.name, grid.to_mask_grid(volume), read_mask(path)[1], ["t1"], {})
    return nib.load(file), grid


def world_of(weights, affine):
    """World coordinates of the centre of mass."""
    return nib.affines.apply_affine(np.asarray(affine, dtype=float), ndimage.center_of_mass(np.asarray(weights)))


def test_a_landmark_is_one_place_to_a_hundredth_of_a_mm_in_every_frame(written, tmp_path):
    for axes, path in written.items():
        image, grid = made_for(path, tmp_path / "out", preprocessing(), (32, 32, 16), lambda labels: labels == 2)
        for there in (world_of(grid.mask[0] == 2, grid.mask.affine), world_of(image.get_fdata(), image.affine)):
            assert np.linalg.norm(there - LANDMARK_MM) < 0.01, axes
        assert image.shape == nib.load(path).shape and np.allclose(image.affine, nib.load(path).affine, atol=1e-4)


def test_a_resampled_lesion_is_within_half_a_voxel_of_its_place_in_every_frame(written, tmp_path):
    places = {}
    transforms = preprocessing(spacing=RESAMPLED_MM)

    def blurred(labels):
        return ndimage.gaussian_filter(1.0 * (labels > 0), 1)

    for axes, path in written.items():
        image, grid = made_for(path, tmp_path / "out", transforms, (48, 48, 48), blurred)
        mask = nib.load(path)
        own = world_of(mask.get_fdata() > 0, mask.affine)  # as the mask's voxels cut the ball
        on_grid = world_of(grid.mask[0] > 0, grid.mask.affine)
        half_mm = np.array(RESAMPLED_MM) / 2
        assert (np.abs(np.linalg.inv(np.asarray(grid.mask.affine)[:3, :3]) @ (on_grid - own)) < 0.5).all(), axes
        places[axes] = world_of(image.get_fdata(), image.affine)
        voxels_off = np.linalg.inv(image.affine[:3, :3]) @ (places[axes] - own)
        assert (np.abs(voxels_off) < 0.5).all(), axes
        assert np.linalg.norm(places[axes] - places["RAS"]) < np.linalg.norm(half_mm), axes


def test_a_resampled_volume_is_one_field_in_the_world(written, tmp_path):
    # A linear field, which trilinear interpolation reproduces, wherever the ball is.
    transforms = preprocessing(spacing=RESAMPLED_MM)
    slope = np.array([0.01, -0.02, 0.015])
    for axes, path in written.items():
        grid = mask_on_model_grid(path, transforms, (48, 48, 48))
        places = nib.affines.apply_affine(np.asarray(grid.mask.affine), np.stack(np.indices((48,) * 3), axis=-1))
        field = torch.from_numpy(((places - LANDMARK_MM) @ slope).astype(np.float32))[None]
        labels, affine = read_mask(path)
        [file] = write_synthetic(tmp_path / "out", path.name, grid.to_mask_grid(field), affine, ["t1"], {})
        image = nib.load(file)
        ball = np.argwhere(labels > 0)
        expected = (nib.affines.apply_affine(image.affine, ball) - LANDMARK_MM) @ slope
        # 0.01 mm along the steepest direction
        assert np.abs(image.get_fdata()[tuple(ball.T)] - expected).max() < 0.01 * np.linalg.norm(slope), axes


@pytest.mark.parametrize(("spacing_mm", "shape"), [((3, 3, 3), (20, 12, 24)), ((0.75, 0.75, 5.5), (18, 30, 10))])
def test_a_model_makes_one_volume_whatever_the_masks_frame(tiny_runs, tmp_path, spacing_mm, shape):
    paths = []
    for axes in ALIGNED:
        paths.append(tmp_path / f"{axes}.nii.gz")
        nib.save(scene(axes, spacing_mm, shape), paths[-1])
    made = list(sample_to_folder(Model.load(tiny_runs.diffusion), paths, tmp_path / "out", seed=5))
    assert [name for name, _, _ in made] == ALIGNED
    for number in range(4):  # of the modalities
        canonical = [nib.as_closest_canonical(nib.load(files[number])) for _, _, files in made]
        assert canonical[0].get_fdata().any()
        for image in canonical[1:]:
            assert np.array_equal(image.get_fdata(), canonical[0].get_fdata())
            assert np.allclose(image.affine, canonical[0].affine, atol=1e-4)
