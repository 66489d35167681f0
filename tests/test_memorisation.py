"""The memorisation audit: copies are found, independent draws are flagged no more often than it says."""

import numpy as np
import pytest
from scipy import ndimage

from latdiff3d.copy_search import LEVEL, Search, closeness, own_p_values, p_values, spaces_for, threshold
from latdiff3d.errors import InputError
from latdiff3d.memorisation import ANY, MIN_HELD_OUT, audit, measure, render, sentence
from latdiff3d.nearest import NamedVolume
from latdiff3d.planted_copies import NUM_CASES, planted

SHAPE = (16, 16, 14)
SPACES = spaces_for(SHAPE, None, None, longest=8)  # cells of two voxels


def drawn(num, seed, shape=SHAPE):
    """Independent volumes: one anatomy in all, and in each of them its own, in [0, 1], one slice of padding."""
    common = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 3)
    own_voxels = np.ones((1, *shape), np.float32)
    own_voxels[:, -1] = 0
    volumes = []
    for number in range(num):
        own = ndimage.gaussian_filter(np.random.default_rng([seed, number]).normal(size=shape), 1.5)
        image = 0.5 + 0.15 * (common / common.std() + own / own.std())
        volumes.append(NamedVolume(f"{seed}_{number}", image.clip(0, 1).astype(np.float32)[None], own_voxels))
    return volumes


TRAINING, HELD_OUT = drawn(16, seed=1), drawn(20, seed=2)


def noisy(image, seed, scale):
    noise = scale * np.random.default_rng(seed).normal(size=image.shape)
    return NamedVolume(f"noisy_{seed}", (image + noise).clip(0, 1).astype(np.float32), TRAINING[0].own)


@pytest.fixture(scope="module")
def independent():
    """Return the audit of samples that are drawn like the held-out volumes."""
    return audit(drawn(20, seed=3), HELD_OUT, TRAINING, SPACES)


def test_all_planted_copies_are_found(independent):
    figures, _ = independent
    assert set(figures["planted"]) == {"with noise", "shifted", "flipped", "in other intensities", "all together"}
    for found in figures["planted"].values():
        assert found == {"num": NUM_CASES, "image": NUM_CASES, ANY: NUM_CASES}


def test_independent_draws_are_flagged_about_as_often_as_held_out_volumes(independent):
    figures, _ = independent
    assert figures[ANY]["held_out_share"] == pytest.approx(1 / 20)  # the closest one, in one space
    assert figures[ANY]["share"] <= figures[ANY]["held_out_share"] + 0.05
    low, high = figures[ANY]["interval"]
    assert low <= figures[ANY]["share"] <= high
    assert "and 1 of 20 real held-out ones (5%); of 25 planted copies, 25 were found" in sentence(figures)


def test_a_model_that_gives_out_its_training_volumes_is_flagged():
    copies = [noisy(TRAINING[k % 5].image, k, 0.05) for k in range(10)]
    figures, pairs = audit(copies, HELD_OUT, TRAINING, SPACES)
    assert figures[ANY]["flagged"] == 10 and figures[ANY]["interval"][1] == 1
    assert {pair.training for pair in pairs} <= {volume.name for volume in TRAINING[:5]}
    assert all(pair.p_value == pytest.approx(1 / 21) for pair in pairs)
    assert [pair.closeness for pair in pairs] == sorted(pair.closeness for pair in pairs)


def test_a_blurred_mean_is_near_to_all_and_so_to_none():
    mean = np.mean([volume.image for volume in TRAINING], axis=0)
    nearer = [noisy(mean, k, 0.02) for k in range(10)]
    search = Search(TRAINING, SPACES, [()])
    nearest_of = [search(volumes, "")["image"].apart.min(axis=1) for volumes in (nearer, HELD_OUT)]
    assert nearest_of[0].max() < nearest_of[1].min()  # a distance alone would flag every one
    assert audit(nearer, HELD_OUT, TRAINING, SPACES)[0][ANY]["flagged"] == 0


def test_the_closest_pair_lies_on_one_another_after_its_flip_and_shift():
    image, own = (np.roll(np.flip(volume, 1), 2, axis=2) for volume in TRAINING[7][1:])
    samples = drawn(3, seed=6)
    samples[1] = NamedVolume("copy", image.copy(), own.copy())
    _, pairs = audit(samples, HELD_OUT, TRAINING, SPACES)
    assert (pairs[0].sample, pairs[0].training) == ("copy", TRAINING[7].name)
    inside = (slice(None), slice(3, -3), slice(3, -3), slice(3, -3))
    assert np.allclose(pairs[0].image[inside], pairs[0].nearest[inside])


def test_the_section_shows_rates_copies_and_pairs(independent):
    figures, pictures = measure(drawn(7, seed=3), HELD_OUT, TRAINING, SPACES)
    shown = render(figures, pictures)
    assert len(pictures) == 6 and shown.count("<img ") == 6
    assert "<td>1 / 20</td>" in shown and "mirrored (left-right)" in shown and "in other intensities" in shown
    assert 'class="off"' not in shown  # nothing is flagged beyond chance, no copy is missed


def test_closeness_is_0_for_a_copy_and_1_for_what_is_as_far_from_all():
    apart = np.array([[0.0, 2, 4, 6], [3, 3, 3, 3], [4, 1, 3, 100]])
    assert closeness(apart, num_neighbours=2).tolist() == pytest.approx([0, 1, 1 / 3.5])
    assert closeness(apart).tolist() == pytest.approx([0, 1, 3 / 107])


def test_p_values_are_shares_of_the_null_with_the_volume_itself_counted():
    null = np.array([0.3, 0.5, 0.5, 0.9])
    assert p_values(np.array([0.1, 0.3, 0.5, 2]), null).tolist() == pytest.approx([1 / 5, 2 / 5, 4 / 5, 1])
    assert own_p_values(null).tolist() == pytest.approx([1 / 4, 3 / 4, 3 / 4, 1])


def test_a_volume_that_is_drawn_like_the_null_is_flagged_at_most_as_often_as_the_level_says():
    draw = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        null, scores = draw.normal(size=37), draw.normal(size=50)
        rates.append((p_values(scores, null) <= LEVEL).mean())
        assert ((p_values(scores, null) <= LEVEL) == (scores < threshold(null))).all()
    standard_error = np.std(rates) / len(rates) ** 0.5
    assert np.mean(rates) == pytest.approx(1 / 38, abs=4 * standard_error)  # the most that 37 allow below 0.05


def test_the_fewest_held_out_volumes_can_flag_with_one_left_out():
    null = np.arange(float(MIN_HELD_OUT))
    assert (own_p_values(null) <= LEVEL).sum() == 1
    assert (own_p_values(null[:-1]) <= LEVEL).sum() == 0


def test_planted_copies_are_of_several_cases_and_the_same_each_time():
    once, again = planted(TRAINING, (0,)), planted(TRAINING, (0,))
    assert [copy.name for copy in once["with noise"]] == [TRAINING[k].name for k in (0, 4, 8, 11, 15)]
    for kind in once:
        assert all(np.array_equal(a.image, b.image) for a, b in zip(once[kind], again[kind], strict=True))


@pytest.mark.parametrize(
    ("samples", "held_out", "training", "words"),
    [
        (drawn(0, 3), HELD_OUT, TRAINING, "there are no samples to look at"),
        (drawn(2, 3), drawn(19, 2), TRAINING, "there are 19 held-out volumes; expected 20 at least"),
        (drawn(2, 3), HELD_OUT, drawn(0, 1), "there are 0 training volumes at hand; expected all that the model"),
        (drawn(2, 3, (16, 16, 16)), HELD_OUT, TRAINING, r"\(1, 16, 16, 14\), \(1, 16, 16, 16\)\]; expected one grid"),
    ],
)
def test_sets_that_tell_nothing_are_refused(samples, held_out, training, words):
    with pytest.raises(InputError, match=words):
        audit(samples, held_out, training, SPACES)
