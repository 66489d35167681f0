"""The condition's encoder: one module with the denoiser, on one grid with the latents."""

import copy

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from latdiff3d.condition_encoder import ConditionEncoder, EncodingDenoiser, with_encoder
from latdiff3d.errors import InputError
from latdiff3d.recompute import per_block

LATENTS, CONDITION, ENCODED = 2, 24, 4


def unet():
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=3, in_channels=LATENTS + ENCODED, out_channels=LATENTS, channels=(8, 8), num_res_blocks=1,
        norm_num_groups=4, attention_levels=(False, False), num_head_channels=4,
    )  # fmt: skip
    nn.init.normal_(network.out[-1].conv.weight, std=0.1)  # MONAI starts it at 0
    return network


def encoding_denoiser():
    return with_encoder(unet(), ConditionEncoder(CONDITION, ENCODED, 8), LATENTS, CONDITION)


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, LATENTS + CONDITION, 4, 4, 4), torch.tensor([3, 700])


def test_the_denoiser_sees_the_latents_and_what_the_encoder_makes_of_the_rest():
    network, (x, timesteps) = encoding_denoiser(), inputs()
    encoded = network.encoder(x[:, LATENTS:])
    assert encoded.shape == (2, ENCODED, 4, 4, 4)
    assert torch.equal(network(x, timesteps), network.denoiser(torch.cat([x[:, :LATENTS], encoded], 1), timesteps))


def test_both_are_trained():
    network, (x, timesteps) = encoding_denoiser(), inputs()
    network(x, timesteps).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.encoder.parameters())
    assert all(parameter.grad is not None for parameter in network.denoiser.parameters())


def test_its_blocks_are_recomputed_like_the_denoisers():
    plain, (x, timesteps) = encoding_denoiser(), inputs()
    recomputed = per_block(copy.deepcopy(plain))
    assert type(recomputed.encoder[1]).__name__ == "RecomputedAEKLResBlock"
    gradients = []
    for network in (plain, recomputed):
        network(x, timesteps).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_without_an_encoder_the_denoiser_is_itself():
    network = unet()
    assert with_encoder(network, None, LATENTS, CONDITION) is network


def test_an_encoders_mode_is_as_it_was():
    encoder = nn.Sequential(nn.Conv3d(CONDITION, ENCODED, 1), nn.Dropout(0.5)).eval()
    network = with_encoder(unet(), encoder, LATENTS, CONDITION)
    assert isinstance(network, EncodingDenoiser) and not network.encoder.training


@pytest.mark.parametrize(
    ("encoder", "line"),
    [
        (nn.Conv3d(CONDITION, ENCODED + 1, 1), r"a Conv3d, makes \(1, 5, 8, 8, 8\) .*expected \(1, 4, 8, 8, 8\)"),
        (nn.Conv3d(CONDITION, ENCODED, 2, stride=2), r"a Conv3d, makes \(1, 4, 4, 4, 4\)"),
        (nn.Conv3d(3, ENCODED, 1), r"a Conv3d, does not take the condition's 24 channels .*in_channels"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(encoder, line):
    with pytest.raises(InputError, match=f"condition_encoder_def, {line}"):
        with_encoder(unet(), encoder, LATENTS, CONDITION)
