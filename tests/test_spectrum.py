"""Spectra of volumes whose answers are known beforehand."""

import numpy as np
import pytest
from scipy import ndimage

from latdiff3d.spectrum import (
    HIGH,
    NUM_SHELLS,
    high_frequency_energy,
    shell_energies,
    shell_shares,
    spectrum_ratio,
)


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((2, 24, 26, 28))


def wave(frequency, amplitude=1.0, size=40):
    """One channel of a cosine along the first axis; the frequency is in parts of Nyquist's."""
    along = amplitude * np.cos(np.pi * frequency * np.arange(size) + 0.3)
    return np.broadcast_to(along[:, None, None], (size,) * 3)[None]


def test_white_noise_has_its_variance_in_all_frequencies_alike(noise):
    energies = shell_energies(0.5 * noise + 7)
    assert energies.shape == (2, NUM_SHELLS + 1)
    assert energies.sum(1) == pytest.approx([0.25, 0.25], rel=0.05)
    wide = slice(6, NUM_SHELLS + 1)  # the inner shells hold few frequencies
    assert energies[:, wide].sum(0) / 2 == pytest.approx(0.25 * shell_shares(noise.shape[1:])[wide], rel=0.25)


def test_a_wave_lies_in_its_shell_with_its_energy():
    energies = shell_energies(wave(0.725, amplitude=0.4))[0]
    assert energies[13:16].sum() == pytest.approx(0.4**2 / 2, rel=0.02)
    assert energies[:12].sum() < 1e-3 * energies.sum()


def test_shares_are_of_all_frequencies():
    shares = shell_shares((40, 40, 40))
    assert shares.sum() == pytest.approx(1)
    assert shares[:HIGH].sum() == pytest.approx(
        4 / 3 * np.pi / 8 / 8, rel=0.05
    )  # a ball's share of its cube, at r = 1/2


def test_high_frequencies_begin_above_half_of_nyquist():
    assert high_frequency_energy(wave(0.4))[0] < 0.02 < 0.4 < high_frequency_energy(wave(0.6))[0]
    assert high_frequency_energy(np.concatenate([wave(0.4), wave(0.6)])).shape == (2,)


def test_the_ratio_is_1_below_for_blur_above_for_noise(noise):
    image = ndimage.gaussian_filter(noise, (0, 0.5, 0.5, 0.5))
    assert spectrum_ratio(image, image) == 1
    assert spectrum_ratio(image, image + 0.5) == pytest.approx(1)  # brightness is no detail
    assert spectrum_ratio(image, ndimage.gaussian_filter(image, (0, 1, 1, 1))) < 0.5
    assert spectrum_ratio(image, image + 0.3 * np.random.default_rng(1).standard_normal(image.shape)) > 1


def test_a_blur_shows_although_opposite_faces_differ(noise):
    ramp = np.linspace(0, 50, 24)[None, :, None, None]
    image = ramp + noise
    assert spectrum_ratio(image, ramp + ndimage.gaussian_filter(noise, (0, 1, 1, 1))) < 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 5, 16)])
def test_the_smallest_volumes_have_a_spectrum(shape):
    energies = shell_energies(np.random.default_rng(2).random(shape))
    assert energies.shape == (1, NUM_SHELLS + 1) and np.isfinite(energies).all()


def test_a_flat_image_has_no_ratio():
    assert np.isnan(spectrum_ratio(np.ones((1, 8, 8, 8)), np.ones((1, 8, 8, 8))))
