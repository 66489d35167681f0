"""Measures of a reconstruction whose answers are known beforehand."""

import numpy as np
import pytest
from scipy import ndimage

from latdiff3d.fidelity import errors_by_label, ms_ssim, num_scales, own_voxels, psnr, ssim

GRID = (16, 16, 16)
BRAIN = np.ones(GRID, bool)
CUBE = np.zeros(GRID, bool)
CUBE[1:4, 1:4, 1:4] = True


@pytest.fixture
def texture():
    """Two channels in [0, 1] with detail at several scales."""
    noise = np.random.default_rng(0).standard_normal((2, 24, 25, 26))
    smooth = sum(ndimage.gaussian_filter(noise, (0, s, s, s)) * s**1.5 for s in (0.6, 2, 4))
    return ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


def test_own_voxels_are_the_box_that_padding_left():
    valid = np.zeros((1, 8, 9, 10), np.float32)
    valid[0, 2:5, 0:9, 4:] = 1
    assert own_voxels(valid) == (slice(None), slice(2, 5), slice(0, 9), slice(4, 10))
    assert np.zeros((3, 8, 9, 10))[own_voxels(valid)].shape == (3, 3, 9, 6)


def test_own_voxels_that_fill_no_box_are_refused():
    valid = np.zeros((1, 4, 4, 4))
    with pytest.raises(ValueError, match="No valid voxel"):
        own_voxels(valid)
    valid[0, 0, 0, 0] = valid[0, 3, 3, 3] = 1
    with pytest.raises(ValueError, match="no box"):
        own_voxels(valid)


def test_psnr_of_a_known_error():
    image = np.full((2, *GRID), 0.5, np.float32)
    assert psnr(image, image + 0.1, BRAIN) == pytest.approx(20.0, abs=1e-4)
    assert psnr(image, image, BRAIN) == np.inf


def test_psnr_looks_at_valid_voxels_alone():
    image = np.zeros((1, *GRID))
    wrong = image + np.where(CUBE, 0.01, 0.9)
    assert psnr(image, wrong, CUBE) == pytest.approx(40.0)
    assert psnr(image, wrong, CUBE[None].astype(np.float32)) == pytest.approx(40.0)
    with pytest.raises(ValueError, match="valid"):
        psnr(image, wrong, ~BRAIN)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_similarity_of_a_volume_with_itself_is_1_and_each_channel_has_its_own(texture, measure):
    worse = texture.copy()
    worse[1] += 0.1 * np.random.default_rng(1).standard_normal(texture.shape[1:])
    first, second = measure(texture, worse)
    assert first == pytest.approx(1.0, abs=1e-5)
    assert 0 < second < 0.9


def test_ssim_of_two_constants_is_the_luminance_term():
    one, other = (np.full((1, *GRID), value) for value in (0.2, 0.6))
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # (k1 · data range)² = 1e-4
    assert ssim(one, other) == pytest.approx([expected], abs=5e-3)  # MONAI sums 1331 products in float32


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 16), (10, 10, 10)])
def test_ssim_has_a_window_for_any_volume(shape):
    image = np.random.default_rng(2).random((1, *shape))
    assert ssim(image, image) == pytest.approx([1.0], abs=1e-5)
    assert np.isfinite(ssim(image, 1 - image)).all()


@pytest.mark.parametrize("side", [22, 43, 44])
def test_ms_ssim_has_as_many_scales_as_its_smallest_side_holds(side):
    assert num_scales((side, 200, 200)) == {22: 2, 43: 2, 44: 3}[side]
    volume = np.random.default_rng(3).random((1, side, 44, 44))
    assert ms_ssim(volume, volume) == pytest.approx([1.0], abs=1e-5)


def test_scales_end_at_the_papers_five():
    assert [num_scales((side,) * 3) for side in (10, 11, 21, 98, 99, 175, 176, 500)] == [0, 1, 1, 3, 4, 4, 5, 5]


def test_ms_ssim_of_a_small_volume_is_refused_and_not_nan():
    with pytest.raises(ValueError, match="22 voxels"):
        ms_ssim(np.zeros((1, 21, 40, 40)), np.zeros((1, 21, 40, 40)))


def test_errors_are_inside_each_label():
    image = np.zeros((2, *GRID))
    mask = np.where(CUBE, 3, 0)[None]
    wrong = image.copy()
    wrong[0, CUBE], wrong[1, ~CUBE] = 0.5, -0.1
    errors = errors_by_label(image, wrong, mask)
    assert list(errors) == [0, 3]
    assert errors[3].num_voxels == 27 and errors[0].num_voxels == 16**3 - 27
    assert errors[3].absolute / 27 == pytest.approx([0.5, 0])
    assert errors[0].absolute / errors[0].num_voxels == pytest.approx([0, 0.1])
