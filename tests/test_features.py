"""Features: which slices and voxels a network sees, which of its features are the deepest, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.features import pooled_slices, pooled_volumes, pretrained_network, segmenter_network
from latdiff3d.perceptual import encoder_stages
from latdiff3d.segmentation import load_judge

CPU = torch.device("cpu")


def as_is(x, image):
    return x


def test_slices_of_all_three_planes_count_alike_whatever_their_number():
    image = torch.zeros(2, 1, 9, 5, 1)
    image[0, 0] = torch.arange(9.0).view(9, 1, 1)
    image[1] = 7
    seen = pooled_slices(nn.Identity(), as_is, image)
    # Slices 0, 4 and 8 of the first plane have the means 0, 4 and 8, those of the others all 4.
    assert seen.shape == (2, 1) and seen[:, 0].tolist() == [4, 7]
    image[0, 0, 8] += 3 * 12
    assert pooled_slices(nn.Identity(), as_is, image)[0, 0].item() == pytest.approx(4 + (12 + 4 + 4) / 3)


def test_a_network_of_volumes_sees_each_modality_alone():
    image = torch.stack([torch.full((1, 4, 4, 4), 0.25), torch.full((1, 4, 4, 4), 0.5)])
    assert pooled_volumes(nn.Identity(), as_is, image).tolist() == [[0.25], [0.5]]


def test_the_deepest_features_of_a_segmenter_are_its_last_stages_means(judge):
    segmenter = load_judge(judge, [])
    network = segmenter_network(segmenter, judge, CPU)
    volume, own = np.random.default_rng(0).random((4, 16, 16, 16), np.float32), np.ones((1, 16, 16, 16))
    row = network.row(volume, own)
    x = torch.as_tensor(volume)[None]
    for stage in encoder_stages(segmenter):
        x = stage(x)
    assert row.shape == (2 * (4 + 8),)
    assert np.allclose(row[network.deepest], x[0].mean((1, 2, 3)).numpy(), atol=1e-5)


def test_another_network_than_a_u_net_and_weights_that_are_none_are_refused(judge, tmp_path):
    with pytest.raises(InputError, match="is a Conv3d; expected a UNet, whose encoder lends features"):
        segmenter_network(nn.Conv3d(1, 1, 1), judge, CPU)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="does not fit medicalnet_resnet10"):
        pretrained_network(f"medicalnet_resnet10={tmp_path / 'cut.pth'}", CPU)
    for given in ("weights.pth", "vgg=weights.pth"):
        with pytest.raises(InputError, match="expected architecture=file, of medicalnet_resnet10"):
            pretrained_network(given, CPU)
