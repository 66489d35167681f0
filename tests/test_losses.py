"""Loss terms at known answers."""

import math

import pytest
import torch

from latdiff3d.errors import InputError
from latdiff3d.losses import (
    ADAPTIVE_MAX,
    AutoencoderLoss,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    masked_l1,
    masked_psnr,
)


@pytest.fixture
def padded():
    """Image, an image that is off by 0.1 on its own voxels and by a lot on padding, and which voxels are its own."""
    image = torch.full((2, 3, 4, 4, 4), 0.5)
    valid = torch.zeros(2, 1, 4, 4, 4)
    valid[0, :, :2] = 1
    valid[1] = 1
    return image, torch.where(valid > 0, image + 0.1, image + 0.4), valid


# Reconstruction


def test_l1_ignores_padding(padded):
    image, other, valid = padded
    assert masked_l1(other, image, valid).item() == pytest.approx(0.1, abs=1e-6)


def test_l1_is_a_mean_over_voxels_and_channels():
    valid = torch.ones(1, 1, 2, 2, 2)
    image, other = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2)
    other[0, 1] = 1
    assert masked_l1(other, image, valid).item() == 0.5


def test_padding_has_no_gradient(padded):
    image, other, valid = padded
    other.requires_grad_(True)
    masked_l1(other, image, valid).backward()
    assert not other.grad[(valid == 0).expand_as(other)].any()
    assert (other.grad[(valid > 0).expand_as(other)] != 0).all()


def test_psnr_of_a_known_error_is_one_number_a_volume(padded):
    image, other, valid = padded
    assert masked_psnr(other, image, valid).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_psnr_clips_the_reconstruction():
    valid = torch.ones(1, 1, 2, 2, 2)
    image = torch.full((1, 1, 2, 2, 2), 0.9)
    assert masked_psnr(torch.full_like(image, 7.0), image, valid).item() == pytest.approx(20.0, abs=1e-4)


# KL


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_of_a_standard_normal_is_0(reduction):
    mean, std = torch.zeros(2, 4, 2, 2, 2), torch.ones(2, 4, 2, 2, 2)
    assert AutoencoderLoss(kl_reduction=reduction).kl(mean, std).item() == 0


def test_kl_has_its_closed_form():
    mean, std = torch.full((2, 4, 2, 2, 2), 0.7), torch.full((2, 4, 2, 2, 2), 1.3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(0.7, 1.3), normal(0.0, 1.0)).item()
    assert AutoencoderLoss(kl_reduction="mean").kl(mean, std).item() == pytest.approx(expected, rel=1e-5)
    assert AutoencoderLoss(kl_reduction="sum").kl(mean, std).item() == pytest.approx(4 * 8 * expected, rel=1e-5)


def test_the_patch_size_moves_the_sum_and_not_the_mean():
    small, large = ((torch.full(s, 0.7), torch.full(s, 1.3)) for s in ((2, 4, 2, 2, 2), (2, 4, 4, 4, 4)))
    mean, total = AutoencoderLoss(kl_reduction="mean"), AutoencoderLoss(kl_reduction="sum")
    assert mean.kl(*large).item() == pytest.approx(mean.kl(*small).item(), rel=1e-6)
    assert total.kl(*large).item() == pytest.approx(8 * total.kl(*small).item(), rel=1e-6)


def test_the_batch_size_moves_neither():
    one, four = ((torch.full(s, 0.7), torch.full(s, 1.3)) for s in ((1, 4, 2, 2, 2), (4, 4, 2, 2, 2)))
    for reduction in ("mean", "sum"):
        loss = AutoencoderLoss(kl_reduction=reduction)
        assert loss.kl(*four).item() == pytest.approx(loss.kl(*one).item(), rel=1e-6)


def test_another_reduction_is_refused():
    with pytest.raises(InputError, match="kl_reduction is 'avg'; expected 'mean' or 'sum'"):
        AutoencoderLoss(kl_reduction="avg")


# Adversarial


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [(1.0, -1.0, 0.0), (3.0, -7.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (0.5, -2.0, 0.25)],
)
def test_hinge_at_known_scores(real, fake, expected):
    real, fake = torch.full((2, 1, 2, 2, 2), real), torch.full((2, 1, 2, 2, 2), fake)
    assert hinge_discriminator(real, fake).item() == pytest.approx(expected)


def test_the_generators_loss_is_minus_its_score():
    assert hinge_generator(torch.tensor([1.0, 4.0])).item() == -2.5


def test_the_adaptive_weight_equalises_the_pulls_at_the_layer():
    layer = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    reconstruction, adversarial = 3 * (layer**2).sum(), (layer * torch.tensor([0.2, 0.1, -0.3])).sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert not weight.requires_grad
    (pull_rec,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (pull_adv,) = torch.autograd.grad(weight * adversarial, layer)
    assert pull_adv.norm().item() == pytest.approx(pull_rec.norm().item(), rel=1e-3)


def test_the_adaptive_weight_stays_finite_where_the_discriminator_says_nothing():
    layer = torch.tensor([1e3], requires_grad=True)
    assert adaptive_weight((1e3 * layer).sum(), (0 * layer).sum(), layer).item() == ADAPTIVE_MAX


# When


def test_the_discriminator_warms_up_before_it_is_heard():
    loss = AutoencoderLoss(disc_start=10, disc_warmup=3)
    trains = [iteration for iteration in range(1, 13) if loss.discriminator_trains(iteration)]
    heard = [iteration for iteration in range(1, 13) if loss.generator_sees_discriminator(iteration)]
    assert trains == [7, 8, 9, 10, 11, 12]
    assert heard == [10, 11, 12]


def test_a_discriminator_of_no_weight_neither_trains_nor_is_heard():
    loss = AutoencoderLoss(disc_weight=0, disc_start=0, disc_warmup=0)
    assert not loss.discriminator_trains(100) and not loss.generator_sees_discriminator(100)


def test_kl_of_a_collapsed_posterior_is_not_finite():
    assert math.isinf(AutoencoderLoss().kl(torch.zeros(1), torch.zeros(1)).item())
