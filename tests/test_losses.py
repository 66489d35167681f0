"""Loss terms at known answers."""

import math

import pytest
import torch
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.losses import (
    ADAPTIVE_MAX,
    AutoencoderLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    masked_l1,
    masked_l2,
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
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_the_generators_loss_is_minus_its_score():
    assert generator_loss(torch.tensor([1.0, 4.0])).item() == -2.5


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


# What the terms weigh


def reconstruction_terms(loss, count=2, size=4):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((count, 1, size, size, size), generator=generator)
    other = image + 0.1
    return loss.reconstruction_terms(other, image, torch.ones_like(image), other)


def test_the_sum_is_that_of_the_weighted_terms_and_both_are_logged():
    loss = AutoencoderLoss(kl_weight=0.5, logvar_init=math.log(2))
    terms = reconstruction_terms(loss)
    loss.add_regularisation(terms, torch.ones(2, 2, 2, 2, 2), torch.ones(2, 2, 2, 2, 2))
    logged = {name: term.item() for name, term in terms.logged().items()}
    expected = {"l1": 0.1, "weighted_l1": 0.05, "kl": 0.5, "weighted_kl": 0.25}
    assert logged == pytest.approx(expected, rel=1e-5)
    assert terms.total().item() == pytest.approx(0.3, rel=1e-5)


def test_l2_is_the_mean_squared_error_over_own_voxels(padded):
    image, other, valid = padded
    assert masked_l2(other, image, valid).item() == pytest.approx(0.01, rel=1e-4)
    terms = AutoencoderLoss(reconstruction="l2").reconstruction_terms(other, image, valid, other)
    assert list(terms.raw) == ["l2"]


def test_the_patch_size_and_the_batch_size_leave_every_weighted_term_alone():
    loss = AutoencoderLoss(
        perceptual_weight=0.5, perceptual=nn.MSELoss(), feature_matching_weight=2.0, disc_start=1, adaptive_weight=False
    )

    def weighted(count, size):
        terms = reconstruction_terms(loss, count, size)
        loss.add_regularisation(terms, *(torch.full((count, 2, size, size, size), value) for value in (0.7, 1.3)))
        fake, real = ([torch.full((count, 3, size, size, size), value)] * 2 for value in (0.2, 0.6))
        loss.add_adversarial(terms, 1, fake, real, torch.zeros(1))
        return {name: term.item() for name, term in terms.logged().items()}

    assert weighted(1, 4) == pytest.approx(weighted(3, 8), rel=1e-5)


def test_a_quantisers_terms_have_the_codebooks_weight_and_the_commitment_its_share():
    loss = AutoencoderLoss(codebook_weight=2.0, commitment_weight=0.25)
    terms = reconstruction_terms(loss)
    loss.add_regularisation(terms, {"codebook": torch.tensor(3.0), "commitment": torch.tensor(5.0)})
    assert terms.weights["codebook"] == 2.0 and terms.weights["commitment"] == 0.5


def test_feature_matching_leaves_the_scores_out():
    loss = AutoencoderLoss(disc_weight=0.0, feature_matching_weight=3.0, disc_start=1, adaptive_weight=False)
    terms = reconstruction_terms(loss)
    fake, real = [torch.zeros(1, 2), torch.full((1, 4), 9.0)], [torch.full((1, 2), 0.5), torch.zeros(1, 4)]
    loss.add_adversarial(terms, 1, fake, real, torch.zeros(1))
    assert terms.raw["feature_matching"].item() == 0.5 and terms.weights["feature_matching"] == 3.0
    assert loss.generator_sees_discriminator(1) and loss.discriminator_trains(1)


def test_the_ramp_grows_from_the_start_to_the_full_weight():
    loss = AutoencoderLoss(disc_start=10, disc_ramp=3)
    assert [loss.ramp(iteration) for iteration in range(10, 16)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert AutoencoderLoss(disc_start=10).ramp(10) == 1.0


@pytest.mark.parametrize(("real", "fake", "expected"), [(1.0, 0.0, 0.0), (0.0, 0.0, 0.5), (3.0, -2.0, 4.0)])
def test_least_squares_at_known_scores(real, fake, expected):
    real, fake = torch.full((2, 1), real), torch.full((2, 1), fake)
    assert discriminator_loss(real, fake, "least_squares").item() == expected
    assert generator_loss(fake, "least_squares").item() == 0.5 * (fake[0, 0].item() - 1) ** 2


def test_the_adaptive_weight_counts_the_perceptual_pull_too():
    layer = torch.tensor([2.0], requires_grad=True)
    loss = AutoencoderLoss(perceptual_weight=3.0, perceptual=lambda one, other: 5 * layer.sum(), disc_start=1)
    image = torch.zeros(1, 1, 2, 2, 2)
    reconstruction = layer.expand_as(image)
    terms = loss.reconstruction_terms(reconstruction, image, torch.ones_like(image), reconstruction)
    loss.add_adversarial(terms, 1, [layer.expand(4)], None, layer)
    assert terms.notes["adaptive_weight"].item() == pytest.approx(1 + 3 * 5, rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"reconstruction": "l3"}, "reconstruction is 'l3'; expected 'l1' or 'l2'"),
        ({"adversarial": "wasserstein"}, "adversarial is 'wasserstein'; expected 'hinge' or 'least_squares'"),
        ({"perceptual_weight": 1.0}, "perceptual_weight is 1.0 and there is no perceptual network; give both"),
        ({"perceptual": nn.MSELoss()}, "perceptual_weight is 0.0 and there is a perceptual network; give both"),
        ({"perceptual_weight": "some"}, "perceptual_weight is 'some'; expected a number from 0 on, such as 0.1"),
        ({"disc_weight": -0.1}, "disc_weight is -0.1; expected a number from 0 on"),
        ({"kl_weight": math.nan}, "kl_weight is nan; expected a number from 0 on"),
        ({"spectrum_weight": True}, "spectrum_weight is True; expected a number from 0 on"),
        ({"disc_start": "soon"}, "disc_start is 'soon'; expected a whole number of updates from 0 on, such as 100"),
        ({"disc_warmup": 0.5}, "disc_warmup is 0.5; expected a whole number of updates from 0 on"),
        ({"disc_ramp": -1}, "disc_ramp is -1; expected a whole number of updates from 0 on"),
        ({"logvar_init": None}, "logvar_init is None; expected a number, such as 0"),
        ({"adaptive_weight": "yes"}, "adaptive_weight is 'yes'; expected true or false"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(setting, line):
    with pytest.raises(InputError, match=line):
        AutoencoderLoss(**setting)
