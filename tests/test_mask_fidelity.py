"""Mask fidelity: known overlaps, what chance gives, and where between it and the real volumes a model stands."""

import numpy as np
import pytest
import torch
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.mask_fidelity import (
    dice_table,
    matched_dice,
    measure,
    mismatched_dice,
    normalised_fidelity,
    render,
    segmented,
    sentence,
)


def bar(first, last, label=1, length=8):
    """A mask (1, 1, 1, W) with `label` from voxel `first` up to `last`."""
    mask = torch.zeros(1, 1, 1, length)
    mask[..., first:last] = label
    return mask


ALL = [torch.ones(1, 1, 1, 8)] * 3
MASKS = [bar(0, 4), bar(2, 6), bar(4, 8)]


def test_overlaps_with_all_masks_are_those_worked_out_by_hand():
    table = dice_table(MASKS, MASKS, ALL, 2)
    assert table.shape == (3, 3, 1)
    assert np.allclose(table[..., 0], [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])
    assert matched_dice(table) == pytest.approx(1)
    assert mismatched_dice(table) == pytest.approx(2 / 6)


def test_an_empty_prediction_overlaps_nothing_and_padding_does_not_count():
    empty = [torch.zeros(1, 1, 1, 8)] * 3
    assert matched_dice(dice_table(empty, MASKS, ALL, 2)) == 0
    half = [torch.cat([torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)], dim=-1)] * 3
    whole = [bar(0, 8)] * 3
    table = dice_table(whole, [bar(0, 4), bar(0, 2), bar(0, 8)], half, 2)
    assert np.allclose(np.diagonal(table[..., 0]), [1, 2 * 2 / 6, 1])


def test_labels_count_alike_and_a_case_without_one_is_left_out():
    masks = [bar(0, 4), bar(0, 4) + bar(4, 8, label=2), bar(0, 4)]
    wrong_in_two = [mask * (mask == 1) for mask in masks]
    table = dice_table(wrong_in_two, masks, ALL, 3)
    assert np.isnan(table[0, 0, 1]) and table[1, 1, 1] == 0
    assert matched_dice(table) == pytest.approx((1 + 0) / 2)


def test_a_model_that_follows_its_mask_as_real_volumes_do_has_1_and_one_that_ignores_it_0():
    real = dice_table(MASKS, MASKS, ALL, 2)
    assert normalised_fidelity(real, real) == pytest.approx(1)
    ignorant = dice_table([bar(2, 6)] * 3, MASKS, ALL, 2)
    assert matched_dice(ignorant) == pytest.approx(mismatched_dice(ignorant))
    assert normalised_fidelity(ignorant, real) == pytest.approx(0)


def test_a_segmenter_that_sees_nothing_judges_nothing():
    blind = dice_table([bar(0, 0)] * 3, MASKS, ALL, 2)
    assert np.isnan(normalised_fidelity(blind, blind))


def test_weights_are_as_if_a_case_were_there_so_often():
    generator = np.random.default_rng(0)
    made, real = generator.random((4, 4, 2)), generator.random((4, 4, 2))
    twice = [0, 0, 1, 3]
    weights = np.array([2.0, 1, 0, 1])
    assert matched_dice(made, weights) == pytest.approx(matched_dice(made[np.ix_(twice, twice)]))
    # A case is never another's stranger, however often it was drawn.
    pairs = [(i, j) for i in twice for j in twice if i != j]
    expected = np.mean([made[i, j] for i, j in pairs], axis=0).mean()
    assert mismatched_dice(made, weights) == pytest.approx(expected)
    assert np.isfinite(normalised_fidelity(made, real, weights))


def test_the_label_of_a_voxel_is_the_likeliest():
    network = nn.Conv3d(1, 3, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1, 1, 1))
    assert segmented(network, torch.tensor([2.0, -2.0]).view(1, 1, 1, 2)).flatten().tolist() == [1, 2]


@pytest.mark.parametrize("count", [1, 2])
def test_a_single_case_and_lists_that_differ_are_refused(count):
    with pytest.raises(InputError, match=f"{count} volumes for {4 - 3 * (count == 1)} masks; expected as many"):
        dice_table(MASKS[:count], (MASKS + MASKS)[: 4 - 3 * (count == 1)], ALL[:count], 2)


# The section


BOXES = [(0, 4), (2, 6), (4, 8)]


def cube(first, last):
    """A mask (1, 8, 6, 6) with label 1 in a slab."""
    mask = torch.zeros(1, 8, 6, 6)
    mask[:, first:last] = 1
    return mask


def section(made):
    masks, own = [cube(*ends) for ends in BOXES], [torch.ones(1, 8, 6, 6)] * 3
    return measure([made], masks, masks, own, [np.ones(3)] * 3, ["0", "edema"], b"\x89PNG")


def test_perfect_masks_have_fidelity_1_and_no_surface_distance():
    figures, pictures = section([cube(*ends) for ends in BOXES])
    assert figures["dice_made"]["value"] == figures["dice_real"]["value"] == figures["normalised"]["value"] == 1
    of = figures["labels"]["edema"]["made"]
    assert of["hd95"]["value"] == of["assd"]["value"] == 0 and of["num_unseen"] == 0
    assert "1.000" in render(figures, pictures) and "fidelity of 1.000" in sentence(figures)


def test_empty_masks_have_dice_0_and_are_counted_as_unseen():
    figures, pictures = section([cube(0, 0)] * 3)
    assert figures["dice_made"]["value"] == 0
    of = figures["labels"]["edema"]
    assert of["made"]["num_unseen"] == 3 and of["made"]["hd95"] == {"value": None, "interval": [None, None]}
    assert of["real"]["num_unseen"] == 0 and "3 / 0" in render(figures, pictures)


def test_a_slab_off_by_one_voxel_is_1_mm_off():
    figures, _ = section([cube(first + 1, last + 1) for first, last in BOXES])
    assert 0 < figures["normalised"]["value"] < 1
    assert figures["labels"]["edema"]["made"]["hd95"]["value"] == pytest.approx(1, abs=0.4)
