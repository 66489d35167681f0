"""Two processes train as one does on their joint batch."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from ranks import on_two_ranks
from torch import distributed as dist
from torch import nn

from latdiff3d.codec import LatentCodec
from latdiff3d.condition_encoder import ConditionEncoder, with_encoder
from latdiff3d.conditioning import MaskCondition, condition_for
from latdiff3d.covariate_embedding import with_covariates
from latdiff3d.covariates import Covariates
from latdiff3d.distributed import (
    average_gradients,
    gather,
    mean_over_ranks,
    num_ranks,
    rank,
    shared,
    sum_over_ranks,
    together,
)
from latdiff3d.errors import InputError
from latdiff3d.losses import AutoencoderLoss
from latdiff3d.networks import downsampling
from latdiff3d.objectives import Epsilon, Flow
from latdiff3d.perceptual import FeatureDistance, Perceptual
from latdiff3d.quantization import VQAutoencoder
from latdiff3d.training import AutoencoderStep, DiffusionStep
from latdiff3d.wavelets import WaveletAutoencoder

LATENTS = 2
KINDS = ["kl", "vq_ema", "vq_gradient", "wavelet_kl", "wavelet_vq"]
DDPM = (Epsilon, DDPMScheduler, {"clip_sample": False})
# of stage 2: its objective, and its condition
STAGE_2_KINDS = {"epsilon": (*DDPM, "none"), "flow": (Flow, RFlowScheduler, {}, "none"), "encoder": (*DDPM, "encoder")}
STAGE_2_KINDS["covariates"] = (*DDPM, "concat")
COVARIATES = [{"name": "age", "mean": 60, "std": 15}, {"name": "sex", "classes": ["F", "M"]}]
CLASSES = 3


# Sums and means


def _sums():
    rank = dist.get_rank()
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    layer = nn.Linear(1, 1)
    layer.weight.grad, layer.bias.grad = torch.full((1, 1), float(rank)), None
    strided = nn.Parameter(torch.zeros(2, 3))
    strided.grad = (rank + torch.arange(6.0)).view(3, 2).T
    average_gradients([*layer.parameters(), strided])
    return sum_over_ranks(own), mean_over_ranks(own), own, layer.weight.grad, strided.grad, _agreed()


def _agreed():
    """What the ranks tell each other, and that each hears what another refuses."""
    done = []
    shares = shared(["a", "bb", "ccc"], lambda word: (done.append(word), len(word))[1])

    def refuse_on_the_second():
        if rank() == 1:
            raise InputError("the second rank's file is damaged.")

    try:
        together(refuse_on_the_second)
    except InputError as error:
        return gather(rank()), shares, done, str(error)


def test_sums_and_means_are_over_the_ranks_and_leave_what_they_are_given(tmp_path):
    for number, (total, mean, own, gradient, strided, agreed) in enumerate(on_two_ranks(_sums, tmp_path)):
        assert total.tolist() == [3.0, 30.0] and mean.tolist() == [1.5, 15.0]
        assert own.tolist() == [number + 1.0, 10.0 * (number + 1)]
        assert gradient.tolist() == [[0.5]] and strided.tolist() == [[0.5, 2.5, 4.5], [1.5, 3.5, 5.5]]
        ranks, shares, done, refused = agreed
        assert ranks == [0, 1] and shares == {"a": 1, "bb": 2, "ccc": 3}
        assert done == [["a", "ccc"], ["bb"]][number]
        assert refused == "the second rank's file is damaged."


def test_one_process_is_one_rank_and_has_nothing_to_sum():
    own = torch.tensor([2.0], requires_grad=True)
    assert num_ranks() == 1 and rank() == 0 and gather("x") == ["x"] == together(lambda: "x")
    assert shared([1, 2], str) == {1: "1", 2: "2"}
    assert sum_over_ranks(own).tolist() == mean_over_ranks(own).tolist() == [2.0]
    assert not mean_over_ranks(own).requires_grad


# Stage 1's gradients


def _autoencoder(kind):
    num_channels = 8 if kind.startswith("wavelet") else 1
    if kind.endswith("kl"):
        network = AutoencoderKL(
            spatial_dims=3, in_channels=num_channels, out_channels=num_channels, latent_channels=LATENTS,
            channels=(8, 8), num_res_blocks=1, norm_num_groups=4, attention_levels=(False, False),
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip
    else:
        network = VQAutoencoder(
            spatial_dims=3, in_channels=num_channels, out_channels=num_channels, channels=(8, 8), num_res_layers=1,
            num_res_channels=(8, 8), downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2, n_embed=8, embed_dim=LATENTS,
            codebook="gradient" if kind == "vq_gradient" else "ema",
        )  # fmt: skip
        network.quantizer.num_updates.fill_(1)  # the start draws at random; it has a test of its own
    return WaveletAutoencoder(network, 1, 1) if kind.startswith("wavelet") else network


class _Kept(torch.optim.SGD):
    """An optimiser that moves nothing, so that each update's gradients can be read afterwards."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)


def _gradients(kind):
    """One step of stage 1 with every term, on this rank's share of a batch of two; its gradients and terms."""
    torch.manual_seed(0)
    autoencoder = _autoencoder(kind)
    discriminator = PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1, norm="INSTANCE")
    seen = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Softplus()), nn.Conv3d(4, 4, 3)
    loss = AutoencoderLoss(
        kl_weight=0.1, perceptual_weight=0.5, perceptual=Perceptual(FeatureDistance(seen), lambda x, image: x),
        spectrum_weight=0.2, disc_weight=0.3, feature_matching_weight=0.2, disc_start=1, disc_warmup=0,
    )  # fmt: skip
    image, noise = torch.rand(2, 1, 16, 16, 16), torch.randn(2, LATENTS, *(16 // downsampling(autoencoder),) * 3)
    valid = torch.ones_like(image)
    valid[0, :, :10] = 0  # ranks with unlike numbers of own voxels
    share = slice(dist.get_rank(), dist.get_rank() + 1) if num_ranks() > 1 else slice(None)
    inner = getattr(autoencoder, "network", autoencoder)
    if kind.endswith("kl"):
        inner.sampling = lambda mean, std: mean + std * noise[share]
    step = AutoencoderStep(
        autoencoder, discriminator, loss, _Kept(autoencoder.parameters()), _Kept(discriminator.parameters()),
        torch.device("cpu"), "fp32", max_grad_norm=math.inf,
    )  # fmt: skip
    engine = SimpleNamespace(state=SimpleNamespace(iteration=1))
    terms = step(engine, {"image": image[share], "valid": valid[share]})
    gradients = [
        torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
        for network in (autoencoder, discriminator)
    ]
    book = inner.quantizer.codes.detach() if "vq" in kind else torch.zeros(1)
    return {"gradients": gradients, "terms": terms, "book": book}


def _stage_2_gradients(kind):
    """One step of stage 2 on this rank's share of four volumes' latents, noise and times; its gradient and loss."""
    torch.manual_seed(0)
    objective, scheduler, settings, conditioning = STAGE_2_KINDS[kind]
    condition = condition_for(conditioning, CLASSES, 2)
    num_given = 4 if conditioning == "encoder" else condition.num_channels
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=LATENTS + num_given, out_channels=LATENTS,
        channels=(8, 8), num_res_blocks=1, norm_num_groups=4, attention_levels=(False, True), num_head_channels=4,
    )  # fmt: skip
    for parameter in unet.parameters():  # at the 0 that some start from, others have no gradient
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    encoder = ConditionEncoder(condition.num_channels, 4, 8) if conditioning == "encoder" else None
    if kind == "covariates":
        unet = with_covariates(unet, Covariates(COVARIATES))
    denoiser = with_encoder(unet, encoder, LATENTS, condition.num_channels)
    mean, std = torch.randn(4, LATENTS, 8, 8, 8), torch.rand(4, LATENTS, 8, 8, 8)
    draws, times = [torch.randn_like(mean), torch.randn_like(mean)], torch.tensor([20, 310, 640, 970])
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2) if num_ranks() > 1 else slice(None)
    step = DiffusionStep(
        denoiser, LatentCodec(nn.Identity(), LATENTS), condition, scheduler(1000, **settings), objective(),
        _Kept(denoiser.parameters()), torch.device("cpu"), "fp32", max_grad_norm=math.inf, min_snr_gamma=5.0,
    )  # fmt: skip
    step.schedule.draw = lambda num, distribution, device: times[share]
    own = iter([draw[share] for draw in draws])
    batch = {"mean": mean, "std": std}
    if isinstance(condition, MaskCondition):
        batch["mask"] = torch.randint(CLASSES, (4, 1, 16, 16, 16))
    if kind == "covariates":  # nothing is known on the first rank
        batch["covariates"] = torch.tensor([[math.nan, math.nan], [math.nan, math.nan], [63.0, 1.0], [40.0, math.nan]])
    engine = SimpleNamespace(state=SimpleNamespace(iteration=1))
    with mock.patch.object(torch, "randn_like", lambda like: next(own)):  # the posterior's draw, then the noise
        terms = step(engine, {key: value[share] for key, value in batch.items()})
    gradients = {name: p.grad for name, p in denoiser.named_parameters()}
    assert all(gradient.any() for name, gradient in gradients.items() if "class_embedding" in name or "encoder" in name)
    return {"gradient": torch.cat([gradient.flatten() for gradient in gradients.values()]), "loss": terms["loss"]}


def _all_gradients():
    stage_1 = {kind: _gradients(kind) for kind in KINDS}
    return stage_1 | {kind: _stage_2_gradients(kind) for kind in STAGE_2_KINDS}


@pytest.fixture(scope="module")
def rank_gradients(tmp_path_factory):
    """Each rank's gradients, of every kind of both stages; started once, which is what takes the time."""
    return on_two_ranks(_all_gradients, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_gradients_of_one_with_the_joint_batch(rank_gradients, kind):
    joint = _gradients(kind)
    names = {"l1", "perceptual", "spectrum", "adversarial", "feature_matching", "adaptive_weight", "discriminator"}
    assert names | ({"kl"} if kind.endswith("kl") else {"commitment"}) <= set(joint["terms"])
    for ours in (gradients[kind] for gradients in rank_gradients):
        for own, expected in zip(ours["gradients"], joint["gradients"], strict=True):
            assert expected.norm() > 0
            assert (own - expected).norm() <= 1e-4 * expected.norm()
        assert ours["terms"] == pytest.approx(joint["terms"], rel=1e-4)
        assert torch.allclose(ours["book"], joint["book"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", STAGE_2_KINDS)
def test_two_ranks_have_stage_2s_gradients_of_one_with_the_joint_batch(rank_gradients, kind):
    joint = _stage_2_gradients(kind)
    assert joint["gradient"].norm() > 0
    for ours in (gradients[kind] for gradients in rank_gradients):
        assert (ours["gradient"] - joint["gradient"]).norm() <= 1e-4 * joint["gradient"].norm()
        assert ours["loss"] == pytest.approx(joint["loss"], rel=1e-4)
