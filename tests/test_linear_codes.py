"""Linear codes on volumes whose answers are known beforehand."""

import numpy as np
import pytest

from latdiff3d.fidelity import psnr
from latdiff3d.linear_codes import BlockPCA, average_pooling

GRID = (16, 16, 16)
BRAIN = np.ones(GRID, bool)


@pytest.fixture
def subspace_volumes():
    """Two-channel volumes whose 4^3 blocks lie in an affine space of three dimensions."""
    rng = np.random.default_rng(0)
    mean, basis = rng.random((2, 4, 4, 4)), rng.random((3, 2, 4, 4, 4))

    def volume(*blocks: int) -> np.ndarray:
        weights = rng.random((3, *blocks))
        field = sum(np.einsum("dhw,cpqr->cdphqwr", w, b) for w, b in zip(weights, basis, strict=True))
        tiled = field + np.broadcast_to(mean[:, None, :, None, :, None, :], field.shape)
        return tiled.reshape(2, *(4 * n for n in blocks))

    return [volume(3, 2, 4), volume(2, 3, 3), volume(4, 2, 2)]


def test_block_pca_is_exact_in_its_subspace_and_not_below(subspace_volumes):
    train, held_out = subspace_volumes[:2], subspace_volumes[2]
    exact = BlockPCA().fit(train, num_components=3).reconstruct(held_out)
    assert exact.shape == held_out.shape and exact.dtype == np.float32
    assert np.allclose(exact, held_out, atol=1e-5)
    assert not np.allclose(BlockPCA().fit(train, num_components=2).reconstruct(held_out), held_out, atol=1e-2)


def test_block_pca_keeps_the_shape_of_any_volume():
    volume = np.random.default_rng(1).random((1, 5, 7, 9))
    pca = BlockPCA().fit([volume, volume[:, :4, :4]], num_components=8, block=2)
    assert np.allclose(pca.reconstruct(volume), volume, atol=1e-5)  # 8 components hold a block of 8 values
    assert pca.components.shape == (8, 8)


def test_block_pca_beats_pooling_at_one_number_a_block():
    ramp = np.indices(GRID).sum(0)[None] / 45.0
    pca = BlockPCA().fit([ramp, ramp**2], num_components=1)
    assert psnr(ramp, pca.reconstruct(ramp), BRAIN) > psnr(ramp, average_pooling(ramp), BRAIN)


def test_block_pca_refuses_no_volumes_and_too_many_components():
    with pytest.raises(ValueError, match="no volumes"):
        BlockPCA().fit([], num_components=1)
    with pytest.raises(ValueError, match="65 components"):
        BlockPCA().fit([np.zeros((1, *GRID))], num_components=65)


def test_average_pooling_repeats_block_means():
    volume = np.arange(6, dtype=float).reshape(1, 6, 1, 1)
    assert average_pooling(volume, factor=4).ravel() == pytest.approx([1.5] * 4 + [4.5] * 2)
    constant = np.full((2, 5, 6, 7), 0.3)
    assert np.allclose(average_pooling(constant), constant)
