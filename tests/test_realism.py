"""Realism: sets that are alike lie on their floor, others above it; energies and intensities of known ratio."""

import numpy as np
import pytest

from latdiff3d.features import FeatureSets
from latdiff3d.frechet_distance import beside_its_floor
from latdiff3d.kernel_distance import standardised
from latdiff3d.realism import (
    HISTOGRAM,
    SLICES,
    SPECTRUM,
    distances,
    figures_of,
    measure,
    profile,
    render,
    sentence,
)

MODALITIES = ["t1", "t2"]


def features(seed, *shape, shift=0.0):
    return np.random.default_rng(seed).normal(size=(*shape, 4)) + shift


def sets(shift=0.0, num_training=60):
    return FeatureSets(features(0, 30), features(1, 2, 30, shift=shift), features(2, num_training), slice(2, 4))


def volumes(seed, count, scale=0.05, brighter=0.0):
    noise = np.random.default_rng(seed).normal(size=(count, 2, 12, 14, 12))
    return [(0.4 + brighter + scale * one).clip(0, 1) for one in noise]


def profiles(*given, **more):
    return [profile(volume) for volume in volumes(*given, **more)]


def measured(scale=0.05, brighter=0.0):
    real, made = profiles(0, 10), [profiles(1, 10, scale=scale, brighter=brighter)]
    return figures_of({}, real, made, profiles(2, 8), MODALITIES)


def test_volumes_of_one_distribution_lie_within_the_floor_of_real_ones():
    for name, figures in distances(sets()).items():
        if name in ("mmd", "gaussian_mmd"):
            low, high = figures["floor_interval"]
            assert low <= figures["value"] <= high and figures["n"] == figures["floor_n"] == 30


def test_volumes_of_another_lie_above_it():
    figures = distances(sets(shift=1.5))
    for name in ("mmd", "gaussian_mmd"):
        assert figures[name]["interval"][0] > figures[name]["floor_interval"][1]
    frechet = figures["frechet"]
    assert frechet["n"] == 45 and frechet["distance_interval"][0] > frechet["floor_interval"][1]


def test_without_training_volumes_the_floor_is_of_halves():
    figures = distances(sets(num_training=0))
    assert figures["mmd"]["floor_n"] == 15 and figures["mmd"]["floor"] is not None
    assert figures["frechet"]["n"] == 15


def test_too_few_volumes_have_no_floor():
    few = FeatureSets(features(0, 2), features(1, 1, 2), np.zeros((0, 0)), slice(0, 4))
    figures = distances(few)
    assert figures["mmd"]["floor"] is None and figures["mmd"]["floor_interval"] == [None, None]
    assert "covariance has full rank from 5 volumes on" in figures["frechet"]["refused"]


def test_a_feature_that_never_varies_decides_nothing():
    reference = np.column_stack([np.arange(4.0), np.ones(4)])
    assert np.isfinite(standardised(reference)(reference)).all()
    assert np.isfinite(standardised(np.ones((4, 2)))(np.ones((4, 2)))).all()


def test_half_the_noise_has_a_quarter_of_the_energy():
    figures = measured(scale=0.025)
    spectrum = figures["spectrum"]
    assert spectrum["ratio"] == pytest.approx(0.25, rel=0.05)
    assert spectrum["interval"][1] < spectrum["floor_interval"][0] and spectrum["floor"] == pytest.approx(1, rel=0.05)
    assert list(spectrum["modalities"]) == MODALITIES


def test_brighter_volumes_are_as_far_as_they_are_brighter():
    figures = measured(brighter=0.25)
    for of in figures["histogram"].values():
        assert of["distance"] == pytest.approx(0.25, abs=0.01) and of["floor"] < 0.02


def test_the_page_and_the_card_name_n_the_floor_and_a_refusal():
    examples = [("real", volumes(0, 1)[0]), ("synthetic", volumes(1, 1)[0])]
    given = {"segmenter": sets(), "published": sets()}
    figures, pictures = measure(given, profiles(0, 4), [profiles(1, 4)], [], MODALITIES, examples)
    assert set(pictures) == {SPECTRUM, HISTOGRAM, SLICES}
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    figures["networks"]["published"]["frechet"] = beside_its_floor(features(0, 8), features(1, 4))
    page = render(figures, pictures)
    assert "real against real" in page and "30 / 30" in page and page.count("<img") == 3
    assert "refused" in page and "4, needs 5" in page and "the covariance has full rank from 5 volumes on" in page
    assert "n = 30" in sentence(figures)
