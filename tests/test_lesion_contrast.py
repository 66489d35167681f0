"""Lesion contrast on volumes whose answers are known beforehand."""

import numpy as np
import pytest

from latdiff3d.lesion_contrast import contrast_sign_agreement, lesion_contrast

GRID = (16, 16, 16)
BRAIN = np.ones(GRID, bool)


def _cube(corner: tuple[int, int, int], size: int = 3) -> np.ndarray:
    lesion = np.zeros(GRID, bool)
    lesion[tuple(slice(start, start + size) for start in corner)] = True
    return lesion


def _background() -> np.ndarray:
    """Two channels whose every neighbourhood has about mean 0.5 and std 0.1."""
    board = np.indices(GRID).sum(0) % 2
    return np.stack([0.4 + 0.2 * board] * 2)  # (2, D, H, W)


def _planted(lesion: np.ndarray, *values: float) -> np.ndarray:
    image = _background()
    for channel, value in zip(image, values, strict=True):
        channel[lesion] = value
    return image


def test_a_planted_contrast_is_measured():
    lesion = _cube((6, 6, 6))
    contrast = lesion_contrast(_planted(lesion, 0.8, 0.3), lesion, BRAIN)
    assert contrast == pytest.approx([3.0, -2.0], abs=0.1)


def test_the_surround_is_the_ring_inside_the_brain():
    lesion = np.zeros(GRID, bool)
    lesion[8, 8, 8] = True
    image = np.full((1, *GRID), 1000.0)  # everything that must not be looked at
    ring = (8, 8, slice(9, 12))
    image[0][ring] = [1.0, 2.0, 3.0]
    image[0, 8, 8, 8] = 5.0
    brain = np.zeros(GRID, bool)
    brain[8, 8, 8:] = True  # the ring ends three voxels from the lesion, though the brain goes on
    assert lesion_contrast(image, lesion, brain) == pytest.approx([3 / np.std([1, 2, 3])])


def test_a_lesion_at_the_border_is_measured():
    lesion = _cube((0, 0, 13))
    assert lesion_contrast(_planted(lesion, 0.8, 0.3), lesion, BRAIN) == pytest.approx([3.0, -2.0], abs=0.1)


@pytest.mark.parametrize(("lesion", "brain"), [(np.zeros(GRID, bool), BRAIN), (_cube((6, 6, 6)), np.zeros(GRID, bool))])
def test_contrast_of_nothing_is_nan(lesion, brain):
    assert np.isnan(lesion_contrast(_background(), lesion, brain)).all()


def test_contrast_refuses_another_grid():
    with pytest.raises(ValueError, match="one grid"):
        lesion_contrast(_background(), _cube((6, 6, 6))[:-1], BRAIN)


LESIONS = [_cube((1, 1, 1)), _cube((1, 12, 12)), _cube((12, 1, 12))]  # apart by more than a ring


def test_a_faithful_sample_agrees_and_misses_the_shuffled_lesions():
    real = [_planted(lesion, 0.8, 0.3) for lesion in LESIONS]
    result = contrast_sign_agreement(real, real, LESIONS, [BRAIN] * 3, [BRAIN] * 3)
    assert result.agreement == 1.0 and result.per_channel == (1.0, 1.0)
    assert result.num_pairs == 6 and result.num_shuffled_pairs == 12
    assert result.num_undefined == result.num_shuffled_undefined == 0
    assert result.shuffled < 1.0


def test_a_sample_with_its_lesion_elsewhere_is_found_out():
    """Each sample carries the next case's lesion: wrong at its own, right at one of two others."""
    real = [_planted(lesion, 0.8, 0.8) for lesion in LESIONS]
    elsewhere = []
    for i in range(3):
        sample = _planted(LESIONS[i] | LESIONS[(i + 2) % 3], 0.3, 0.3)
        sample[:, LESIONS[(i + 1) % 3]] = 0.8
        elsewhere.append(sample)
    result = contrast_sign_agreement(real, elsewhere, LESIONS, [BRAIN] * 3, [BRAIN] * 3)
    assert result.agreement == 0.0
    assert result.shuffled == 0.5


def test_shuffled_asks_for_the_sign_of_the_lesions_own_case():
    real = [_planted(LESIONS[0], 0.8, 0.8), _planted(LESIONS[1], 0.3, 0.3)]
    both = _planted(LESIONS[0], 0.8, 0.8)
    both[:, LESIONS[1]] = 0.3  # right at either place, whichever mask it was made from
    result = contrast_sign_agreement(real, [both, both], LESIONS[:2], [BRAIN] * 2, [BRAIN] * 2)
    assert result.agreement == result.shuffled == 1.0


def test_unclear_real_contrast_is_not_asked():
    real = [_planted(lesion, 0.8, 0.55) for lesion in LESIONS]  # contrasts near 3 and 0.5
    result = contrast_sign_agreement(real, real, LESIONS, [BRAIN] * 3, [BRAIN] * 3)
    assert result.num_pairs == 3 and result.num_shuffled_pairs == 6
    assert result.per_channel[0] == 1.0 and np.isnan(result.per_channel[1])


def test_undefined_contrasts_are_left_out_and_counted():
    real = [_planted(lesion, 0.8, 0.3) for lesion in LESIONS[:2]]
    no_brain = np.zeros(GRID, bool)  # a sample that came out empty
    result = contrast_sign_agreement(real, real, LESIONS[:2], [BRAIN] * 2, [BRAIN, no_brain])
    assert (result.num_pairs, result.num_undefined) == (2, 2)
    assert (result.num_shuffled_pairs, result.num_shuffled_undefined) == (2, 2)
    assert result.agreement == 1.0


def test_a_single_case_has_no_floor():
    real = [_planted(LESIONS[0], 0.8, 0.3)]
    result = contrast_sign_agreement(real, real, LESIONS[:1], [BRAIN], [BRAIN])
    assert result.agreement == 1.0 and np.isnan(result.shuffled) and result.num_shuffled_pairs == 0


def test_agreement_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="same cases"):
        contrast_sign_agreement([_background()] * 2, [_background()], LESIONS[:2], [BRAIN] * 2, [BRAIN] * 2)
