"""The membrane: what it continues exactly, where its border is, and what it never exceeds."""

import numpy as np
import pytest

from latdiff3d import membrane as module
from latdiff3d.membrane import membrane


def ball(shape=(12, 10, 11), radius=4):
    """Free voxels in the middle."""
    distance = np.linalg.norm(np.indices(shape) - (np.array(shape) // 2).reshape(3, 1, 1, 1), axis=0)
    return distance < radius


def ramp(shape, slopes, spacing_mm=(1, 1, 1)):
    return np.einsum("i,idhw->dhw", np.multiply(slopes, spacing_mm), np.indices(shape).astype(float))


def test_a_constant_border_is_continued_exactly():
    free = ball()
    values = np.stack([np.full(free.shape, 1234.5), np.full(free.shape, -3e-4)])
    values[:, free] = np.nan  # what is there does not count
    solved = membrane(values, free, ~free)
    assert (solved[0] == 1234.5).all() and np.allclose(solved[1], -3e-4, rtol=1e-12)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.9, 1.0, 5.0)])
def test_a_linear_border_is_continued_as_the_same_ramp(spacing_mm):
    free = ball()
    values = ramp(free.shape, (2, -1, 0.5), spacing_mm) + 100
    given = np.where(free, 0, values)[None]
    assert np.allclose(membrane(given, free, ~free, spacing_mm)[0], values, atol=1e-4)


def test_it_is_harmonic_and_within_its_borders_range():
    free = ball()
    values = np.random.default_rng(0).normal(size=(1, *free.shape))
    solved = membrane(values, free, ~free)[0]
    neighbours = sum(np.roll(solved, step, axis) for axis in range(3) for step in (-1, 1)) / 6
    assert np.allclose(solved[free], neighbours[free], atol=1e-6)
    assert (solved[~free] == values[0][~free]).all()
    assert values[0][~free].min() < solved[free].min() and solved[free].max() < values[0][~free].max()


def test_the_middle_of_a_slab_between_two_levels_is_their_mean():
    free = np.zeros((9, 4, 4), bool)
    free[1:8] = True
    values = np.zeros((1, 9, 4, 4))
    values[0, 8] = 8
    assert np.allclose(membrane(values, free, ~free)[0], np.arange(9).reshape(9, 1, 1), atol=1e-6)  # level at the sides


def test_along_an_axis_of_long_voxels_less_is_carried():
    free = np.zeros((3, 3, 3), bool)
    free[1, 1, 1] = True
    values = np.zeros((1, 3, 3, 3))
    values[0, 1, 1, 0] = 1
    assert membrane(values, free, ~free)[0, 1, 1, 1] == pytest.approx(1 / 6)
    assert membrane(values, free, ~free, (1, 1, 2))[0, 1, 1, 1] == pytest.approx(0.25 / 4.5)


def test_voxels_that_are_not_known_are_no_border():
    free = ball()
    values = np.where(np.indices(free.shape)[0] < free.shape[0] // 2, 5.0, -1000.0)[None]
    solved = membrane(values, free, ~free & (values[0] > 0))
    assert np.allclose(solved[0][free], 5)


def test_without_any_border_it_is_0():
    free = np.ones((3, 3, 3), bool)
    assert (membrane(np.ones((2, 3, 3, 3)), free, ~free) == 0).all()


def test_one_that_is_not_solved_is_no_result(monkeypatch):
    monkeypatch.setattr(module, "cg", lambda matrix, wanted, start, **_: (start, 7))
    free = ball()
    with pytest.raises(RuntimeError, match="channel 0 is not solved after 7 steps"):
        membrane(ramp(free.shape, (1, 2, 3))[None], free, ~free)
