"""The Fréchet distance: closed forms for Gaussians, MONAI's figure, and where it is refused."""

import math

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score

from latdiff3d.frechet_distance import beside_its_floor, frechet_distance, smallest_number


def gaussian(seed, count, scale=1.0, shift=(0.0, 0.0, 0.0)):
    """Rows whose sample mean is `shift` and whose sample covariance is scale² times the identity, exactly."""
    rows = np.random.default_rng(seed).normal(size=(count, len(shift)))
    rows -= rows.mean(0)
    root = np.linalg.cholesky(np.linalg.inv(np.cov(rows, rowvar=False)))
    return scale * rows @ root + np.array(shift)


def test_a_set_lies_on_itself():
    rows = gaussian(0, 30, 2.0)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)


def test_a_shifted_and_scaled_gaussian_has_its_closed_form():
    # |m|² + F (s − 1)²
    distance = frechet_distance(gaussian(0, 40), gaussian(1, 25, 3.0, (2.0, 0.0, -1.0)))
    assert distance == pytest.approx(5 + 3 * (3 - 1) ** 2)


def test_covariances_that_do_not_commute_are_those_of_monai():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 4)) @ generator.normal(size=(4, 4)), generator.normal(size=(60, 4)) + 0.5
    expected = get_fid_score(torch.as_tensor(x), torch.as_tensor(y)).item()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_a_singular_covariance_needs_no_constant():
    x, y = np.zeros((5, 3)), np.zeros((7, 3))
    x[:, 0], y[:, 0] = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7) + 3
    expected = 3**2 + (x[:, 0].std(ddof=1) - y[:, 0].std(ddof=1)) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected)


def test_below_the_rank_of_the_covariance_it_is_refused_and_says_why():
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(40, 9)), generator.normal(size=(9, 9))
    figures = beside_its_floor(real, made)
    assert smallest_number(9) == 10 and figures["n"] == 9 and figures["n_min"] == 10
    assert figures["distance"] is figures["floor"] is None and "full rank from 10 volumes on" in figures["refused"]
    assert beside_its_floor(real, generator.normal(size=(10, 9)))["refused"] is None


def test_what_is_real_lies_on_the_floor_and_what_is_shifted_above_it_by_the_shift():
    generator = np.random.default_rng(0)
    real, alike = generator.normal(size=(120, 3)), generator.normal(size=(60, 3))
    figures = beside_its_floor(real, alike)
    low, high = figures["floor_interval"]
    assert figures["n"] == 60 and low < figures["distance"] < high and figures["floor"] > 0
    shifted = beside_its_floor(real, alike + np.array([2.0, 0, 0]))
    assert shifted["distance_interval"][0] > high
    shift = shifted["distance"] - figures["distance"]
    assert math.isclose(shift, 4, rel_tol=0.25)
    assert beside_its_floor(real, alike) == figures  # one seed


@pytest.mark.parametrize(("real", "made"), [((5, 2), (5, 3)), ((5, 2), (1, 2))])
def test_sets_that_cannot_be_compared_are_refused(real, made):
    with pytest.raises(ValueError, match=r"Features of|real and 1 synthetic"):
        frechet_distance(np.zeros(real), np.zeros(made))
