"""The codec owns the latent space: its statistics, what it normalises, and when it refuses."""

import copy
import re

import pytest
import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.nets import AutoencoderKL
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from latdiff3d.codec import LatentCodec
from latdiff3d.errors import InputError
from latdiff3d.quantization import VQAutoencoder


class KnownMoments(nn.Module):
    """Its posterior has the image's two channels, scaled and shifted, as means, and a constant std a channel."""

    downsampling = 1
    scale = torch.tensor([2.0, -0.5])
    shift = torch.tensor([1.0, 3.0])
    std = torch.tensor([0.5, 0.1])

    def encode(self, image):
        mean = image * self.scale.view(1, 2, 1, 1, 1) + self.shift.view(1, 2, 1, 1, 1)
        return mean, self.std.view(1, 2, 1, 1, 1).expand_as(mean)

    def decode(self, latents):
        return (latents - self.shift.view(1, 2, 1, 1, 1)) / self.scale.view(1, 2, 1, 1, 1)


def batches_of(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand((size, 2, 4, 4, 4), generator=generator)} for size in sizes]


@pytest.fixture
def measured():
    codec = LatentCodec(KnownMoments(), latent_channels=2)
    codec.measure(batches_of(2, 1))
    return codec


def test_statistics_are_those_of_posterior_draws(measured):
    image = torch.cat([batch["image"] for batch in batches_of(2, 1)]).double()
    mean = image.mean(dim=(0, 2, 3, 4)) * KnownMoments.scale + KnownMoments.shift
    # The variance of the means plus the mean of the variances.
    variance = image.var(dim=(0, 2, 3, 4), correction=0) * KnownMoments.scale**2 + KnownMoments.std**2
    assert torch.allclose(measured.latent_mean.double(), mean, atol=1e-6)
    assert torch.allclose(measured.latent_std.double(), variance.sqrt(), atol=1e-6)
    assert measured.num_volumes == 3


def test_statistics_do_not_depend_on_how_the_volumes_are_batched(measured):
    again = LatentCodec(KnownMoments(), latent_channels=2)
    again.measure([{"image": image[None]} for batch in batches_of(2, 1) for image in batch["image"]])
    assert torch.allclose(again.latent_mean, measured.latent_mean, rtol=1e-6)
    assert torch.allclose(again.latent_std, measured.latent_std, rtol=1e-6)


def test_normalised_latents_have_zero_mean_and_unit_std(measured):
    mean, std = (
        torch.cat(parts) for parts in zip(*(measured.encode(b["image"]) for b in batches_of(2, 1)), strict=True)
    )
    dims = (0, 2, 3, 4)
    assert torch.allclose(mean.mean(dims), torch.zeros(2), atol=1e-5)
    assert torch.allclose(mean.var(dims, correction=0) + (std**2).mean(dims), torch.ones(2), atol=1e-5)


def test_an_image_survives_encoding_and_decoding(measured):
    [image] = [batch["image"] for batch in batches_of(1)]
    assert torch.allclose(measured.decode(measured.encode(image)[0]), image, atol=1e-5)
    assert torch.allclose(measured.reconstruct(image), image, atol=1e-5)


def test_a_codec_without_statistics_feeds_nothing():
    codec = LatentCodec(KnownMoments(), latent_channels=2)
    image = torch.rand(1, 2, 4, 4, 4)
    for use in (
        codec.encode,
        codec.decode,
        codec.reconstruct,
        codec.encode_stage_2_inputs,
        codec.decode_stage_2_outputs,
    ):
        with pytest.raises(InputError, match="not been measured"):
            use(image)


def test_an_unknown_precision_is_refused_before_any_work():
    with pytest.raises(InputError, match="precision is 'int8'; expected 'bf16', 'fp16' or 'fp32'"):
        LatentCodec(KnownMoments(), latent_channels=2, precision="int8")


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="no volumes"):
        LatentCodec(KnownMoments(), latent_channels=2).measure([])


def test_a_channel_that_never_changes_is_refused_and_leaves_the_codec_unmeasured():
    constant = KnownMoments()
    constant.std = torch.zeros(2)
    codec = LatentCodec(constant, latent_channels=2)
    with pytest.raises(InputError, match="above 0"):
        codec.measure([{"image": torch.ones(1, 2, 4, 4, 4)}])
    assert codec.num_volumes == 0


def test_statistics_travel_in_the_state_dict(measured):
    fresh = LatentCodec(KnownMoments(), latent_channels=2)
    fresh.load_state_dict(copy.deepcopy(measured.state_dict()))
    image = torch.rand(1, 2, 4, 4, 4)
    for one, other in zip(fresh.encode(image), measured.encode(image), strict=True):
        assert torch.equal(one, other)


def test_monais_names_agree_with_ours(measured):
    image = torch.rand(1, 2, 4, 4, 4)
    mean, std = measured.encode(image)
    torch.manual_seed(3)
    draw = measured.encode_stage_2_inputs(image)
    torch.manual_seed(3)
    assert torch.equal(draw, mean + std * torch.randn_like(std))
    assert torch.equal(measured.decode_stage_2_outputs(mean), measured.decode(mean))


def test_monais_latent_inferer_sees_normalised_latents_at_scale_factor_1(measured):
    image = torch.rand(1, 2, 4, 4, 4)
    seen = []

    def denoiser(x, timesteps, context=None):
        seen.append(x)
        return torch.zeros_like(x)

    inferer = LatentDiffusionInferer(DDPMScheduler(num_train_timesteps=10), scale_factor=1.0)
    torch.manual_seed(3)
    inferer(
        inputs=image,
        autoencoder_model=measured,
        diffusion_model=denoiser,
        noise=torch.zeros(1, 2, 4, 4, 4),
        timesteps=torch.zeros(1, dtype=torch.long),
    )
    torch.manual_seed(3)
    draw = measured.encode_stage_2_inputs(image)
    alpha_bar = inferer.scheduler.alphas_cumprod[0]
    assert torch.allclose(seen[0], alpha_bar.sqrt() * draw, atol=1e-6)


def test_bf16_statistics_come_from_float32_sums():
    class Convolved(nn.Module):
        downsampling = 1

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 1)

        def encode(self, image):
            mean = self.conv(image)
            assert mean.dtype == torch.bfloat16
            return mean, torch.ones_like(mean)

    codec = LatentCodec(Convolved(), latent_channels=2, precision="bf16")
    codec.measure(batches_of(1))
    mean, std = codec.encode(batches_of(1)[0]["image"])
    assert mean.dtype == std.dtype == torch.float32
    assert torch.allclose(mean.mean(dim=(0, 2, 3, 4)), torch.zeros(2), atol=1e-4)


# VQ


def vq_codec():
    torch.manual_seed(0)
    network = VQAutoencoder(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        channels=(4,),
        num_res_layers=1,
        num_res_channels=(4,),
        downsample_parameters=(2, 4, 1, 1),
        upsample_parameters=(2, 4, 1, 1, 0),
        n_embed=8,
        embed_dim=3,
    )
    network(batches_of(2)[0]["image"])  # a training step: the book starts
    return LatentCodec(network, latent_channels=3)


def test_vq_latents_are_measured_and_normalised_before_quantisation():
    codec, image = vq_codec(), batches_of(3)[0]["image"]
    codec.measure(batches_of(3))
    mean, std = codec.encode(image)
    assert not std.any()
    dims = (0, 2, 3, 4)
    assert torch.allclose(mean.mean(dims), torch.zeros(3), atol=1e-5)
    assert torch.allclose(mean.var(dims, correction=0), torch.ones(3), atol=1e-4)
    scale, shift = codec.latent_std.view(1, 3, 1, 1, 1), codec.latent_mean.view(1, 3, 1, 1, 1)
    assert torch.allclose(mean * scale + shift, codec.autoencoder.encoder(image), atol=1e-6)
    assert torch.equal(codec.encode_stage_2_inputs(image), mean)


def test_vq_latents_are_quantised_when_decoded():
    codec, image = vq_codec(), batches_of(3)[0]["image"]
    codec.measure(batches_of(3))
    latents, _ = codec.autoencoder.encode(image)
    codes = codec.autoencoder.quantizer.nearest(latents)
    assert torch.allclose(codec.reconstruct(image), codec.autoencoder.decoder(codes), atol=1e-5)
    # Latents a little off decode to the same volume.
    moved = codec.encode(image)[0] + 1e-6
    assert torch.equal(codec.decode(moved), codec.decode(codec.encode(image)[0]))


def test_the_codebook_is_frozen_while_latents_are_made_measured_and_decoded():
    codec, image = vq_codec(), batches_of(3)[0]["image"]
    before = copy.deepcopy(codec.autoencoder.state_dict())
    for use in (
        lambda: codec.measure(batches_of(3)),
        lambda: codec.decode(codec.encode(image)[0]),
        lambda: codec.reconstruct(image),
        lambda: codec.decode_stage_2_outputs(codec.encode_stage_2_inputs(image)),
    ):
        codec.train()
        use()
        assert all(torch.equal(before[key], value) for key, value in codec.autoencoder.state_dict().items())


def test_another_number_of_latent_channels_than_the_networks_is_refused():
    with pytest.raises(InputError, match="the autoencoder has 3 latent channels, latent_channels is 4"):
        LatentCodec(vq_codec().autoencoder, latent_channels=4)


# Any size, and whole volumes


def kl_codec(precision="fp32"):
    torch.manual_seed(0)
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        latent_channels=3,
        channels=(4, 4, 4),
        num_res_blocks=1,
        norm_num_groups=2,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    codec = LatentCodec(network, latent_channels=3, precision=precision)
    codec.measure([{"image": image_of(16, 16, 16)}])
    return codec


def image_of(*size):
    return torch.rand((1, 2, *size), generator=torch.Generator().manual_seed(0))


def test_any_size_comes_back_in_the_same_size():
    codec, image = kl_codec(), image_of(17, 13, 10)
    mean, std = codec.encode(image)
    assert mean.shape == std.shape == (1, 3, 5, 4, 3)
    assert codec.decode(mean).shape == (1, 2, 20, 16, 12)
    assert codec.decode(mean, size=(17, 13, 10)).shape == codec.reconstruct(image).shape == image.shape
    assert torch.equal(codec.reconstruct(image), codec.decode(mean)[..., :17, :13, :10])
    with pytest.raises(InputError, match=r"size is \[17, 13, 13\], the latents' \[5, 4, 3\]; expected 1 to 4 voxels"):
        codec.decode(mean, size=(17, 13, 13))


def test_what_is_missing_to_whole_cells_repeats_the_last_voxels():
    codec, image = kl_codec(), image_of(17, 12, 10)
    padded = torch.cat([image, *[image[:, :, -1:]] * 3], 2)
    padded = torch.cat([padded, *[padded[..., -1:]] * 2], 4)
    for one, other in zip(codec.encode(image), codec.encode(padded), strict=True):
        assert torch.equal(one, other)


def test_sizes_of_whole_cells_are_not_touched():
    codec, image = kl_codec(), image_of(16, 12, 8)
    raw = codec.autoencoder.encode(image)[0]
    mean = (raw - codec.latent_mean.view(1, 3, 1, 1, 1)) / codec.latent_std.view(1, 3, 1, 1, 1)
    assert torch.equal(codec.encode(image)[0], mean)
    assert torch.equal(codec.reconstruct(image), codec.decode(mean))


def test_a_whole_volume_by_tiles_is_the_volume_at_once():
    codec, image = kl_codec(), image_of(14, 10, 150) * torch.linspace(0, 1, 150)  # dark at one end, bright at the other
    mean, std = codec.encode(image)
    # The smallest budget that serves, found by asking for none.
    with pytest.raises(InputError, match="Give at least that") as error:
        codec.encode(image, memory_gb=0)
    needed = float(re.search(r"need ([\d.]+)\.", str(error.value)).group(1))
    windows = []
    hook = codec.autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: windows.append(inputs[0].shape[2:]))
    tiled_mean, tiled_std = codec.encode(image, memory_gb=needed)
    hook.remove()
    assert windows[-1][2] < 152
    assert torch.allclose(tiled_mean, mean, atol=1e-5)
    assert torch.allclose(tiled_std, std, atol=1e-5)
    assert torch.allclose(codec.reconstruct(image, memory_gb=needed), codec.reconstruct(image), atol=1e-5)
