"""The two iteration updates, and what the evaluators measure."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDPMScheduler

from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import MaskCondition, NoCondition
from latdiff3d.errors import InputError
from latdiff3d.losses import AutoencoderLoss
from latdiff3d.objectives import Epsilon
from latdiff3d.training import (
    AutoencoderStep,
    AutoencoderValidation,
    DiffusionStep,
    DiffusionValidation,
    with_condition,
)

CPU = torch.device("cpu")
CLASSES, LATENTS = 3, 2


def engine_at(iteration):
    return SimpleNamespace(state=SimpleNamespace(iteration=iteration))


def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=LATENTS,
        channels=(8, 8),
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


def volumes(count=2, size=16):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((count, 1, size // 4, size // 4, size // 4), generator=generator)
    image = torch.nn.functional.interpolate(image, scale_factor=4, mode="trilinear")
    mask = (image > 0.5).float() + (image > 0.7).float()
    return {"image": image, "mask": mask, "valid": torch.ones_like(image)}


def autoencoder_step(lr=1e-2, precision="fp32", **loss):
    network = autoencoder()
    discriminator = PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1, norm="INSTANCE")
    return AutoencoderStep(
        network,
        discriminator,
        AutoencoderLoss(**loss),
        torch.optim.Adam(network.parameters(), lr),
        torch.optim.Adam(discriminator.parameters(), lr),
        CPU,
        precision,
    )


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


# Stage 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_1_overfits_a_batch(precision):
    step, batch = autoencoder_step(precision=precision, disc_start=1000), volumes()
    losses = [step(engine_at(k), batch)["l1"] for k in range(1, 31)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_discriminator_trains_from_its_warm_up_on_and_is_heard_from_its_start():
    step, batch = autoencoder_step(disc_start=4, disc_warmup=2), volumes()
    terms, changed = [], []
    for iteration in range(1, 6):
        before = copy.deepcopy(step.discriminator.state_dict())
        terms.append(set(step(engine_at(iteration), batch)))
        changed.append(not same_weights(before, step.discriminator.state_dict()))
    assert changed == [False, True, True, True, True]
    plain = {"l1", "kl", "weighted_l1", "weighted_kl"}
    warm = plain | {"discriminator"}
    assert terms == [plain, warm, warm, *[warm | {"adversarial", "weighted_adversarial", "adaptive_weight"}] * 2]


def test_a_term_of_no_weight_vanishes():
    batch = volumes()
    with_it, without = autoencoder_step(disc_weight=0, disc_start=0, kl_weight=0), autoencoder_step(disc_start=1000)
    without.loss.kl_weight = 0
    for step in (with_it, without):
        torch.manual_seed(0)
        step(engine_at(1), batch)
    assert same_weights(with_it.autoencoder.state_dict(), without.autoencoder.state_dict())


def test_the_generator_does_not_move_the_discriminator():
    step, batch = autoencoder_step(disc_start=1, disc_warmup=0), volumes()
    step.loss.discriminator_trains = lambda iteration: False
    before = copy.deepcopy(step.discriminator.state_dict())
    assert "adversarial" in step(engine_at(1), batch)
    assert same_weights(before, step.discriminator.state_dict())


class SeesInstead(torch.nn.Module):
    """An autoencoder that is shown `image`, whatever it is held against afterwards."""

    def __init__(self, network, image):
        super().__init__()
        self.network, self.image = network, image

    def forward(self, image):
        return self.network(self.image)


def test_the_reconstruction_is_given_up_before_the_way_back():
    step = autoencoder_step(disc_start=1, feature_matching_weight=0.1)
    seen, alive = [], []
    step.autoencoder.register_forward_hook(lambda *call: seen.append(weakref.ref(call[-1][0])))
    step.autoencoder.decoder.register_full_backward_pre_hook(lambda *_: alive.append(seen[0]() is not None))
    step(engine_at(1), volumes())
    assert len(seen) == 1 and alive[-1] is False


def test_what_the_padding_is_held_against_changes_no_update():
    batch = volumes()
    batch["valid"][:, :, 8:] = 0
    terms, steps = [], []
    for padding in (0.0, 0.9):
        step = autoencoder_step(disc_start=1000)
        step.autoencoder = SeesInstead(step.autoencoder, batch["image"])
        torch.manual_seed(0)
        target = torch.where(batch["valid"] > 0, batch["image"], padding)
        terms.append(step(engine_at(1), {**batch, "image": target}))
        steps.append(step)
    assert terms[0] == terms[1]
    assert same_weights(*(step.autoencoder.state_dict() for step in steps))


def test_the_discriminator_sees_the_same_padding_in_both():
    step, batch = autoencoder_step(disc_start=1, disc_warmup=0), volumes()
    batch["valid"][:, :, 8:] = 0
    seen = []
    step.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    step(engine_at(1), batch)
    assert len(seen) == 3  # the generator's look, and the discriminator's at both
    for image in seen:
        assert torch.equal(image[:, :, 8:], batch["image"][:, :, 8:])


def test_a_loss_that_is_no_number_stops_before_the_weights_are_lost():
    step, batch = autoencoder_step(), volumes()
    before = copy.deepcopy(step.autoencoder.state_dict())
    batch["image"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"loss of AutoencoderKL became nan at step 1.*; lower learning_rate"):
        step(engine_at(1), batch)
    assert same_weights(before, step.autoencoder.state_dict())


def test_stage_1_is_validated_on_a_volumes_own_voxels():
    network, batch = autoencoder(), volumes(1)
    validation = AutoencoderValidation(network, CPU, "fp32")
    whole = validation(engine_at(1), batch)
    padded = {key: torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 16)) for key, value in batch.items()}
    network.decode = lambda z, decode=network.decode: torch.cat(
        [decode(network.encode(batch["image"])[0]), torch.rand(1, 1, 16, 16, 16)], dim=2
    )
    again = validation(engine_at(1), padded)
    assert again["psnr"] == pytest.approx(whole["psnr"], abs=1e-4)
    assert again["l1"] == pytest.approx(whole["l1"], abs=1e-6)
    assert torch.equal(again["reconstruction"][:, :, 16:], padded["image"][:, :, 16:])


# Stage 2


@pytest.fixture
def codec():
    codec = LatentCodec(autoencoder(), LATENTS)
    codec.measure([volumes()])
    return codec.requires_grad_(False).eval()


def denoiser(num_condition):
    torch.manual_seed(0)
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=LATENTS + num_condition,
        out_channels=LATENTS,
        channels=(8, 8),
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False, False),
        num_head_channels=4,
    )


def schedule():
    return DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195, clip_sample=False)


def diffusion_step(codec, condition, precision="fp32"):
    network = denoiser(condition.num_channels)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    return DiffusionStep(network, codec, condition, schedule(), Epsilon(), optimizer, CPU, precision)


CONDITIONS = pytest.mark.parametrize("condition", [MaskCondition(CLASSES, 2), NoCondition()], ids=["concat", "none"])


@CONDITIONS
def test_stage_2_overfits_a_batch_and_leaves_the_codec_alone(codec, condition):
    step, batch = diffusion_step(codec, condition), volumes()
    before = copy.deepcopy(codec.state_dict())
    validation = DiffusionValidation(step.denoiser, codec, condition, schedule(), Epsilon(), CPU, "fp32")
    first = validation(engine_at(1), batch)["loss"]
    torch.manual_seed(0)
    for k in range(1, 26):
        step(engine_at(k), batch)
    assert validation(engine_at(1), batch)["loss"] < 0.95 * first
    assert same_weights(before, codec.state_dict())


def test_stage_2s_validation_is_the_same_twice_whatever_happened_between(codec):
    condition = MaskCondition(CLASSES, 2)
    validation = DiffusionValidation(denoiser(CLASSES), codec, condition, schedule(), Epsilon(), CPU)
    batch = volumes(1)
    first = validation(engine_at(3), batch)
    torch.manual_seed(99)
    torch.rand(7)
    assert validation(engine_at(3), batch) == first
    assert validation(engine_at(4), batch) != first


def test_validation_uses_the_posteriors_mean_and_draws_nothing_from_the_global_generator(codec):
    validation = DiffusionValidation(denoiser(0), codec, NoCondition(), schedule(), Epsilon(), CPU)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    validation(engine_at(1), volumes(1))
    assert torch.equal(torch.rand(3), expected)


def test_a_denoiser_that_says_the_noise_has_no_loss(codec):
    class Knows(torch.nn.Module):
        def forward(self, x, timesteps):
            mean, _ = codec.encode(volumes(1)["image"])
            alpha_bar = schedule().alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
            return (x - alpha_bar.sqrt() * mean) / (1 - alpha_bar).sqrt()

    validation = DiffusionValidation(Knows(), codec, NoCondition(), schedule(), Epsilon(), CPU, "fp32")
    batch = {"image": volumes(1)["image"]}
    assert validation(engine_at(1), batch)["loss"] < 1e-8


def test_the_condition_stands_behind_the_latents():
    latents, condition = torch.zeros(2, LATENTS, 4, 4, 4), torch.ones(2, CLASSES, 4, 4, 4)
    both = with_condition(latents, condition)
    assert both.shape == (2, LATENTS + CLASSES, 4, 4, 4)
    assert not both[:, :LATENTS].any() and both[:, LATENTS:].all()
    assert with_condition(latents, None) is latents
