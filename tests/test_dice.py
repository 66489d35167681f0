"""Dice of known overlaps, by label, on a volume's own voxels."""

import math

import pytest
import torch
from torch.nn import functional as F

from latdiff3d.dice import MeanDice, dice_by_label, label_dice
from latdiff3d.errors import InputError

CLASSES = 3


def masks():
    """Two volumes of 8³ with both labels."""
    mask = torch.zeros(2, 1, 8, 8, 8)
    mask[:, :, 1:6, 2:6, 2:6] = 1
    mask[:, :, 2:4, 3:5, 3:5] = 2
    return mask


def test_a_perfect_mask_has_dice_1_and_an_empty_one_0():
    mask = masks()
    valid = torch.ones_like(mask)
    assert label_dice(mask, mask, valid, CLASSES).tolist() == [[1, 1], [1, 1]]
    assert label_dice(torch.zeros_like(mask), mask, valid, CLASSES).tolist() == [[0, 0], [0, 0]]


def test_dice_is_twice_the_overlap_over_both():
    mask, prediction = torch.zeros(1, 1, 2, 2, 4), torch.zeros(1, 1, 2, 2, 4)
    mask[..., :2] = 1  # 8 voxels
    prediction[..., 1:] = 1  # 12 voxels, 4 of them right
    [[one, two]] = label_dice(prediction, mask, torch.ones_like(mask), CLASSES).tolist()
    assert one == pytest.approx(2 * 4 / (8 + 12))
    assert math.isnan(two)  # the truth lacks it


def test_what_is_predicted_on_padding_does_not_count():
    mask = masks()
    prediction = mask.roll(1, dims=2)
    alone = label_dice(prediction, mask, torch.ones_like(mask), CLASSES)
    longer = {name: F.pad(t, (0, 0, 0, 4)) for name, t in {"mask": mask, "valid": torch.ones_like(mask)}.items()}
    again = label_dice(F.pad(prediction, (0, 0, 0, 4), value=1.0), longer["mask"], longer["valid"], CLASSES)
    assert torch.equal(alone, again) and (alone < 1).all()


def compute(metric, *rows):
    metric.reset()
    for row in rows:
        metric.update(torch.tensor(row))
    return metric.compute()


def test_a_volume_without_the_label_is_left_out_of_its_mean():
    rows = [[1.0, math.nan]], [[0.5, 0.2]], [[math.nan, math.nan], [0.6, 0.4]]
    assert compute(MeanDice(2, 0), *rows) == pytest.approx((1.0 + 0.5 + 0.6) / 3)
    assert compute(MeanDice(2, 1), *rows) == pytest.approx((0.2 + 0.4) / 2)
    assert compute(MeanDice(2), *rows) == pytest.approx((0.7 + 0.3) / 2)


def test_a_label_that_no_volume_has_is_no_number_and_does_not_spoil_the_mean():
    rows = [[0.8, math.nan]], [[0.6, math.nan]]
    assert math.isnan(compute(MeanDice(2, 1), *rows))
    assert compute(MeanDice(2), *rows) == pytest.approx(0.7)


def test_validation_without_any_label_is_told():
    with pytest.raises(InputError, match="no validation mask has a label but the background"):
        compute(MeanDice(2), [[math.nan, math.nan]])


def test_each_validation_begins_anew():
    metric = MeanDice(1)
    assert compute(metric, [[0.2]]) == pytest.approx(0.2)
    assert compute(metric, [[0.6]]) == pytest.approx(0.6)


def test_a_label_is_called_as_in_the_files():
    fine = dice_by_label([0, 1, 2, 4], "fine")
    assert [(name, metric.index, metric.num_labels) for name, metric in fine.items()] == [
        ("dice_1", 0, 3),
        ("dice_2", 1, 3),
        ("dice_4", 2, 3),
    ]
    [(name, metric)] = dice_by_label([0, 1, 2, 4], "coarse").items()
    assert (name, metric.index, metric.num_labels) == ("dice_foreground", 0, 1)


def test_the_background_alone_is_nothing_to_segment():
    with pytest.raises(InputError, match="labels has the background only"):
        MeanDice(0)
