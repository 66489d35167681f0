"""The wavelet stem: nothing is lost, and training begins at the best linear code."""

from types import SimpleNamespace

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import AutoencoderKL

from latdiff3d.errors import InputError
from latdiff3d.linear_codes import BlockPCA
from latdiff3d.networks import check_crop, downsampling, last_convolution, last_layer, narrow_posterior
from latdiff3d.quantization import VQAutoencoder
from latdiff3d.wavelets import LinearStart, WaveletAutoencoder, haar, inverse_haar, with_stem

IMAGE_CHANNELS, LATENTS = 2, 3


def inner(num_bands=8 * IMAGE_CHANNELS, channels=(8, 8)):
    torch.manual_seed(0)
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=num_bands,
        out_channels=num_bands,
        latent_channels=LATENTS,
        channels=channels,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=[False] * len(channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    return narrow_posterior(network, 0.05)


def autoencoder():
    return WaveletAutoencoder(inner(), 1, IMAGE_CHANNELS)


def vq_autoencoder():
    torch.manual_seed(0)
    network = VQAutoencoder(
        spatial_dims=3,
        in_channels=8 * IMAGE_CHANNELS,
        out_channels=8 * IMAGE_CHANNELS,
        channels=(8,),
        num_res_layers=1,
        num_res_channels=(8,),
        downsample_parameters=(2, 4, 1, 1),
        upsample_parameters=(2, 4, 1, 1, 0),
        n_embed=16,
        embed_dim=LATENTS,
    )
    return WaveletAutoencoder(network, 1, IMAGE_CHANNELS)


def smooth_volumes(count=4, size=16):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, IMAGE_CHANNELS, size // 4, size // 4, size // 4), generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear")


# Haar


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8, 8), (2, 3, 4, 8, 12)])
def test_the_inverse_gives_back_the_image(levels, shape):
    image = torch.rand(shape)
    bands = haar(image, levels)
    assert bands.shape == (shape[0], shape[1] * 8**levels, *(size // 2**levels for size in shape[2:]))
    assert torch.allclose(inverse_haar(bands, levels), image, atol=1e-6)


def test_energy_is_kept():
    image = torch.rand(1, 2, 8, 8, 8)
    assert haar(image, 2).square().sum().item() == pytest.approx(image.square().sum().item(), rel=1e-5)


def test_a_constant_volume_is_in_the_first_band_alone():
    bands = haar(torch.full((1, 1, 4, 4, 4), 0.5))
    assert torch.allclose(bands[:, 0], torch.tensor(0.5 * 8**0.5))
    assert bands[:, 1:].abs().max() < 1e-6


@pytest.mark.parametrize(("axis", "band"), [(2, 4), (3, 2), (4, 1)])
def test_a_stripe_along_an_axis_is_in_that_axis_band(axis, band):
    shape = [1, 1, 1, 1, 1]
    shape[axis] = 4
    stripes = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(shape).expand(1, 1, 4, 4, 4)
    bands = haar(stripes)[0].abs().amax(dim=(1, 2, 3))
    assert bands[band].item() == pytest.approx(8**0.5, rel=1e-6)
    assert bands[[k for k in range(8) if k != band]].max() < 1e-6


def test_bfloat16_autocast_loses_nothing():
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(inverse_haar(haar(image)), image, atol=1e-6)


# The autoencoder


def test_its_face_is_the_networks():
    network, image = autoencoder(), smooth_volumes(1)
    reconstruction, mean, std = network(image)
    assert reconstruction.shape == image.shape
    assert mean.shape == std.shape == (1, LATENTS, 4, 4, 4)
    assert downsampling(network) == 4
    assert last_layer(network) is last_convolution(network.network.decoder).weight
    check_crop([16, 12, 8], [network])
    with pytest.raises(InputError, match="not divisible by 4"):
        check_crop([16, 12, 10], [network])


def test_no_levels_are_no_stem():
    network = inner(IMAGE_CHANNELS)
    assert with_stem(network, 0, IMAGE_CHANNELS) is network


@pytest.mark.parametrize("levels", [-1, 4, 1.0, True, "one"])
def test_another_number_of_levels_is_refused(levels):
    with pytest.raises(InputError, match=r"wavelet_levels is .*; expected a whole number from 0"):
        with_stem(inner(), levels, IMAGE_CHANNELS)


def test_a_network_of_other_channels_is_refused():
    with pytest.raises(InputError, match=r"has 2 channels in and 2 out; .* it needs 16"):
        with_stem(inner(IMAGE_CHANNELS), 1, IMAGE_CHANNELS)


@pytest.mark.parametrize(("levels", "channels"), [(1, (8, 8)), (2, (8,))])
def test_it_starts_as_block_pca(levels, channels):
    volumes = smooth_volumes()
    network = WaveletAutoencoder(inner(IMAGE_CHANNELS * 8**levels, channels), levels, IMAGE_CHANNELS).eval()
    network.start_linear([volumes[:3], volumes[3:]])
    pca = BlockPCA().fit([volume.numpy() for volume in volumes], LATENTS, 4)
    held_out = torch.rand(1, IMAGE_CHANNELS, 8, 8, 8)
    with torch.no_grad():
        mean, std = network.encode(held_out)
        reconstruction = network.decode(mean)
    assert torch.allclose(reconstruction[0], torch.as_tensor(pca.reconstruct(held_out[0].numpy())), atol=1e-4)
    assert torch.allclose(std, torch.tensor(0.05), rtol=1e-4)


def test_its_latents_start_with_unit_variance_over_the_training_volumes():
    network, volumes = autoencoder(), smooth_volumes()
    network.start_linear([volumes])
    latents = network.encode(volumes)[0].detach().transpose(0, 1).flatten(1)
    assert torch.allclose(latents.mean(1), torch.zeros(LATENTS), atol=1e-3)
    assert torch.allclose(latents.std(1), torch.ones(LATENTS), atol=1e-2)


def test_a_quantisers_latents_start_on_one_scale_on_which_distances_are_errors_of_the_volume():
    network, volumes = vq_autoencoder(), smooth_volumes()
    network.start_linear([volumes])
    latents, _ = network.encode(volumes)
    assert latents.transpose(0, 1).flatten(1).var(1).mean().item() == pytest.approx(1, rel=1e-2)
    step = torch.randn_like(latents)
    moved = network.linear_decoder(latents + step) - network.linear_decoder(latents)
    one_unit = network.linear_decoder.weight[:, 0].norm()
    assert moved.norm().item() == pytest.approx((one_unit * step.norm()).item(), rel=1e-4)


def test_from_there_it_learns_what_a_linear_code_cannot():
    network, volumes = autoencoder(), smooth_volumes()
    network.start_linear([volumes])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    errors = []
    for _ in range(40):
        reconstruction, *_ = network(volumes)
        error = (reconstruction - volumes).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    assert last_layer(network).abs().max() > 0


@pytest.mark.parametrize("build", [autoencoder, vq_autoencoder])
def test_the_linear_path_has_its_gradient_before_the_network_goes_back(build):
    network = build().train()
    reached = []
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda _, name=name: reached.append(name))
    network(smooth_volumes())[0].square().mean().backward()
    assert set(reached[:2]) == {"linear_decoder.weight", "linear_decoder.bias"}
    assert any(name.startswith("network.decoder") for name in reached[2:])


def test_flat_volumes_have_no_components_to_start_from():
    with pytest.raises(InputError, match=r"vary in .* directions only; expected at least latent_channels, 3"):
        autoencoder().start_linear([torch.full((1, IMAGE_CHANNELS, 8, 8, 8), 0.5)])
    with pytest.raises(InputError, match="there are no volumes"):
        autoencoder().start_linear([])


# Noise on the latents


def noisy_decodings(network, latent_noise):
    """What training decodes, in latent standard deviations away from the posterior's draw, for three volumes."""
    network.latent_noise, network.network.sampling = latent_noise, lambda mean, std: mean
    seen = []
    network._decoded = lambda latents, decode: seen.append(latents) or latents
    volumes = smooth_volumes(3)
    mean = network(volumes)[1]
    return ((seen[0] - mean) / mean.std(dim=(0, 2, 3, 4), keepdim=True)).std(dim=(1, 2, 3, 4)), seen[0], mean


def test_noise_of_each_volumes_own_strength_is_laid_over_the_latents_in_training():
    network = autoencoder().train()  # seeds
    levels = torch.cat([noisy_decodings(network, 0.3)[0] for _ in range(40)])
    assert levels.pow(2).mean().sqrt().item() == pytest.approx(0.3, rel=0.2)
    assert levels.std() > 0.1


@pytest.mark.parametrize(("latent_noise", "is_training"), [(0.0, True), (0.3, False)])
def test_there_is_no_noise_where_none_is_asked_for_and_none_in_use(latent_noise, is_training):
    _, decoded, mean = noisy_decodings(autoencoder().train(is_training), latent_noise)
    assert torch.equal(decoded, mean)


@pytest.mark.parametrize(
    ("levels", "noise", "line"), [(0, 0.3, "which only an AutoencoderKL in"), (1, -1, "from 0 on")]
)
def test_noise_without_effect_or_below_0_is_refused(levels, noise, line):
    with pytest.raises(InputError, match=line):
        with_stem(inner(IMAGE_CHANNELS * 8**levels), levels, IMAGE_CHANNELS, noise)


# The handler


def loader():
    data = Dataset([{"image": volume} for volume in smooth_volumes()])
    return DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator())


def engine_at(iteration):
    return SimpleNamespace(state=SimpleNamespace(iteration=iteration))


def test_a_fresh_run_starts_linear_and_a_resumed_one_stays():
    network = autoencoder()
    start = LinearStart(network, loader())
    before = network.linear_encoder.weight.clone()
    start(engine_at(5))
    assert torch.equal(network.linear_encoder.weight, before)
    start(engine_at(0))
    assert not torch.equal(network.linear_encoder.weight, before)
    assert not last_layer(network).any()


def test_a_network_without_a_stem_stays():
    network = inner(IMAGE_CHANNELS)
    before = [parameter.clone() for parameter in network.parameters()]
    LinearStart(network, loader())(engine_at(0))
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), before, strict=True))


def test_it_looks_at_no_more_volumes_than_asked():
    network, seen = autoencoder(), []
    network.start_linear = lambda images: seen.extend(image.shape[0] for image in images)
    LinearStart(network, loader(), max_volumes=2)(engine_at(0))
    assert seen == [2]
