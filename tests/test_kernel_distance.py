"""The squared MMD, against its closed forms for Gaussians."""

import math

import numpy as np
import pytest

from latdiff3d.bootstrap import bootstrap_interval
from latdiff3d.kernel_distance import (
    gaussian_kernel,
    median_distance,
    paired_squared_mmd,
    polynomial_kernel,
    similarities,
    squared_mmd,
)

SHIFT = 0.8


def drawn(seed, count, size, shift=0.0):
    features = np.random.default_rng(seed).normal(size=(count, size))
    features[:, 0] += shift
    return features


def estimates(kernel, size, shift, unbiased=True, repeats=60, count=80):
    """MMD² of N(0, 1) and N(shift, 1), estimated anew from other draws."""
    pairs = [(drawn(k, count, size), drawn(k + 1000, count, size, shift)) for k in range(repeats)]
    return np.array([squared_mmd(similarities(x, y, kernel), unbiased) for x, y in pairs])


def agrees(values, truth):
    """Whether the mean of independent estimates is within four of its standard errors."""
    return abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize(("size", "bandwidth"), [(1, 1.0), (3, 1.5)])
def test_the_gaussian_kernel_gives_the_closed_form_of_shifted_gaussians(size, bandwidth):
    # E k(x, y) for x − y ~ N(shift, 2): (s² / (s² + 2))^(F/2) exp(−shift² / (2 (s² + 2)))
    variance = bandwidth**2
    peak = (variance / (variance + 2)) ** (size / 2)
    truth = 2 * peak * (1 - math.exp(-(SHIFT**2) / (2 * (variance + 2))))
    assert truth > 0.01
    assert agrees(estimates(gaussian_kernel(bandwidth), size, SHIFT), truth)


def test_the_polynomial_kernel_gives_the_differences_of_three_moments():
    # (1 + xy)³ = 1 + 3 xy + 3 x²y² + x³y³; moments 0, 1, 0 against m, 1 + m², m³ + 3 m
    truth = 3 * SHIFT**2 + 3 * SHIFT**4 + (SHIFT**3 + 3 * SHIFT) ** 2
    assert agrees(estimates(polynomial_kernel, 1, SHIFT), truth)


@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(1.0)], ids=["polynomial", "gaussian"])
def test_equal_distributions_are_at_0_without_bias_and_above_it_with(kernel):
    assert agrees(estimates(kernel, 2, 0.0), 0.0)
    assert not agrees(estimates(kernel, 2, 0.0, unbiased=False), 0.0)
    assert estimates(kernel, 2, 0.0, unbiased=False).min() > 0


def test_a_set_lies_on_itself():
    features = drawn(0, 20, 4)
    between = similarities(features, features, polynomial_kernel)
    assert squared_mmd(between, unbiased=False) == pytest.approx(0, abs=1e-9)
    assert squared_mmd(between) < 0


def test_the_unbiased_estimate_is_the_mean_over_pairs():
    x, y = drawn(0, 3, 2), drawn(1, 4, 2)

    def k(a, b):
        return (a @ b / 2 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(3) for j in range(3) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    expected = within_x + within_y - 2 * across
    assert squared_mmd(similarities(x, y, polynomial_kernel)) == pytest.approx(expected)


def test_pairs_are_compared_with_others_alone():
    # Each y is nearly its x: with their own similarity among the others', equal distributions look nearer than equal.
    pairs = [(x, x + 0.1 * drawn(k + 1000, 40, 2)) for k, x in ((k, drawn(k, 40, 2)) for k in range(60))]
    found = [similarities(x, y, gaussian_kernel(1.0)) for x, y in pairs]
    truth = 1 / 3 + 1 / 3.02 - 2 / 3.01  # variances 1 and 1.01, two features
    assert agrees(np.array([paired_squared_mmd(between) for between in found]), truth)
    assert not agrees(np.array([squared_mmd(between) for between in found]), truth)


def test_a_weight_says_how_often_a_pair_counts_and_never_with_its_copy():
    x, y, kernel = drawn(0, 4, 2), drawn(1, 4, 2), gaussian_kernel(1.0)
    between, weights = similarities(x, y, kernel), np.array([2.0, 0, 1, 1])
    h = between.real + between.synthetic - between.cross - between.cross.T
    by_hand = sum(weights[i] * weights[j] * h[i, j] for i in range(4) for j in range(4) if i != j) / 10
    assert paired_squared_mmd(between, weights) == pytest.approx(by_hand)
    present = similarities(x[[0, 2, 3]], y[[0, 2, 3]], kernel)
    assert paired_squared_mmd(between, np.array([1.0, 0, 1, 1])) == pytest.approx(paired_squared_mmd(present))
    assert math.isnan(paired_squared_mmd(between, np.array([4.0, 0, 0, 0])))


def test_drawing_pairs_anew_adds_no_bias():
    between = similarities(drawn(0, 10, 2), drawn(1, 10, 2), gaussian_kernel(1.0))
    draws = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), size=4000).astype(float)
    resampled = np.mean([paired_squared_mmd(between, draw) for draw in draws])
    assert resampled == pytest.approx(paired_squared_mmd(between), abs=0.005)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    kernel, variance = gaussian_kernel(1.0), 1.0
    truth = 2 * (1 / 3) ** 0.5 * (1 - math.exp(-(1.5**2) / (2 * (variance + 2))))
    held = 0
    for k in range(60):
        between = similarities(drawn(k, 40, 1), drawn(k + 500, 40, 1, shift=1.5), kernel)
        low, high = bootstrap_interval(lambda w, b=between: paired_squared_mmd(b, w), 40, num_draws=200, seed=k)
        held += low <= truth <= high
    assert 0.8 <= held / 60 <= 1


def test_the_interval_of_a_mean_is_the_known_one():
    values = drawn(0, 100, 1)[:, 0]
    low, high = bootstrap_interval(lambda w: float(w @ values / w.sum()), 100)
    error = values.std() / 10
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert bootstrap_interval(lambda w: float(w @ values / w.sum()), 100) == (low, high)


def test_the_median_distance_is_that_of_pairs():
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2)
    assert median_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5)


@pytest.mark.parametrize(
    ("real", "synthetic", "words"),
    [((5, 2), (5, 3), r"Features of \(5, 2\) and \(5, 3\)"), ((5, 2), (1, 2), "5 real and 1 synthetic volumes")],
)
def test_sets_that_cannot_be_compared_are_refused(real, synthetic, words):
    with pytest.raises(ValueError, match=words):
        similarities(np.zeros(real), np.zeros(synthetic), polynomial_kernel)


def test_pairs_need_sets_of_one_size():
    between = similarities(np.zeros((5, 2)), np.zeros((4, 2)), polynomial_kernel)
    with pytest.raises(ValueError, match=r"\(5, 4\) similarities: pairs need two sets of one size"):
        paired_squared_mmd(between)
