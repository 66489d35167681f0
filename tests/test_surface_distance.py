"""Surface distances: 0 for a perfect mask, the shift in mm for a shifted one, nothing where nothing is seen."""

import numpy as np
import pytest
import torch

from latdiff3d.surface_distance import surface_distances

SPACING = np.array([2.0, 1.0, 1.0])


def box(first, last, label=1, shape=(12, 8, 8)):
    mask = torch.zeros(1, *shape)
    mask[:, first:last, 2:6, 2:6] = label
    return mask


OWN = torch.ones(1, 12, 8, 8)


def test_a_perfect_mask_is_at_0():
    assert all(values.tolist() == [0] for values in surface_distances(box(2, 6), box(2, 6), OWN, 2, SPACING))


def test_a_slab_moved_by_two_voxels_of_2_mm_is_up_to_4_mm_off():
    hd95, assd = surface_distances(box(4, 8), box(2, 6), OWN, 2, SPACING)
    assert hd95[0] == pytest.approx(4) and 0 < assd[0] < 4
    back = surface_distances(box(2, 6), box(4, 8), OWN, 2, SPACING)
    assert assd[0] == pytest.approx(back.assd[0])  # symmetric


def test_a_label_that_is_not_there_or_not_seen_has_none_and_padding_is_not_seen():
    found = surface_distances(box(2, 6), box(2, 6), OWN, 3, SPACING)
    assert found.hd95[0] == 0 and np.isnan(found.hd95[1]) and np.isnan(found.assd[1])
    assert np.isnan(surface_distances(box(0, 0), box(2, 6), OWN, 2, SPACING).hd95[0])
    own = OWN.clone()
    own[:, 6:] = 0
    assert surface_distances(box(2, 8), box(2, 6), own, 2, SPACING).hd95[0] == 0
