"""Diversity: one volume again and again is 1, unlike ones are below, volumes that are too small say nothing."""

import numpy as np
import pytest

from latdiff3d.diversity import likeness, measure, render, sentence

SHAPE = (1, 24, 26, 24)
OWN = np.ones(SHAPE)


def volume(*key):
    return np.random.default_rng(key).random(SHAPE).astype(np.float32)


def measured(made, num_samples=2, own=OWN):
    return measure(lambda case: volume(case), made, lambda case: own, 3, num_samples)


def test_a_model_that_makes_one_volume_is_1_and_one_of_noise_is_as_real_noise():
    figures, _ = measured(lambda sample, case: volume(9))
    assert figures["of_a_mask"]["ms_ssim"] == figures["across_masks"]["ms_ssim"] == 1
    assert figures["real"]["ms_ssim"] < 0.5
    figures, _ = measured(lambda sample, case: volume(sample, case, 7))
    assert figures["of_a_mask"]["ms_ssim"] < 0.5
    assert figures["across_masks"]["ms_ssim"] == pytest.approx(figures["real"]["ms_ssim"], abs=0.1)


def test_only_what_is_both_volumes_own_is_compared():
    one, other = volume(0), volume(1)
    padded = OWN.copy()
    padded[:, 23:] = 0
    other[:, :23] = one[:, :23]
    assert likeness(one, other, OWN) < 1
    assert likeness(one, other, padded) == pytest.approx(1)


def test_a_single_sample_and_small_volumes_have_no_figure_and_are_told():
    figures, pictures = measured(lambda sample, case: volume(sample, case, 7), num_samples=1)
    assert figures["of_a_mask"] == {"ms_ssim": None, "interval": [None, None]}
    assert figures["across_masks"]["ms_ssim"] is not None and "between samples for one mask" not in sentence(figures)
    small = np.zeros(SHAPE)
    small[:, :21] = 1
    figures, pictures = measured(lambda sample, case: volume(sample, case, 7), own=small)
    assert figures["real"]["ms_ssim"] is None and "too small" in sentence(figures)
    assert "–" in render(figures, pictures)
    assert np.isnan(likeness(volume(0), volume(1), np.zeros(SHAPE)))
