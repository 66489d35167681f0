"""The reference segmenter: what it learns, how it is measured, and that no teacher is a judge."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, refused, train_here
from monai.networks.nets import UNet
from test_runs import assert_same, loaded, raising, without_seconds
from torch.nn import functional as F

from latdiff3d import checkpoints, config, segmentation
from latdiff3d.errors import InputError
from latdiff3d.handlers import read_metrics
from latdiff3d.segmentation import (
    SegmenterStep,
    SegmenterValidation,
    encoder_features,
    load_judge,
    load_segmenter,
    seed_for,
    segmentation_terms,
    teacher_note,
)

CPU = torch.device("cpu")
CLASSES = 3


def engine_at(iteration):
    return SimpleNamespace(state=SimpleNamespace(iteration=iteration))


def volumes(count=1, size=16):
    """Two nested balls a volume, label 2 in label 1, brighter inside, under noise."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(size, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centres = size / 2 + torch.randint(-2, 3, (count, 3, 1, 1, 1), generator=generator)
    distance = (grid - centres).norm(dim=1, keepdim=True)  # (B, 1, D, H, W)
    mask = (distance < 0.35 * size).float() + (distance < 0.2 * size).float()
    image = 0.2 + 0.3 * mask + 0.05 * torch.randn(mask.shape, generator=generator)
    return {"image": image.clamp(0, 1), "mask": mask, "valid": torch.ones_like(mask)}


def padded(batch, size=4, **fill):
    """Append `size` slices of padding to each tensor, filled with 0 or as named."""
    return {k: F.pad(v, (0, 0, 0, 0, 0, size), value=fill.get(k, 0.0)) for k, v in batch.items()}


def network():
    torch.manual_seed(0)
    return UNet(3, 1, CLASSES, channels=(8, 16), strides=(2,), num_res_units=1)


def step(precision="fp32"):
    segmenter = network()
    return SegmenterStep(segmenter, torch.optim.Adam(segmenter.parameters(), 1e-2), CPU, precision)


# What it sees


def test_features_are_means_and_deviations_over_a_volumes_own_voxels():
    torch.manual_seed(0)
    segmenter = UNet(3, 1, CLASSES, channels=(8, 16), strides=(2,), num_res_units=1, norm="batch").eval()
    batch = volumes(2)
    features = encoder_features(segmenter, batch["image"], batch["valid"])
    stage = segmenter.model[0](batch["image"])
    assert features.shape == (2, 2 * (8 + 16))
    assert torch.allclose(features[:, :8], stage.mean((2, 3, 4)), atol=1e-5)
    assert torch.allclose(features[:, 8:16], stage.std((2, 3, 4), correction=0), atol=1e-5)
    alone = encoder_features(segmenter, batch["image"][1:], batch["valid"][1:])[0]
    assert torch.allclose(alone, features[1], atol=1e-5)
    more = padded(batch, 16, image=1.0)
    apart = encoder_features(segmenter, more["image"], more["valid"]) - features  # by their border alone
    whole = encoder_features(segmenter, more["image"], torch.ones_like(more["valid"])) - features
    assert apart.abs().mean() < 0.2 * whole.abs().mean()


# The loss


def test_a_sure_and_right_answer_costs_nothing_and_no_answer_the_logarithm_of_the_classes():
    batch = volumes(2)
    one_hot = F.one_hot(batch["mask"][:, 0].long(), CLASSES).movedim(-1, 1).float()
    right = segmentation_terms(100 * one_hot, batch["mask"], batch["valid"])
    assert all(term.item() == pytest.approx(0, abs=1e-6) for term in right.values())
    undecided = segmentation_terms(torch.zeros_like(one_hot), batch["mask"], batch["valid"])
    assert undecided["cross_entropy"].item() == pytest.approx(math.log(CLASSES), abs=1e-5)
    wrong = segmentation_terms(100 * one_hot.roll(1, dims=1), batch["mask"], batch["valid"])
    assert wrong["dice_loss"].item() == pytest.approx(1, abs=1e-4)


def test_padding_costs_nothing_and_pulls_at_nothing():
    batch = volumes(2)
    logits = torch.randn(2, CLASSES, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    alone = segmentation_terms(logits, batch["mask"], batch["valid"])
    extended = padded({**batch, "logits": logits}, logits=7.0, mask=1.0)
    free = extended["logits"].requires_grad_()
    again = segmentation_terms(free, extended["mask"], extended["valid"])
    for name, term in alone.items():
        assert again[name].item() == pytest.approx(term.item(), rel=1e-5), name
    sum(again.values()).backward()
    assert free.grad[:, :, :16].abs().sum() > 0 and not free.grad[:, :, 16:].any()


def test_a_batch_costs_the_mean_of_its_volumes_however_much_of_each_is_padding():
    batch = volumes(2)
    batch["valid"][0, :, 6:] = 0
    logits = torch.randn(2, CLASSES, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    both = segmentation_terms(logits, batch["mask"], batch["valid"])
    each = [segmentation_terms(*(t[k : k + 1] for t in (logits, batch["mask"], batch["valid"]))) for k in (0, 1)]
    for name, term in both.items():
        assert term.item() == pytest.approx((each[0][name] + each[1][name]).item() / 2, rel=1e-5)


# The step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_a_volume_by_heart(precision):
    one, batch = step(precision), volumes()
    validation = SegmenterValidation(one.segmenter, CLASSES, CPU, precision)
    assert validation(engine_at(1), batch)["dice"].min() < 0.5
    terms = [one(engine_at(1), batch) for _ in range(40)]
    losses = [one["dice_loss"] + one["cross_entropy"] for one in terms]
    assert losses[-1] < 0.3 * losses[0]
    assert validation(engine_at(1), batch)["dice"].shape == (1, 2)
    assert validation(engine_at(1), batch)["dice"].min() > 0.8


def test_what_the_mask_says_of_padding_changes_no_update():
    weights = []
    for label in (0.0, 2.0):
        one = step()
        one(engine_at(1), padded(volumes(), mask=label))
        weights.append(one.segmenter.state_dict())
    assert_same(*weights)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_lost():
    one, batch = step(), volumes()
    batch["image"][0, 0, 0, 0, 0] = math.nan
    before = {name: weight.clone() for name, weight in one.segmenter.state_dict().items()}
    with pytest.raises(InputError, match=r"loss of UNet became nan at step 1.*; lower learning_rate"):
        one(engine_at(1), batch)
    assert_same(before, dict(one.segmenter.state_dict()))


# Purposes


def test_each_purpose_has_seeds_of_its_own():
    seeds = [seed_for(purpose, seed) for purpose in ("training", "evaluation") for seed in range(3)]
    assert len(set(seeds)) == 6 and seeds[0] == seed_for("training", 0)
    with pytest.raises(InputError, match="purpose is 'fun'; expected 'training' or 'evaluation'"):
        seed_for("fun", 0)


def test_the_two_purposes_begin_from_other_weights_under_one_seed(tmp_path):
    def initial(purpose):
        settings = {**TINY["segmenter"], "purpose": purpose}
        parser = config.training_workflow([], settings, "segmenter").parser
        return parser.get_parsed_content("segmenter_def").state_dict()

    training, again, evaluation = initial("training"), initial("training"), initial("evaluation")
    assert_same(training, again)
    assert not any(torch.equal(training[key], evaluation[key]) for key in training if key.endswith("conv.weight"))


@pytest.fixture(scope="module")
def teacher(phantoms, tmp_path_factory):
    """A tiny segmenter for training, and what its run printed; not to be written to."""
    logdir = tmp_path_factory.mktemp("teacher")
    ended = train_here("segmenter", phantoms, logdir, "teacher")
    assert ended.code == 0, ended.err
    return SimpleNamespace(run=logdir / "teacher", out=ended.out)


def model_taught_by(segmenter):
    """What matters here of the checkpoint of a model; `segmenter` is a run, or None."""
    return {"stage": "autoencoder", "notes": teacher_note(str(segmenter or ""))}


def test_a_teacher_is_no_judge_and_a_judge_no_teacher(teacher, judge):
    with pytest.raises(InputError, match=r"is a segmenter for training; expected one for evaluation, .*purpose=eval"):
        load_judge(teacher.run, [model_taught_by(None)])
    with pytest.raises(InputError, match=r"is a segmenter for evaluation; expected one for training, .*purpose=train"):
        load_segmenter(judge)


def test_stage_1_learns_from_a_teacher_and_notes_it(phantoms, teacher, tmp_path):
    settings = {"segmenter": str(teacher.run), "loss__perceptual_weight": 0.1, "max_epochs": 1}
    ended = train_here("autoencoder", phantoms, tmp_path, "taught", **settings)
    assert ended.code == 0, ended.err
    assert loaded(tmp_path / "taught")["notes"] == model_taught_by(teacher.run)["notes"]
    [row] = read_metrics(tmp_path / "taught" / "metrics.csv")
    assert float(row["train_weighted_perceptual"]) == pytest.approx(0.1 * float(row["train_perceptual"]), rel=1e-5)
    line = refused(train_here("autoencoder", phantoms, tmp_path, "deaf", segmenter=str(teacher.run)))
    assert "there is a perceptual network; give both or neither" in line


def test_what_a_segmenter_has_taught_it_does_not_judge(teacher, judge, tmp_path):
    copied = shutil.copy(judge / "checkpoints" / "best.pt", tmp_path / "another_name.pt")
    for place in (judge, copied):
        with pytest.raises(InputError, match=r"taught the model that it is to judge; measure with another"):
            load_judge(place, [model_taught_by(None), model_taught_by(judge)])
    weights = load_judge(judge, [model_taught_by(None), model_taught_by(teacher.run)]).state_dict()
    assert_same(weights, loaded(judge)["objects"]["segmenter"])


def test_a_perceptual_term_looks_through_a_teachers_encoder_and_through_no_judges(teacher, judge):
    term = segmentation.teacher(str(teacher.run), {"modalities": ["flair", "t1", "t1ce", "t2"]})
    image = torch.rand(1, 4, 16, 16, 16)
    assert term(image, image).item() == 0 and term(1 - image, image).item() > 0
    with pytest.raises(InputError, match="for evaluation; expected one for training"):
        segmentation.teacher(str(judge), {})
    assert segmentation.teacher("", {}) is None and teacher_note("") == {}


def test_a_segmenter_without_an_encoder_to_look_through_is_told(teacher, tmp_path):
    content = checkpoints.load(teacher.run / "checkpoints" / "best.pt")
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 4, "out_channels": 4, "kernel_size": 1}
    text = config.as_yaml({**yaml.safe_load(content["config"]), "segmenter_def": network})
    weights = {"segmenter": torch.nn.Conv3d(4, 4, 1).state_dict()}
    checkpoints.save(tmp_path / "other.pt", {**content, "config": text, "objects": weights})
    with pytest.raises(InputError, match=r"other\.pt is a Conv3d; expected a UNet"):
        segmentation.teacher(str(tmp_path / "other.pt"), {})


# Runs


def test_a_run_ends_with_its_dice_and_keeps_that_of_each_label(teacher):
    assert teacher.out.strip().endswith(f" segmenter={teacher.run} loss.perceptual_weight=0.05")
    assert "Stage 'segmenter' is trained: 2 epochs, 4 steps" in teacher.out and ": Dice 0." in teacher.out
    assert loaded(teacher.run)["notes"]["purpose"] == "training"
    rows = read_metrics(teacher.run / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert float(row["train_dice_loss"]) > 0 and float(row["train_cross_entropy"]) > 0
        of_labels = [float(row[f"val_dice_{label}"]) for label in (1, 2, 4)]
        assert float(row["val_dice"]) == pytest.approx(sum(of_labels) / 3, abs=1e-6)


def test_a_loaded_segmenter_is_frozen_and_gives_logits(teacher):
    network = load_segmenter(teacher.run, settings={"modalities": ["flair", "t1", "t1ce", "t2"]})
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert_same(network.state_dict(), loaded(teacher.run)["objects"]["segmenter"])
    assert network(torch.rand(2, 4, 16, 16, 16)).shape == (2, 4, 16, 16, 16)


def test_loading_draws_nothing_from_the_global_generator(teacher):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_segmenter(teacher.run)
    assert torch.equal(torch.rand(3), expected)


def test_a_segmenter_of_other_channels_is_refused(teacher):
    with pytest.raises(InputError, match=r"trained with modalities \['flair', .*, this run has \['t1'\]; use the same"):
        load_segmenter(teacher.run, settings={"modalities": ["t1"]})


def test_another_stages_checkpoint_is_no_segmenter_and_a_segmenter_no_other_stages(teacher, phantoms, tmp_path):
    last = teacher.run / "checkpoints" / "last.pt"
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", resume=str(last)))
    assert "of stage 'segmenter'; expected one of stage 'autoencoder'" in line
    checkpoints.save(tmp_path / "other.pt", {**checkpoints.load(last), "stage": "autoencoder"})
    line = refused(train_here("segmenter", phantoms, tmp_path, "x", resume=str(tmp_path / "other.pt")))
    assert "of stage 'autoencoder'; expected one of stage 'segmenter'" in line
    with pytest.raises(InputError, match="of stage 'autoencoder'; expected one of stage 'segmenter'"):
        load_segmenter(tmp_path / "other.pt")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(phantoms, teacher, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SegmenterStep, "__call__", raising(4, SegmenterStep.__call__))
        with pytest.raises(RuntimeError):
            train_here("segmenter", phantoms, tmp_path, "teacher")
    assert loaded(tmp_path / "teacher", "last")["epoch"] == 1
    again = train_here("segmenter", phantoms, tmp_path, "teacher")
    assert again.code == 0, again.err
    for which in ("best", "last"):
        assert_same(loaded(tmp_path / "teacher", which)["objects"], loaded(teacher.run, which)["objects"])
    assert without_seconds(tmp_path / "teacher") == without_seconds(teacher.run)


def test_cases_without_masks_are_refused_even_if_nothing_else_needs_them(phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data", ignore=shutil.ignore_patterns("*_seg.nii.gz"))
    line = refused(train_here("segmenter", data, tmp_path / "runs", "x", conditioning="none"))
    assert "seg.nii.gz" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_to": [16, 17, 16]}, "[16, 17, 16] is not divisible by 2 (the segmenter's 2); the nearest"),
        ({"purpose": "fun"}, "purpose is 'fun'; expected 'training' or 'evaluation'"),
        ({"segmenter_def__strides": []}, "UNet refuses its settings: the length of `strides` should equal"),
    ],
    ids=["crop", "purpose", "strides"],
)
def test_a_bad_setting_is_told_in_one_line(phantoms, tmp_path, settings, words):
    line = refused(train_here("segmenter", phantoms, tmp_path / "runs", "x", **settings))
    assert words in line
    assert not (tmp_path / "runs").exists()
