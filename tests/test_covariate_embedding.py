"""What is known joins the time's embedding; what is not has an embedding of its own."""

import math

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from latdiff3d.covariate_embedding import CovariateEmbedding, with_covariates
from latdiff3d.covariates import Covariates
from latdiff3d.errors import InputError

COVARIATES = Covariates([{"name": "age", "mean": 60, "std": 15}, {"name": "sex", "classes": ["F", "M"]}])


def embedding():
    torch.manual_seed(0)
    return CovariateEmbedding(COVARIATES, 8)


def unet(**changes):
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=3, in_channels=2, out_channels=2, channels=(8, 8), num_res_blocks=1, norm_num_groups=4,
        attention_levels=(False, False), num_head_channels=4, **changes,
    )  # fmt: skip
    for parameter in network.parameters():  # MONAI starts some at 0, where the time does not matter either
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return network


def test_it_is_the_sum_of_each_covariates():
    network = embedding()
    age, sex = network.columns
    numbers = torch.tensor([[45.0, 1.0], [60.0, 0.0]])
    assert network(numbers).shape == (2, 8)
    assert torch.allclose(network(numbers), age(numbers[:, 0]) + sex(numbers[:, 1]))
    assert torch.equal(sex(numbers[:, 1]), sex.weight[[1, 0]])


def test_a_missing_value_has_its_own_embedding_and_the_rest_counts():
    network = embedding()
    nothing = network(torch.full((1, 2), math.nan))
    assert torch.allclose(nothing[0], network.missing.weight.sum(0))
    half = network(torch.tensor([[math.nan, 1.0]]))
    assert torch.allclose(half[0], network.missing.weight[0] + network.columns[1].weight[1])


def test_a_number_counts_in_standard_deviations():
    one, other = embedding().columns[0], embedding().columns[0]
    other.mean, other.std = 0.0, 1.0
    assert torch.allclose(one(torch.tensor([75.0])), other(torch.tensor([1.0])))


def test_gradients_are_finite_where_values_are_missing_and_reach_only_what_was_asked():
    network = embedding()
    network(torch.tensor([[math.nan, 1.0], [50.0, math.nan]])).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert not network.columns[1].weight.grad[0].any() and network.columns[1].weight.grad[1].any()
    assert network.missing.weight.grad.any(1).all()


def test_the_denoisers_prediction_depends_on_what_is_known():
    denoiser = with_covariates(unet(), COVARIATES)
    x, timesteps = torch.randn(1, 2, 4, 4, 4), torch.tensor([500])

    def said(age, sex):
        with torch.no_grad():
            return denoiser(x, timesteps, class_labels=torch.tensor([[age, sex]]))

    own = said(60.0, 0.0)
    others = (80.0, 0.0), (60.0, 1.0), (math.nan, 0.0)
    assert not any(torch.allclose(said(*other), own, atol=1e-4) for other in others)


def test_what_is_known_is_added_to_the_times_embedding():
    denoiser, plain = with_covariates(unet(), COVARIATES), unet()
    numbers, x, timesteps = torch.tensor([[70.0, 1.0]]), torch.randn(1, 2, 4, 4, 4), torch.tensor([500])
    added = denoiser.class_embedding(numbers)
    plain.time_embed.register_forward_hook(lambda module, inputs, output: output + added)
    assert torch.allclose(denoiser(x, timesteps, class_labels=numbers), plain(x, timesteps), atol=1e-6)


def test_without_covariates_the_denoiser_is_as_it_was():
    denoiser = unet()
    names = set(denoiser.state_dict())
    assert with_covariates(denoiser, Covariates()) is denoiser and set(denoiser.state_dict()) == names


@pytest.mark.parametrize(
    ("denoiser", "line"),
    [
        (lambda: unet(num_class_embeds=3), "a DiffusionModelUNet with num_class_embeds 3; expected"),
        (lambda: nn.Conv3d(2, 2, 1), "a Conv3d with num_class_embeds None; expected"),
    ],
)
def test_another_denoiser_is_refused(denoiser, line):
    with pytest.raises(InputError, match=f"covariates are set, and denoiser_def is {line}"):
        with_covariates(denoiser(), COVARIATES)
