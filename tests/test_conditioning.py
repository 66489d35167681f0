"""The mask on the latent grid."""

import pytest
import torch
from einops import rearrange

from latdiff3d.conditioning import (
    MaskCondition,
    NoCondition,
    PackedCondition,
    ScalarCondition,
    condition_for,
    num_condition_channels,
)
from latdiff3d.errors import InputError


def random_mask():
    return torch.randint(0, 4, (2, 1, 8, 12, 16), generator=torch.Generator().manual_seed(0)).float()


def test_fractions_sum_to_1_and_count_the_labels():
    mask = random_mask()
    fractions = MaskCondition(num_classes=4, factor=4)(mask)
    assert fractions.shape == (2, 4, 2, 3, 4)
    assert fractions.min() >= 0
    assert torch.allclose(fractions.sum(1), torch.ones(2, 2, 3, 4))
    for label in range(4):
        assert fractions[0, label, 1, 2, 3].item() == (mask[0, 0, 4:8, 8:12, 12:16] == label).float().mean().item()


def test_a_lesion_of_one_voxel_is_a_64th_of_its_cell():
    mask = torch.zeros(1, 1, 8, 8, 8)
    mask[0, 0, 5, 2, 7] = 3
    fractions = MaskCondition(num_classes=4, factor=4)(mask)
    assert fractions[0, 3].nonzero().tolist() == [[1, 0, 1]]
    assert fractions[0, 3, 1, 0, 1].item() == 1 / 64
    assert fractions[0, 0, 1, 0, 1].item() == 63 / 64


def test_no_class_is_invented_between_two_labels():
    mask = torch.zeros(1, 1, 4, 4, 4)
    mask[:, :, :2] = 2  # half 0, half 2: a linear resampling would say 1
    assert MaskCondition(num_classes=3, factor=4)(mask)[0, :, 0, 0, 0].tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("label", [4, -1])
def test_an_unknown_label_is_refused(label):
    mask = random_mask()
    mask[0, 0, 0, 0, 0] = label
    with pytest.raises(InputError, match=rf"labels \[.*{label}.*\]; expected 0 to 3"):
        MaskCondition(num_classes=4, factor=4)(mask)


def test_none_adds_nothing():
    assert NoCondition()(random_mask()) is None
    assert isinstance(condition_for("none", 4, 4), NoCondition)
    assert num_condition_channels("none", 4) == 0


def test_concat_adds_a_channel_a_class():
    condition = condition_for("concat", 4, 2)
    assert condition(random_mask()).shape[1] == num_condition_channels("concat", 4) == 4


def test_scalar_is_one_channel_of_label_over_the_last():
    condition = condition_for("scalar", 4, 2)
    assert isinstance(condition, ScalarCondition) and num_condition_channels("scalar", 4) == 1
    mask = torch.zeros(1, 1, 4, 4, 4)
    mask[0, 0, :2, :2, :2], mask[0, 0, 2:, 2:, 2] = 3, 1
    numbers = condition(mask)
    assert numbers.shape == (1, 1, 2, 2, 2)
    assert numbers[0, 0, 0, 0, 0] == 1 and numbers[0, 0, 0, 1, 1] == 0
    assert numbers[0, 0, 1, 1, 1].item() == pytest.approx(1 / 6)


def test_scalar_refuses_unknown_labels_too():
    with pytest.raises(InputError, match="expected 0 to 2 after mapping"):
        ScalarCondition(3, 2)(torch.full((1, 1, 4, 4, 4), 3.0))


def test_packing_loses_nothing():
    mask = random_mask()
    packed = condition_for("encoder", 4, 4)(mask)
    assert packed.shape == (2, num_condition_channels("encoder", 4, 4), 2, 3, 4) == (2, 4 * 64, 2, 3, 4)
    one_hot = rearrange(packed, "b (k i j l) d h w -> b k (d i) (h j) (w l)", i=4, j=4, l=4)
    assert torch.equal(one_hot.argmax(1, keepdim=True), mask.long())


def test_a_packed_windows_condition_is_the_window_of_the_condition():
    mask, condition = random_mask(), PackedCondition(4, 4)
    assert torch.equal(condition(mask[..., 4:12]), condition(mask)[..., 1:3])


def test_no_mask_packs_to_the_null():
    packed = PackedCondition(4, 4)(torch.zeros(1, 1, 4, 4, 4))
    assert packed.sum(1).item() == 64 > PackedCondition.null_value * 256


def test_packing_refuses_unknown_labels_too():
    with pytest.raises(InputError, match="expected 0 to 2 after mapping"):
        PackedCondition(3, 2)(torch.full((1, 1, 4, 4, 4), 3.0))


def test_another_conditioning_is_refused():
    with pytest.raises(InputError, match="conditioning is 'concatt'; expected 'concat', 'scalar', 'encoder' or 'none'"):
        condition_for("concatt", 4, 4)
