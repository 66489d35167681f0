"""What MONAI's networks are asked and given from outside."""

import copy

import pytest
import torch
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.networks import (
    check_crop,
    check_discriminator,
    downsampling,
    last_layer,
    narrow_posterior,
)


def autoencoder(channels=(8, 8)):
    levels = [False] * len(channels)
    return AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        channels=channels,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=levels,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


def unet(channels=(8, 8)):
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        channels=channels,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=[False] * len(channels),
    )


@pytest.mark.parametrize(("channels", "factor"), [((8,), 1), ((8, 8), 2), ((8, 8, 8), 4)])
def test_downsampling_is_what_the_networks_do(channels, factor):
    network = autoencoder(channels)
    assert downsampling(network) == downsampling(unet(channels)) == factor
    assert network.encode(torch.zeros(1, 1, 8, 8, 8))[0].shape[2:] == (8 // factor,) * 3


def test_another_network_has_no_known_downsampling():
    with pytest.raises(TypeError, match="Conv3d"):
        downsampling(nn.Conv3d(1, 1, 1))


# check_crop


def test_a_crop_that_divides_is_accepted():
    check_crop([16, 8, 24], [autoencoder((8, 8, 8)), unet((8, 8))])
    check_crop([4, 4, 12], [autoencoder((8, 8, 8))])


def test_a_crop_that_does_not_divide_is_told_the_nearest_that_does():
    with pytest.raises(InputError) as error:
        check_crop([20, 16, 31], [autoencoder((8, 8, 8)), unet((8, 8))])
    assert str(error.value) == (
        "crop_to [20, 16, 31] is not divisible by 8 (the autoencoder's 4 × the U-Net's 2); "
        "the nearest that is: [24, 16, 32]."
    )


def test_the_nearest_crop_runs_through_both_networks_and_the_refused_one_does_not():
    first, second = autoencoder((8, 8)).eval(), unet((8, 8)).eval()

    def run(crop):
        with torch.no_grad():
            second(first.encode(torch.zeros(1, 1, *crop))[0], torch.zeros(1, dtype=torch.long))

    run([12, 8, 12])
    with pytest.raises(RuntimeError):
        run([10, 8, 10])


@pytest.mark.parametrize(
    "crop", [[16, 16], [16, 16, 0], [16, 16, -8], [16.5, 16, 16], [16, 16, 16, 16], 16, "big", None, {"d": 16}]
)
def test_a_crop_that_is_no_size_is_refused(crop):
    with pytest.raises(InputError) as error:
        check_crop(crop, [autoencoder()])
    assert str(error.value).startswith(f"crop_to is {crop!r}; expected three whole numbers")


# check_discriminator


def discriminator(channels=4, num_layers=1, num_channels=1):
    return PatchDiscriminator(
        spatial_dims=3, in_channels=num_channels, channels=channels, num_layers_d=num_layers, norm="INSTANCE"
    )


def test_a_crop_that_the_discriminator_leaves_nothing_of_is_refused_in_one_line():
    check_discriminator([8, 8, 8], discriminator(), 1)
    with pytest.raises(InputError) as error:
        check_discriminator([4, 8, 8], discriminator(), 1)
    line = str(error.value)
    assert line.startswith("crop_to [4, 8, 8] is too small for the discriminator (") and "\n" not in line
    assert line.endswith("use a larger crop, or fewer layers: discriminator_def::num_layers_d.")


def test_looking_at_the_crop_leaves_the_discriminator_as_it_was():
    network = discriminator()
    before = copy.deepcopy(network.state_dict())
    check_discriminator([8, 8, 8], network, 1)
    assert network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def vq(channels=(8, 8), **options):
    return VQVAE(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=channels,
        num_res_channels=channels,
        num_res_layers=1,
        **{"downsample_parameters": (2, 4, 1, 1), "upsample_parameters": (2, 4, 1, 1, 0), **options},
    )


def test_a_vq_autoencoder_is_known_too():
    assert downsampling(vq()) == 4
    flat_first = vq(
        downsample_parameters=((1, 3, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (1, 3, 1, 1, 0))
    )
    assert downsampling(flat_first) == 2
    for network, factor in ((vq(), 4), (flat_first, 2)):
        assert network.encode(torch.zeros(1, 1, 8, 8, 8)).shape[2:] == (8 // factor,) * 3
    assert last_layer(vq()).shape[:2] == (8, 1)  # a transposed convolution's
    with pytest.raises(InputError, match=r"not divisible by 8 \(the autoencoder's 4 × the U-Net's 2\)"):
        check_crop([20, 16, 31], [vq(), unet((8, 8))])


def test_a_vq_autoencoder_has_no_posterior_to_narrow():
    network = vq()
    before = copy.deepcopy(network.state_dict())
    assert narrow_posterior(network, 0.05) is network
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# narrow_posterior


@pytest.mark.parametrize("std", [0.05, 0.5])
def test_an_untrained_posterior_is_as_narrow_as_asked_whatever_the_image(std):
    network = autoencoder()
    assert narrow_posterior(network, std) is network
    generator = torch.Generator().manual_seed(0)
    for image in (torch.zeros(1, 1, 8, 8, 8), 100 * torch.randn((2, 1, 8, 12, 8), generator=generator)):
        _, found = network.encode(image)
        assert torch.allclose(found, torch.full_like(found, std), rtol=1e-5)


def test_narrowing_changes_no_mean_and_the_posterior_can_widen_again():
    torch.manual_seed(0)
    network, image = autoencoder(), torch.rand(1, 1, 8, 8, 8)
    before, _ = network.encode(image)
    mean, std = narrow_posterior(network, 0.05).encode(image)
    assert torch.equal(mean, before)
    std.log().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.quant_conv_log_sigma.parameters())


def test_the_last_layer_is_the_one_that_writes_the_image():
    assert last_layer(autoencoder()).shape[:2] == (1, 8)
