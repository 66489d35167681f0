"""One update from a group of batches: the gradient of one batch as large, counted, nothing left over, or lost."""

import math
import shutil
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import refused, run_here, train_here
from ignite.engine import Engine, Events
from test_runs import Stopped, assert_same, loaded, raising, without_seconds
from test_training import LATENTS, autoencoder_step, denoiser, schedule, volumes
from torch import nn

from latdiff3d import checkpoints, training
from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import NoCondition
from latdiff3d.errors import InputError
from latdiff3d.handlers import EMA, LrSchedule, read_metrics
from latdiff3d.losses import adaptive_weight
from latdiff3d.objectives import Epsilon
from latdiff3d.training import DiffusionStep
from latdiff3d.updates import MIN_SCALE, Group, LossScaler, group_of, num_updates, update

NUM = 4
CPU = torch.device("cpu")


def engine_at(iteration, epoch_length=NUM):
    return SimpleNamespace(state=SimpleNamespace(iteration=iteration, epoch_length=epoch_length))


# Groups


def test_a_group_ends_with_its_epoch():
    groups = [group_of(engine_at(iteration, 5), 2) for iteration in range(1, 11)]
    assert [group.number for group in groups] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    assert [group.size for group in groups] == [2, 2, 2, 2, 1] * 2
    assert [group.is_first for group in groups] == [True, False, True, False, True] * 2
    assert [group.is_last for group in groups] == [False, True, False, True, True] * 2
    assert num_updates(2, 5, 2) == 6


@pytest.mark.parametrize("iteration", [1, 2, 7])
def test_without_accumulation_each_batch_is_an_update(iteration):
    assert group_of(engine_at(iteration, 5), 1) == Group(iteration, 1, True, True)
    assert num_updates(3, 5, 1) == 15


def test_a_group_larger_than_an_epoch_is_refused():
    with pytest.raises(InputError, match=r"accumulate_grad_batches is 6, an epoch has 5 batch\(es\); expected at most"):
        num_updates(2, 5, 6)


# Gradients


class Linear(nn.Linear):
    """One weight, at 1, whose gradient is what it is given."""

    def __init__(self):
        super().__init__(1, 1, bias=False)
        self.weight.data.fill_(1.0)


def moved(gradients, accumulate=1, max_grad_norm=math.inf, precision="fp32"):
    """The weight after each batch of an epoch whose losses have these `gradients`, at a learning rate of 1."""
    network = Linear()
    optimizer, weights, scaler = torch.optim.SGD(network.parameters(), lr=1.0), [], LossScaler(CPU, precision)
    for iteration, gradient in enumerate(gradients, start=1):
        group = group_of(engine_at(iteration, len(gradients)), accumulate)
        update(gradient * network.weight.sum(), network, optimizer, max_grad_norm, group, scaler)
        weights.append(network.weight.item())
    return weights


def test_the_step_is_down_the_mean_and_the_rest_is_a_mean_of_its_own():
    assert moved([1.0, 3.0, 5.0, 5.0, 7.0], accumulate=2) == [1.0, -1.0, -1.0, -6.0, -13.0]


def test_the_accumulated_gradient_is_clipped_and_not_its_parts():
    weights = moved([-3.0, 3.0, 8.0, 0.0], accumulate=2, max_grad_norm=2.0)
    assert weights == pytest.approx([1.0, 1.0, 1.0, -1.0], abs=1e-5)


def kept(network):
    """An optimiser that moves nothing, so that gradients can be read."""
    return torch.optim.SGD(network.parameters(), lr=0.0)


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def stage_1_gradients(batches, **settings):
    """Both networks' gradients after one update from `batches` of numbered volumes."""
    loss = {"kl_weight": 0.1, "spectrum_weight": 0.2, "disc_weight": 0.3, "feature_matching_weight": 0.2}
    step = autoencoder_step(disc_start=1, disc_warmup=0, **loss, **settings)
    step.optimizer, step.discriminator_optimizer = kept(step.autoencoder), kept(step.discriminator)
    step.max_grad_norm, step.accumulate_grad_batches = math.inf, len(batches)
    noise = torch.randn(NUM, LATENTS, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    all_volumes = volumes(NUM)
    all_volumes["valid"][:, :, :6] = 0
    for iteration, numbers in enumerate(batches, start=1):
        step.autoencoder.sampling = lambda mean, std, noise=noise[numbers]: mean + std * noise
        step(engine_at(iteration), {name: all_volumes[name][numbers] for name in ("image", "valid")})
    return gradient(step.autoencoder), gradient(step.discriminator)


ONE_BY_ONE = [[number] for number in range(NUM)]


def assert_near(gradients, expected):
    for own, other in zip(gradients, expected, strict=True):
        assert other.norm() > 0
        assert (own - other).norm() <= 1e-5 * other.norm()


def test_stage_1s_gradients_are_those_of_one_batch_as_large():
    joint = stage_1_gradients([list(range(NUM))], adaptive_weight=False)
    assert_near(stage_1_gradients(ONE_BY_ONE, adaptive_weight=False), joint)


def test_the_adaptive_weight_is_each_batchs_own():
    alone = [stage_1_gradients([numbers]) for numbers in ONE_BY_ONE]
    means = [torch.stack(parts).mean(0) for parts in zip(*alone, strict=True)]
    assert_near(stage_1_gradients(ONE_BY_ONE), means)


def stage_2_gradient(accumulate):
    network = denoiser(0)
    nn.init.normal_(network.out[-1].conv.weight, std=0.1)  # at the 0 that it starts from, the others have no gradient
    generator = torch.Generator().manual_seed(3)
    latents, std, posterior, noise = torch.randn(4, NUM, LATENTS, 8, 8, 8, generator=generator).unbind()
    times = torch.tensor([20, 310, 640, 970])
    codec = LatentCodec(nn.Identity(), LATENTS)
    step = DiffusionStep(
        network, codec, NoCondition(), schedule(), Epsilon(), kept(network), CPU, "fp32",
        max_grad_norm=math.inf, min_snr_gamma=5.0, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    for iteration in range(accumulate):
        share = slice(None) if accumulate == 1 else slice(iteration, iteration + 1)
        step.schedule.draw = lambda num, distribution, device, share=share: times[share]
        draws = iter([posterior[share], noise[share]])
        with mock.patch.object(torch, "randn_like", lambda like, draws=draws: next(draws)):
            step(engine_at(iteration + 1), {"mean": latents[share], "std": std[share].abs()})
    return gradient(network)


def test_stage_2s_gradient_is_that_of_one_batch_as_large():
    assert_near([stage_2_gradient(NUM)], [stage_2_gradient(1)])


# What counts updates


def test_the_discriminators_start_counts_updates():
    step = autoencoder_step(disc_start=3, disc_warmup=1)
    step.accumulate_grad_batches = 2
    terms = [set(step(engine_at(iteration, 3), volumes(1))) for iteration in range(1, 7)]
    assert ["discriminator" in one for one in terms] == [False, False, True, True, True, True]
    assert ["adversarial" in one for one in terms] == [False, False, False, True, True, True]


@pytest.mark.parametrize("stopped_after", [0, 1, 2])
def test_the_learning_rate_and_the_average_count_updates_and_go_on_after_a_resume(stopped_after):
    def engine_of(iteration):
        """Return an engine of 5 batches and 3 updates an epoch, after `iteration`, and what it goes through."""
        model, seen = nn.Linear(1, 1), []
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: number)
        engine = Engine(lambda engine, batch: None)
        LrSchedule(scheduler, 2).attach(engine)
        EMA(model, momentum=0.01, momentum_warmup=0.5, warmup_iters=6, accumulate_grad_batches=2).attach(engine)
        optimizer.step()
        scheduler.last_epoch = iteration // 5 * 3
        engine.load_state_dict({"iteration": iteration, "max_epochs": 3, "epoch_length": 5})

        @engine.on(Events.ITERATION_COMPLETED)
        def note(engine):
            averaged = group_of(engine, 2).is_last
            seen.append((scheduler.last_epoch, engine.state.ema_momentum if averaged else None))

        engine.run(range(5))
        return seen

    whole = engine_of(0)
    assert [updates for updates, _ in whole] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    momenta = [momentum for _, momentum in whole if momentum]
    assert momenta[0] == 0.5 and momenta[5:] == pytest.approx([0.01] * 4)
    assert all(one > other for one, other in pairwise(momenta[:6]))
    assert engine_of(5 * stopped_after) == whole[5 * stopped_after :]


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_stopped_run_with_a_rest_in_its_epochs_goes_on_as_if_it_had_not_been(
    phantoms, tiny_runs, tmp_path, monkeypatch, stage
):
    settings = {"batch_size": 1, "accumulate_grad_batches": 3}  # of 4 batches, so 2 updates an epoch
    step = training.DiffusionStep if stage == "diffusion" else training.AutoencoderStep
    if stage == "diffusion":
        settings["first_stage"] = str(tiny_runs.autoencoder)
    whole = train_here(stage, phantoms, tmp_path / "whole", "run", **settings)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(step, "__call__", raising(6, step.__call__))
        with pytest.raises(RuntimeError) as stopped:
            train_here(stage, phantoms, tmp_path / "stopped", "run", **settings)
    assert isinstance(stopped.value.__cause__, Stopped) or "Stopped" in repr(stopped.getrepr())
    again = train_here(stage, phantoms, tmp_path / "stopped", "run", **settings)
    assert again.code == 0, again.err
    one, other = (loaded(tmp_path / name / "run", "last") for name in ("whole", "stopped"))
    assert_same(one["objects"], other["objects"])
    assert one["objects"]["lr_scheduler"]["last_epoch"] == 4
    assert {int(state["step"]) for state in one["objects"]["optimizer"]["state"].values()} == {4}
    assert without_seconds(tmp_path / "whole" / "run") == without_seconds(tmp_path / "stopped" / "run")


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_other_numbers_of_batches_are_refused(phantoms, tmp_path, value):
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", accumulate_grad_batches=value))
    assert f"accumulate_grad_batches is {value!r}; expected a whole number of batches from 1 on" in line


def test_more_batches_than_an_epoch_has_are_refused(phantoms, tmp_path):
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", accumulate_grad_batches=3))
    assert "accumulate_grad_batches is 3, an epoch has 2 batch(es)" in line
    assert not (tmp_path / "x").exists()


# In float16

TOO_LARGE = 1e35  # for float32, once it is scaled by 65536


def fp16():
    """Return a network of one weight, its optimiser and its scaler."""
    network = Linear()
    return network, torch.optim.SGD(network.parameters(), lr=1.0), LossScaler(CPU, "fp16")


def test_the_scale_changes_no_update_and_none_is_clipped_by_it():
    assert moved([1.0, 3.0, 5.0, 5.0, 7.0], accumulate=2, precision="fp16") == [1.0, -1.0, -1.0, -6.0, -13.0]
    weights = moved([-3.0, 3.0, 8.0, 0.0], accumulate=2, max_grad_norm=2.0, precision="fp16")
    assert weights == pytest.approx([1.0, 1.0, 1.0, -1.0], abs=1e-5)


def test_an_update_that_overflows_is_skipped_and_said_and_the_scale_falls():
    network, optimizer, scaler = fp16()
    group, seen = Group(1, 1, True, True), []
    for size in (1.0, TOO_LARGE, 1.0):
        update(size * network.weight.sum(), network, optimizer, math.inf, group, scaler)
        seen.append((network.weight.item(), scaler.logged()))
    assert [weight for weight, _ in seen] == [0.0, 0.0, -1.0]
    assert [logged["loss_scale"] for _, logged in seen] == [65536.0, 32768.0, 32768.0]
    assert [logged["skipped_updates"] for _, logged in seen] == [0.0, 1.0, 0.0]
    assert LossScaler(CPU, "bf16").logged() == {} == LossScaler(CPU, "fp32").logged("discriminator_")


def test_gradients_that_overflow_at_any_scale_stop_the_run():
    network, optimizer, scaler = fp16()
    with pytest.raises(InputError, match=r"overflow float16 at any scale at .*, the loss being 0; set"):
        for _ in range(40):
            loss = (0 * network.weight).sqrt().sum()  # 0, and its gradient is none
            update(loss, network, optimizer, math.inf, Group(1, 1, True, True), scaler)
    assert scaler.get_scale() == MIN_SCALE / 2 and network.weight.item() == 1.0


def test_a_loss_that_is_no_number_is_no_overflow():
    network, optimizer, scaler = fp16()
    with pytest.raises(InputError, match="loss of Linear became nan"):
        update(math.nan * network.weight.sum(), network, optimizer, math.inf, Group(1, 1, True, True), scaler)
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_adaptive_weight_loses_nothing_to_float16(kind):
    torch.manual_seed(0)
    layer = nn.Conv3d(2, 1, 1, bias=False)
    features, image = torch.rand(1, 2, 96, 96, 96), torch.rand(1, 1, 96, 96, 96)

    def weight(scale=1.0, enabled=True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            shown = layer(features).float()
        error = shown - image
        loss = error.abs().mean() if kind == "l1" else error.square().mean()
        loss = loss / 40  # as of 40 times as many voxels, 35 million, of which each has its share of the gradient
        return adaptive_weight(loss, -shown[..., ::8].mean(), layer.weight, scale).item()

    exact = weight(enabled=False)
    assert weight(65536.0) == pytest.approx(exact, rel=0.005)
    assert weight(2.0**60) == pytest.approx(exact, rel=0.005)  # overflows, and is looked at again less enlarged
    assert abs(weight() / exact - 1) > 0.03  # what would be lost


def test_stage_1_in_float16_trains_logs_its_scales_and_goes_on_exactly(phantoms, tmp_path, monkeypatch):
    settings = {"precision": "fp16", "max_epochs": 3, "val_interval": 3}
    whole = train_here("autoencoder", phantoms, tmp_path / "whole", "run", **settings)
    assert whole.code == 0, whole.err
    step = training.AutoencoderStep
    with monkeypatch.context() as patch:
        patch.setattr(step, "__call__", raising(5, step.__call__))
        with pytest.raises(RuntimeError):
            train_here("autoencoder", phantoms, tmp_path / "stopped", "run", **settings)
    again = train_here("autoencoder", phantoms, tmp_path / "stopped", "run", **settings)
    assert again.code == 0, again.err
    one, other = (loaded(tmp_path / name / "run", "last")["objects"] for name in ("whole", "stopped"))
    assert_same(one, other)
    assert one["scaler"]["_growth_tracker"] + one["discriminator_scaler"]["_growth_tracker"] > 0
    rows = read_metrics(tmp_path / "whole" / "run" / "metrics.csv")
    assert {"train_loss_scale", "train_skipped_updates", "train_discriminator_loss_scale"} <= set(rows[-1])
    assert float(rows[-1]["val_psnr"]) > 0


def test_a_run_of_another_precision_goes_on_in_float16(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs.autoencoder, tmp_path / "first")
    last = tmp_path / "first" / "checkpoints" / "last.pt"
    content = checkpoints.load(last)
    assert content["objects"].pop("scaler") == {} == content["objects"].pop("discriminator_scaler")  # as older ones
    checkpoints.save(last, content)
    again = run_here("train", "autoencoder", "-r", tmp_path / "first", "max_epochs=3", "precision=fp16")
    assert again.code == 0, again.err
    assert loaded(tmp_path / "first", "last")["objects"]["scaler"]["scale"] > 0
