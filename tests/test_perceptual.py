"""Perceptual losses at known answers: hand-made networks, random MONAI networks, and what they refuse."""

import sys
import types
from functools import partial

import pytest
import torch
from monai.networks.nets import ResNetFeatures, UNet
from torch import nn

from latdiff3d import perceptual as module
from latdiff3d.errors import InputError
from latdiff3d.perceptual import (
    FeatureDistance,
    Perceptual,
    check_perceptual,
    monai_perceptual,
    pretrained_perceptual,
    segmenter_perceptual,
)

SHAPE = (2, 2, 16, 12, 8)  # (B, C, D, H, W)


def scaling(factor, dims=3, in_channels=1):
    """A convolution whose features are `factor` times its input."""
    conv = (nn.Conv3d if dims == 3 else nn.Conv2d)(in_channels, in_channels, 1, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[range(in_channels), range(in_channels)] = factor
    return conv


def plain(*stages, **settings):
    return Perceptual(FeatureDistance(stages, unit_length=False), module._as_is, **settings)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    image = torch.rand(SHAPE)
    return (image + 0.2 * torch.randn(SHAPE)).requires_grad_(True), image.requires_grad_(True)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(1)
    return UNet(3, in_channels=2, out_channels=3, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, dropout=0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights of MedicalNet's smallest network and of a 2D ResNet50."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(ResNetFeatures("resnet10", False, 3, 1).state_dict(), folder / "medicalnet.pth")
    torch.save(ResNetFeatures("resnet50", False, 2, 3).state_dict(), folder / "imagenet.pth")
    return folder


@pytest.fixture(scope="module")
def losses(files, segmenter):
    return {
        "medicalnet": pretrained_perceptual(files / "medicalnet.pth", num_stages=3),
        "imagenet": pretrained_perceptual(
            files / "imagenet.pth", "imagenet_resnet50", num_stages=2, slice_fraction=0.01
        ),
        "segmenter": segmenter_perceptual(segmenter),
        "segmenter, plain": segmenter_perceptual(segmenter, unit_length=False),
    }


NAMES = ["medicalnet", "imagenet", "segmenter", "segmenter, plain"]


# Every loss


@pytest.mark.parametrize("name", NAMES)
def test_equal_volumes_are_at_distance_zero(losses, name):
    image = torch.rand(SHAPE)
    assert losses[name](image.clone(), image).item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_goes_to_the_reconstruction_alone(losses, name, pair):
    reconstruction, image = pair
    loss = losses[name](reconstruction, image)
    loss.backward()
    assert loss.shape == () and loss.item() > 0
    assert reconstruction.grad.isfinite().all() and reconstruction.grad.any()
    assert image.grad is None
    assert all(p.grad is None and not p.requires_grad for p in losses[name]._frozen[0].parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [0, 0.01])
def test_an_empty_crop_gives_finite_gradients(losses, name, noise):
    reconstruction = (noise * torch.randn(SHAPE)).requires_grad_(True)
    loss = losses[name](reconstruction, torch.zeros(SHAPE))
    loss.backward()
    assert loss.isfinite() and reconstruction.grad.isfinite().all()


@pytest.mark.parametrize("name", ["medicalnet", "segmenter", "segmenter, plain"])
def test_a_batch_is_the_mean_of_its_samples(losses, name, pair):
    reconstruction, image = pair
    apart = torch.stack([losses[name](reconstruction[i : i + 1], image[i : i + 1]) for i in range(2)])
    assert losses[name](reconstruction, image).item() == pytest.approx(apart.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(losses, name, pair):
    torch.manual_seed(3)
    expected = losses[name](*pair)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses[name](*pair), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_optimiser_and_no_checkpoint_holds_the_network(losses, name):
    assert not list(losses[name].parameters())
    assert not losses[name].state_dict()


def test_the_network_stays_in_eval_mode_whoever_calls_train(segmenter, pair):
    loss = segmenter_perceptual(segmenter.eval())
    expected = loss(*pair)
    loss.train()
    segmenter.train()
    assert torch.equal(loss(*pair), expected)  # with its dropout on, no two calls would agree


def test_the_network_it_was_made_from_is_left_trainable(segmenter):
    segmenter_perceptual(segmenter)
    assert all(parameter.requires_grad for parameter in segmenter.parameters())


# Known answers


def test_scaled_features_give_the_scaled_l1(pair):
    l1 = (pair[0] - pair[1]).abs().mean().item()
    assert plain(scaling(2.0))(*pair).item() == pytest.approx(2 * l1, rel=1e-5)


def test_the_stages_follow_each_other_and_are_averaged(pair):
    l1 = (pair[0] - pair[1]).abs().mean().item()
    assert plain(scaling(2.0), scaling(3.0))(*pair).item() == pytest.approx((2 + 6) / 2 * l1, rel=1e-5)


def test_opposite_and_orthogonal_directions_are_at_distance_4_and_2():
    real = torch.zeros(1, 2, 4, 4, 4)
    real[:, 0] = 3
    distance = FeatureDistance([nn.Identity()])
    shrunk = 1 / (1 + module.UNIT_FLOOR)
    assert distance(-real, real).item() == pytest.approx(4 * shrunk, rel=1e-4)
    assert distance(real.flip(1), real).item() == pytest.approx(2 * shrunk, rel=1e-4)


def test_a_unit_lengths_distance_ignores_the_features_unit(pair):
    near, far = (FeatureDistance([scaling(factor, in_channels=2)]) for factor in (1.0, 50.0))
    assert near(*pair).item() == pytest.approx(far(*pair).item(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"slice_fraction": 1.0}])
def test_patch_size_and_number_of_modalities_leave_it_alone(pair, settings):
    loss = plain(scaling(2.0, 2 if settings else 3), **settings)
    expected = loss(*pair).item()
    assert loss(*(x.repeat(1, 1, 2, 1, 3) for x in pair)).item() == pytest.approx(expected, rel=1e-5)
    assert loss(*(x.repeat(1, 2, 1, 1, 1) for x in pair)).item() == pytest.approx(expected, rel=1e-5)


def test_modalities_in_another_order_give_the_same(losses, pair):
    flipped = losses["medicalnet"](*(x.flip(1) for x in pair)).item()
    assert losses["medicalnet"](*pair).item() == pytest.approx(flipped, rel=1e-5)


def test_a_modality_is_seen_by_itself(losses, pair):
    reconstruction, image = pair
    both = losses["medicalnet"](reconstruction, image)
    apart = [losses["medicalnet"](reconstruction[:, i : i + 1], image[:, i : i + 1]) for i in range(2)]
    assert both.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-5)


def test_medicalnet_sees_a_shift_in_brightness(losses):
    image = torch.rand(SHAPE)
    assert losses["medicalnet"](image + 0.2, image) > 0.01


def test_standardising_gives_the_real_volume_mean_0_and_std_1():
    image = 5 + 3 * torch.randn(2, 1, 16, 16, 16)
    standard = module._standardised(image, image)
    assert standard[1].mean().item() == pytest.approx(0, abs=1e-4)
    assert standard[1].std().item() == pytest.approx(1, abs=1e-3)


def test_three_channels_are_in_the_range_the_network_was_shown():
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    symmetric = module._three_channels(x, x, module.SYMMETRIC)
    assert symmetric.tolist() == [[[[-1, 1]]] * 3]
    imagenet = module._three_channels(x, x, module.IMAGENET)[0, :, 0, 0]
    torch.testing.assert_close(imagenet, torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-4)


# Slices


def test_all_slices_of_three_planes_give_the_whole_volumes_l1(pair):
    l1 = (pair[0] - pair[1]).abs().mean().item()
    assert plain(scaling(2.0, 2), slice_fraction=1.0)(*pair).item() == pytest.approx(2 * l1, rel=1e-5)


def test_each_plane_gives_its_share_of_slices():
    seen = []
    loss = plain(nn.Identity(), slice_fraction=0.25)
    loss.prepare = lambda x, image: seen.append(tuple(x.shape)) or x
    loss(torch.rand(SHAPE), torch.rand(SHAPE))
    b = SHAPE[0] * SHAPE[1]
    assert seen[::2] == [(b * 4, 1, 12, 8), (b * 3, 1, 16, 8), (b * 2, 1, 16, 12)]


def test_both_volumes_are_cut_at_the_same_places():
    image = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 1, 16, 4, 4)
    assert plain(nn.Identity(), slice_fraction=0.3)(image.clone(), image) == 0


def test_the_generator_decides_the_slices(pair):
    values = [
        plain(scaling(1.0, 2), slice_fraction=0.1, generator=torch.Generator().manual_seed(seed))(*pair).item()
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_the_runs_seed_decides_the_slices_without_a_generator(pair):
    loss, values = plain(scaling(1.0, 2), slice_fraction=0.1), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(loss(*pair).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5])
def test_a_share_of_slices_outside_0_to_1_is_refused(fraction):
    with pytest.raises(InputError, match="slice_fraction"):
        plain(nn.Identity(), slice_fraction=fraction)


# Settings


def test_slices_of_a_3d_network_are_refused(files):
    with pytest.raises(InputError, match=r"medicalnet_resnet10 sees whole volumes; leave slice_fraction"):
        pretrained_perceptual(files / "medicalnet.pth", slice_fraction=0.5)


@pytest.mark.parametrize("num_stages", [0, 6])
def test_a_number_of_stages_that_is_not_there_is_refused(files, num_stages):
    with pytest.raises(InputError, match="expected 1 to 5"):
        pretrained_perceptual(files / "medicalnet.pth", num_stages=num_stages)


def test_the_segmenters_encoder_is_what_counts(segmenter):
    stages = segmenter_perceptual(segmenter)._frozen[0].stages
    x, shapes = torch.rand(1, 2, 16, 16, 16), []
    for stage in stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 8, 8, 8), (8, 4, 4, 4), (8, 4, 4, 4)]


def test_a_segmenter_of_other_modalities_is_refused(segmenter):
    with pytest.raises(InputError, match="cannot take 4 modalities"):
        check_perceptual([16, 16, 16], segmenter_perceptual(segmenter), 4)


def test_a_crop_that_nothing_is_left_of_is_refused():
    with pytest.raises(InputError, match=r"\[4, 4, 4\] voxels"):
        check_perceptual([4, 4, 4], plain(nn.Conv3d(1, 1, 5)), 2)


def test_a_crop_that_fits_and_no_perceptual_loss_pass(segmenter):
    check_perceptual([16, 16, 16], segmenter_perceptual(segmenter), 2)
    check_perceptual([4, 4, 4], None, 2)


# MONAI's PerceptualLoss


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub cache, and packages that import."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for package in ("torchvision", "lpips"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("package", ["torchvision", "lpips"])
def test_a_missing_package_is_named(hub, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"^{package} does not import .*Install them, or use another") as refused:
        monai_perceptual("alex")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named_with_its_place(hub):
    with pytest.raises(InputError) as refused:
        monai_perceptual("vgg")
    file = "vgg16-397923af.pth"
    assert str(refused.value) == (
        f"there is no file {hub / file}; get https://download.pytorch.org/models/{file} and put it there."
    )


def test_a_cached_file_with_code_is_refused(hub):
    torch.save({"weight": partial(print, "gotcha")}, hub / "alexnet-owt-7be5be79.pth")
    with pytest.raises(InputError, match="would run code"):
        monai_perceptual("alex")


@pytest.mark.parametrize("name", ["medicalnet_resnet10_23datasets", "radimagenet_resnet50"])
def test_types_that_run_downloaded_code_are_refused(name):
    with pytest.raises(InputError, match=r"run downloaded code; use latdiff3d\.perceptual\.pretrained_perceptual"):
        monai_perceptual(name)


@pytest.mark.parametrize(("name", "channels", "lowest"), [("alex", 3, -1), ("resnet50", 1, 0)])
def test_monais_loss_is_given_slices_in_its_range(hub, monkeypatch, name, channels, lowest):
    seen = []

    class Recorder(nn.Module):
        def __init__(self, spatial_dims, network_type):
            super().__init__()
            assert (spatial_dims, network_type) == (2, name)

        def forward(self, x, real):
            seen.append((tuple(x.shape[1:]), x.min().item(), real.max().item()))
            return (x - real).abs().mean()

    monkeypatch.setattr(module, "PerceptualLoss", Recorder)
    torch.save({"weight": torch.ones(1)}, hub / module.HUB_FILES[name])
    monai_perceptual(name)(torch.zeros(SHAPE), torch.ones(SHAPE))
    assert seen == [((channels, *plane), lowest, 1) for plane in ((12, 8), (16, 8), (16, 12))]
