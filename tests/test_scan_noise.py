"""How noisy a scan is: known strengths, whatever lies beneath; and noise that is the same in the world."""

import nibabel as nib
import numpy as np
import pytest

from latdiff3d.scan_noise import noise_level, unit_noise

SHAPE = (20, 18, 16)
EVERYWHERE = np.ones(SHAPE, bool)


def structure():
    """Ramps, a slow wave and an edge, far stronger than the noise."""
    x, y, z = np.indices(SHAPE)
    return 3.0 * x - 2 * y + 40 * np.sin(z / 6) + 200 * (x > 9)


@pytest.mark.parametrize("sigma", [0.5, 8])
def test_white_noise_is_told_whatever_lies_beneath(sigma):
    noise = np.random.default_rng(0).normal(0, sigma, SHAPE)
    assert noise_level(structure() + noise, EVERYWHERE) == pytest.approx(sigma, rel=0.1)


def test_what_is_smooth_has_none():
    assert noise_level(structure(), EVERYWHERE) < 0.01


def test_only_the_given_voxels_count():
    noise = np.random.default_rng(0).normal(0, 5, SHAPE)
    noise[:10] *= 100
    right = np.indices(SHAPE)[0] >= 10
    assert noise_level(noise, right) == pytest.approx(5, rel=0.1)
    assert noise_level(noise, np.indices(SHAPE).sum(0) < 2) == 0  # too few to tell


@pytest.mark.parametrize("axes", ["LPS", "PIL", "SRA"])
def test_noise_is_the_same_in_the_world(axes):
    def ras(shape, affine):
        noise = unit_noise(2, shape, affine, 3)
        image = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(noise, 0, -1), affine))
        return image.get_fdata()

    turn = nib.orientations.axcodes2ornt(axes)
    affine = nib.orientations.inv_ornt_aff(nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), turn), SHAPE)
    shape = nib.orientations.apply_orientation(
        np.empty(SHAPE), nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), turn)
    ).shape
    assert np.array_equal(ras(shape, affine), ras(SHAPE, np.eye(4)))
