"""Runs from end to end, through every door: the same weights, gone on with after a kill, sampled from, refused."""

import csv
import math
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, as_words, refused, run_here, run_process, train_here
from PIL import Image

from latdiff3d import checkpoints, codec, config, runs, training
from latdiff3d.errors import InputError
from latdiff3d.handlers import read_metrics

LATDIFF3D = Path(sys.executable).parent / "latdiff3d"


def loaded(run, which="best"):
    return checkpoints.load(run / "checkpoints" / f"{which}.pt")


def assert_same(one, other, where=""):
    """Assert that two checkpoints' objects are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{k}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_seconds(run):
    rows = read_metrics(run / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in ("seconds", "data_wait")} for row in rows]


# One run, three doors


@pytest.fixture(scope="module")
def three_doors(phantoms, tmp_path_factory):
    """The tiny stage-1 run through each door, each in a process of its own."""
    logdir = tmp_path_factory.mktemp("doors")
    settings = TINY["autoencoder"]
    words = as_words(settings)
    bundle = config.DEFAULT_BUNDLE
    files = [str(file) for file in config.bundle_files(bundle, "autoencoder")]
    ended = {
        "main": run_process(
            "main.py", "--base", "configs/autoencoder.yaml", "-t", "--name", "main", "-l", logdir,
            f"dataset_dir={phantoms}", *words,
        ),
        "latdiff3d": run_process(
            LATDIFF3D, "train", "autoencoder", "--data", phantoms, "--name", "latdiff3d", "-l", logdir, *words
        ),
        "monai": run_process(
            "-m", "monai.bundle", "run", "training", "--bundle_root", bundle, "--config_file", files,
            "--dataset_dir", phantoms, "--name", "monai", "--logdir", logdir,
            *(word for key, value in settings.items() for word in (f"--{key}", value)),
        ),
    }  # fmt: skip
    for one in ended.values():
        assert one.code == 0, one.err
    return logdir, ended


@pytest.mark.parametrize("door", ["latdiff3d", "monai"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_every_door_trains_the_same_weights(three_doors, door, which):
    logdir, _ = three_doors
    assert_same(loaded(logdir / "main", which)["objects"], loaded(logdir / door, which)["objects"])


def test_a_run_in_a_process_of_its_own_is_the_run_made_here(three_doors, tiny_runs):
    assert_same(loaded(three_doors[0] / "main")["objects"], loaded(tiny_runs.autoencoder)["objects"])


def test_every_door_ends_with_what_was_reached_and_the_next_command(three_doors):
    logdir, ended = three_doors
    for name, one in ended.items():
        summary = one.out.strip().splitlines()[-4:]
        assert summary[0].startswith("Stage 'autoencoder' is trained: 2 epochs, 4 steps")
        assert "PSNR" in summary[0] and " dB" in summary[0]
        assert summary[1] == str(logdir / name / "checkpoints" / "best.pt")
        assert summary[2].startswith(f"{logdir / name / 'quality.html'}: PSNR ")
        assert summary[3].startswith("Next: latdiff3d train diffusion --data ")
        assert summary[3].endswith(f"first_stage={logdir / name}")


# The run's folder


def test_the_run_folder_holds_all_of_the_run(tiny_runs):
    for run, terms in (
        (tiny_runs.autoencoder, {"train_l1", "train_kl", "val_psnr", "val_l1"}),
        (tiny_runs.diffusion, {"train_loss", "val_loss"}),
    ):
        assert sorted(path.name for path in run.iterdir()) == [
            "checkpoints",
            "config.yaml",
            "metrics.csv",
            "previews",
            *(["quality.html", "quality.json"] if run == tiny_runs.autoencoder else []),
            "tensorboard",
        ]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.pt", "last-1.pt", "last.pt"]
        assert [path.name.split(".")[2] for path in (run / "tensorboard").iterdir()] == ["tfevents"]
        previews = sorted((run / "previews").iterdir())
        assert [path.name for path in previews] == ["epoch_0001.png", "epoch_0002.png"]
        assert min(Image.open(previews[0]).size) > 16
        rows = read_metrics(run / "metrics.csv")
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert [row["iteration"] for row in rows] == (["2", "4"] if run == tiny_runs.autoencoder else ["1", "2"])
        for row in rows:
            assert terms | {"seconds", "data_wait", "learning_rate"} <= set(row)
            assert all(np.isfinite(float(value)) for value in row.values())


def test_tensorboard_has_scalars_and_slices(tiny_runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, scalars, image in (
        (tiny_runs.autoencoder, {"train/l1", "train/kl", "val/psnr"}, "reconstruction"),
        (tiny_runs.diffusion, {"train/loss", "val/loss"}, "synthetic"),
    ):
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert scalars <= set(events.Tags()["scalars"])
        assert image in events.Tags()["images"]


def test_the_resolved_configuration_repeats_the_run(tiny_runs, tmp_path):
    for stage, run in (("autoencoder", tiny_runs.autoencoder), ("diffusion", tiny_runs.diffusion)):
        again = run_here("train", stage, "--config", run / "config.yaml", "--name", f"{stage}_again", "-l", tmp_path)
        assert again.code == 0, again.err
        assert_same(loaded(run)["objects"], loaded(tmp_path / f"{stage}_again")["objects"])
        assert without_seconds(run) == without_seconds(tmp_path / f"{stage}_again")


def test_the_best_autoencoder_is_measured_and_the_last_is_not(tiny_runs):
    best, last = loaded(tiny_runs.autoencoder), loaded(tiny_runs.autoencoder, "last")
    assert best["finished"] and best["objects"]["codec"]["num_volumes"] == 4
    assert not last["finished"] and last["objects"]["codec"]["num_volumes"] == 0
    assert (best["objects"]["codec"]["latent_std"] > 0).all()


def test_stage_2_records_its_first_stage_and_carries_its_codec(tiny_runs):
    first = tiny_runs.autoencoder / "checkpoints" / "best.pt"
    content = loaded(tiny_runs.diffusion)
    assert content["first_stage"] == {"path": str(first), "sha256": checkpoints.sha256(first)}
    assert_same(content["objects"]["codec"], loaded(tiny_runs.autoencoder)["objects"]["codec"])


def test_a_number_with_an_exponent_is_a_number_on_the_command_line(phantoms, tmp_path):
    words = ["learning_rate=1e-2", "loss.kl_weight=1e-7"]
    ended = train_here("autoencoder", phantoms, tmp_path, "first", *words, max_epochs=1)
    assert ended.code == 0, ended.err
    kept = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert kept["learning_rate"] == 0.01 and kept["loss"]["kl_weight"] == 1e-7


def test_another_seed_is_another_run(phantoms, tiny_runs, tmp_path):
    assert train_here("autoencoder", phantoms, tmp_path, "other", "--seed", 1, max_epochs=1).code == 0
    one, other = loaded(tiny_runs.autoencoder)["objects"]["codec"], loaded(tmp_path / "other")["objects"]["codec"]
    assert not torch.equal(
        one["autoencoder.network.encoder.blocks.0.conv.weight"],
        other["autoencoder.network.encoder.blocks.0.conv.weight"],
    )


# Stopped and gone on with

KILLED_IN_THE_SECOND_EPOCH = """
import os, signal
from latdiff3d import cli, training
step = training.AutoencoderStep.__call__
def step_or_die(self, engine, batch):
    if engine.state.iteration == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, engine, batch)
training.AutoencoderStep.__call__ = step_or_die
cli.main()
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(phantoms, tiny_runs, tmp_path):
    words = [
        "train",
        "autoencoder",
        "--data",
        phantoms,
        "-l",
        tmp_path,
        "--name",
        "first",
        *as_words(TINY["autoencoder"]),
    ]
    killed = run_process("-c", KILLED_IN_THE_SECOND_EPOCH, *words)
    assert killed.code == -9, killed.err
    run = tmp_path / "first"
    assert loaded(run, "last")["epoch"] == 1

    again = run_here(*words)
    assert again.code == 0, again.err
    assert "2 epochs, 4 steps" in again.out
    for which in ("best", "last"):
        assert_same(loaded(run, which)["objects"], loaded(tiny_runs.autoencoder, which)["objects"])
    with (run / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert without_seconds(run) == without_seconds(tiny_runs.autoencoder)


class Stopped(Exception):
    """Whatever may stop a run in its middle."""


def raising(at, call):
    """Return `call`, which raises at the iteration `at`."""

    def step(self, engine, batch):
        if engine.state.iteration == at:
            raise Stopped
        return call(self, engine, batch)

    return step


def test_a_stopped_stage_2_goes_on_with_its_ema(phantoms, tiny_runs, tmp_path, monkeypatch):
    settings = {"first_stage": str(tiny_runs.autoencoder), "batch_size": 2, "max_epochs": 3}
    whole = train_here("diffusion", phantoms, tmp_path / "whole", "second", **settings)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(training.DiffusionStep, "__call__", raising(6, training.DiffusionStep.__call__))
        with pytest.raises(RuntimeError):
            train_here("diffusion", phantoms, tmp_path / "stopped", "second", **settings)
    assert loaded(tmp_path / "stopped" / "second", "last")["epoch"] == 2
    again = train_here("diffusion", phantoms, tmp_path / "stopped", "second", **settings)
    assert again.code == 0, again.err
    for which in ("best", "last"):
        one, other = (loaded(tmp_path / logdir / "second", which) for logdir in ("whole", "stopped"))
        assert_same(one["objects"], other["objects"])
        assert one["best_metric"] == other["best_metric"]
    assert without_seconds(tmp_path / "whole" / "second") == without_seconds(tmp_path / "stopped" / "second")


KILLED_WHILE_ENCODING = """
import os, signal
from latdiff3d import cli, codec
encode, calls = codec.LatentCodec.encode, []
def encode_or_die(*args):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args)
codec.LatentCodec.encode = encode_or_die
cli.main()
"""


def test_a_run_killed_while_encoding_goes_on_there_and_ends_as_if_it_had_not_been(phantoms, tiny_runs, tmp_path):
    named = as_words({**TINY["diffusion"], "first_stage": str(tiny_runs.autoencoder)})
    words = ["train", "diffusion", "--data", phantoms, "-l", tmp_path, "--name", "second", *named]
    killed = run_process("-c", KILLED_WHILE_ENCODING, *words)
    assert killed.code == -9, killed.err
    assert not (tmp_path / "second" / "checkpoints").exists()
    again = run_here(*words)
    assert again.code == 0, again.err
    assert "3 of 6 entries are there, 3 to encode" in again.out
    assert_same(loaded(tmp_path / "second")["objects"], loaded(tiny_runs.diffusion)["objects"])


def test_runs_on_one_codec_share_their_latents(phantoms, tiny_runs, tmp_path):
    for name, seed, there in (("one", 0, 0), ("other", 1, 6)):
        settings = {"first_stage": str(tiny_runs.autoencoder), "seed": seed, "max_epochs": 1}
        ended = train_here("diffusion", phantoms, tmp_path, name, **settings)
        assert ended.code == 0, ended.err
        assert f"{there} of 6 entries are there, {6 - there} to encode" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latent_cache", "one", "other"]


@pytest.mark.parametrize("encode", ["cached", "on_the_fly"])
def test_flipped_training_is_the_same_with_workers_and_when_it_was_stopped(
    phantoms, tiny_runs, tmp_path, monkeypatch, encode
):
    settings = {
        "first_stage": str(tiny_runs.autoencoder), "crop_to": [8, 8, 8], "flips": [0], "encode": encode,
        "batch_size": 2, "latent_cache": str(tmp_path / "latents"),
    }  # fmt: skip
    whole = train_here("diffusion", phantoms, tmp_path / "whole", "second", **settings)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(training.DiffusionStep, "__call__", raising(4, training.DiffusionStep.__call__))
        with pytest.raises(RuntimeError):
            train_here("diffusion", phantoms, tmp_path / "stopped", "second", **settings)
    again = train_here("diffusion", phantoms, tmp_path / "stopped", "second", **settings)
    workers = train_here("diffusion", phantoms, tmp_path / "workers", "second", num_workers=1, **settings)
    assert again.code == 0 and workers.code == 0, again.err + workers.err
    one, other, third = (loaded(tmp_path / name / "second", "last") for name in ("whole", "stopped", "workers"))
    assert_same(one["objects"], other["objects"])
    assert_same(one["objects"], third["objects"])


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 1, "prefetch_factor": 4}])
def test_workers_change_no_weight(phantoms, tiny_runs, tmp_path, settings):
    assert yaml.safe_load((tiny_runs.autoencoder / "config.yaml").read_text())["num_workers"] == "auto"
    ended = train_here("autoencoder", phantoms, tmp_path, "first", **settings)
    assert ended.code == 0, ended.err
    for which in ("best", "last"):  # the best one's latents are measured over the training set
        assert_same(loaded(tmp_path / "first", which)["objects"], loaded(tiny_runs.autoencoder, which)["objects"])


def test_a_run_stopped_while_measuring_measures_when_it_goes_on(phantoms, tiny_runs, tmp_path, monkeypatch):
    def stop(self, batches):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(codec.LatentCodec, "measure", stop)
        with pytest.raises(RuntimeError):
            train_here("autoencoder", phantoms, tmp_path, "first")
    assert not loaded(tmp_path / "first")["finished"]
    again = train_here("autoencoder", phantoms, tmp_path, "first")
    assert again.code == 0, again.err
    assert_same(loaded(tmp_path / "first")["objects"], loaded(tiny_runs.autoencoder)["objects"])


def gone_on_with(run, **settings):
    """Go on with a finished tiny run of stage 1, two epochs of two batches, and return its rows of metrics."""
    words = as_words({key.replace("__", "::"): value for key, value in settings.items()})
    ended = run_here("train", "autoencoder", "-r", run, *words)
    assert ended.code == 0, ended.err
    return ended, read_metrics(run / "metrics.csv")


def test_more_epochs_take_the_learning_rate_of_the_longer_schedule(finished, tmp_path):
    _, rows = gone_on_with(finished, max_epochs=4, warmup_steps=0)
    schedule = [0.5 * (1 + math.cos(math.pi * update / 8)) for update in range(9)]
    rates = [float(row["learning_rate"]) for row in rows[2:]]
    assert rates == pytest.approx([1e-3 * schedule[6], 1e-3 * schedule[8]], abs=1e-9)


def test_what_was_best_by_another_loss_no_longer_counts(finished):
    before = loaded(finished)
    assert before["best_metric_epoch"] <= 2
    ended, _ = gone_on_with(finished, max_epochs=3, loss__spectrum_weight=5.0, learning_rate=0.5)
    assert "what was best before it no longer counts" in ended.out
    after = loaded(finished)
    assert after["best_metric_epoch"] == 3 and after["best_metric"] < before["best_metric"] and after["finished"]


def test_the_weights_of_another_loss_are_not_passed_off_as_what_came_of_this_one(finished):
    words = ["max_epochs=3", "val_interval=2", "loss::spectrum_weight=1.0"]
    ended = run_here("train", "autoencoder", "-r", finished, *words)
    assert ended.code == 2 and "was never validated; set val_interval" in ended.err


def test_epochs_of_another_length_begin_as_far_into_the_run(finished):
    ended, rows = gone_on_with(finished, max_epochs=3, batch_size=1)
    assert "an epoch has 4 batches, not 2 as before: going on after step 8" in ended.out
    assert [row["iteration"] for row in rows] == ["2", "4", "12"]
    assert loaded(finished, "last")["objects"]["lr_scheduler"]["last_epoch"] == 12


def test_a_loss_that_diverges_names_the_step_its_cases_and_the_last_checkpoint(finished, phantoms, tmp_path):
    rising = {"learning_rate": 1e30, "warmup_steps": 0, "loss__disc_weight": 0.0}
    new = train_here("autoencoder", phantoms, tmp_path, "new", **rising)
    line = new.err.strip().split("\n")[-1]  # below the progress bar
    assert new.code == 2 and "Traceback" not in new.err
    assert re.search(r"loss of \w+ became (nan|inf) at step \d, phantom_\d+, phantom_\d+; lower learning_rate", line)
    assert line.endswith("There is no checkpoint yet.")
    words = as_words({key.replace("__", "::"): value for key, value in rising.items()})
    again = run_here("train", "autoencoder", "-r", finished, "max_epochs=9", *words)
    last = finished / "checkpoints" / "last.pt"
    assert again.code == 2 and again.err.strip().endswith(f"{last} is from before this step.")


@pytest.fixture
def finished(tiny_runs, tmp_path):
    """A copy of the tiny stage-1 run, to write to."""
    shutil.copytree(tiny_runs.autoencoder, tmp_path / "first")
    return tmp_path / "first"


def test_a_finished_run_is_only_reported(phantoms, finished):
    before = files_of(finished / "checkpoints")
    again = train_here("autoencoder", phantoms, finished.parent, "first")
    assert again.code == 0, again.err
    assert "Stage 'autoencoder' is trained: 2 epochs, 4 steps" in again.out and "best at epoch" in again.out
    assert files_of(finished / "checkpoints") == before


@pytest.mark.parametrize("place", ["", "checkpoints/last.pt"], ids=["the run", "its checkpoint"])
def test_r_goes_on_with_a_run_from_its_own_configuration(finished, place):
    again = run_here("train", "autoencoder", "-r", finished / place, "max_epochs=3")
    assert again.code == 0, again.err
    assert "3 epochs, 6 steps" in again.out
    assert loaded(finished, "last")["epoch"] == 3
    assert [row["epoch"] for row in read_metrics(finished / "metrics.csv")] == ["1", "2", "3"]
    assert loaded(finished)["finished"] and loaded(finished)["objects"]["codec"]["num_volumes"] == 4


def test_a_run_is_started_from_python_as_from_a_door(phantoms, tiny_runs, tmp_path, capsys):
    named = {"dataset_dir": str(phantoms), "logdir": str(tmp_path), "name": "first", "gpus": None}
    runs.start([], as_words(TINY["autoencoder"]), named, "autoencoder")
    assert "Stage 'autoencoder' is trained: 2 epochs, 4 steps" in capsys.readouterr().out
    assert_same(loaded(tmp_path / "first")["objects"], loaded(tiny_runs.autoencoder)["objects"])


@pytest.mark.parametrize("place", ["", "checkpoints/last.pt"])
def test_a_run_is_the_folder_or_a_checkpoint_in_it(tiny_runs, tmp_path, place):
    assert runs.folder_of(str(tiny_runs.autoencoder / place)) == tiny_runs.autoencoder
    with pytest.raises(InputError, match=r"there is no run at .*; expected a run's folder, with config\.yaml in it"):
        runs.folder_of(str(tmp_path / place))


def test_the_reference_door_goes_on_too(finished):
    again = run_process("main.py", "-t", "-r", finished, "stage=autoencoder", "max_epochs=3")
    assert again.code == 0, again.err
    assert loaded(finished, "last")["epoch"] == 3


def test_another_configuration_in_the_same_folder_is_refused(phantoms, finished):
    before = files_of(finished)
    line = refused(train_here("autoencoder", phantoms, finished.parent, "first", batch_size=1))
    assert "another configuration: batch_size is 2 there, 1 here" in line and "--name" in line and "-r" in line
    assert files_of(finished) == before


def test_what_changes_no_weight_may_change_when_a_run_goes_on(phantoms, finished):
    ended = train_here("autoencoder", phantoms, finished.parent, "first", checkpoint_every=1, num_workers=1)
    assert ended.code == 0, ended.err


def test_a_place_without_a_run_cannot_be_gone_on_with(tmp_path):
    assert "there is no run at" in refused(run_here("train", "autoencoder", "-r", tmp_path))


def test_the_other_stages_checkpoint_cannot_be_gone_on_with(phantoms, tiny_runs, tmp_path):
    last = tiny_runs.diffusion / "checkpoints" / "last.pt"
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", resume=str(last)))
    assert "of stage 'diffusion'; expected one of stage 'autoencoder'" in line
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_other_shapes_cannot_be_gone_on_with(phantoms, tiny_runs, tmp_path):
    line = refused(
        train_here(
            "autoencoder", phantoms, tmp_path, "x", resume=str(tiny_runs.autoencoder),
            autoencoder_def__channels=[16], autoencoder_def__norm_num_groups=8,
        )
    )  # fmt: skip
    assert "does not fit this configuration" in line and "there, " in line
    assert not (tmp_path / "x").exists()


# What stage 2 refuses of stage 1


def test_stage_2_needs_a_first_stage(phantoms, tmp_path):
    line = refused(train_here("diffusion", phantoms, tmp_path, "x"))
    assert "stage 2 needs stage 1's checkpoint; give first_stage=RUN_OR_CKPT" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("first_stage", "settings", "words"),
    [
        ("{logdir}/nowhere", {}, r"there is no checkpoint at .*nowhere; expected a .pt file or the folder of a run"),
        ("{diffusion}", {}, "of stage 'diffusion'; expected one of stage 'autoencoder'"),
        ("{autoencoder}/checkpoints/last.pt", {}, "last.pt has no latent statistics; finish stage 1, whose best.pt"),
        ("{autoencoder}", {"modalities": ["flair", "t1"]}, "was trained with modalities ['flair', 't1', 't1ce', 't2']"),
        ("{autoencoder}", {"spacing": [2, 2, 2]}, "was trained with spacing None, this run has [2, 2, 2]"),
        (
            "{autoencoder}",
            {"latent_channels": 2},
            "does not fit this configuration: latent_mean is (4,) there, (2,) here",
        ),
        (
            "{autoencoder}",
            {"autoencoder_def__channels": [16]},
            "does not fit this configuration",
        ),
    ],
)
def test_stage_2_refuses_what_is_no_first_stage_for_it(phantoms, tiny_runs, tmp_path, first_stage, settings, words):
    place = first_stage.format(autoencoder=tiny_runs.autoencoder, diffusion=tiny_runs.diffusion, logdir=tmp_path)
    line = refused(train_here("diffusion", phantoms, tmp_path, "x", first_stage=place, **settings))
    assert words.replace(r".*", "") in line or words.split(".*")[-1] in line
    assert not (tmp_path / "x").exists()


def test_stage_2_does_not_go_on_from_the_latents_of_another_first_stage(phantoms, tiny_runs, finished, tmp_path):
    settings = {"first_stage": str(finished), "max_epochs": 1}
    assert train_here("diffusion", phantoms, tmp_path, "second", **settings).code == 0
    path = finished / "checkpoints" / "best.pt"
    content = checkpoints.load(path)
    content["objects"]["codec"]["latent_mean"] += 1
    checkpoints.save(path, content)
    before = files_of(tmp_path / "second")
    line = refused(train_here("diffusion", phantoms, tmp_path, "second", **settings))
    assert "was trained on the latents of" in line and "as it is now" in line
    assert files_of(tmp_path / "second") == before


# Sampling


@pytest.fixture(scope="module")
def samples(tiny_runs, mask, tmp_path_factory):
    """What `latdiff3d sample` makes for one mask."""
    out = tmp_path_factory.mktemp("samples")
    ended = run_here("sample", "--model", tiny_runs.diffusion, "--mask", mask, "--out", out, "--seed", 3)
    assert ended.code == 0, ended.err
    assert f"1 synthetic cases are in {out}" in ended.out
    return out


def test_a_sample_is_the_volumes_the_mask_a_sidecar_and_a_picture(samples):
    names = {str(path) for path in files_of(samples)}
    assert names == {
        f"phantom_0004/phantom_0004{ending}"
        for ending in ("_flair.nii.gz", "_t1.nii.gz", "_t1ce.nii.gz", "_t2.nii.gz", "_seg.nii.gz", ".json", ".png")
    }


def test_a_sample_lies_on_its_mask(samples, mask):
    there = nib.load(mask)
    for path in (samples / "phantom_0004").glob("*.nii.gz"):
        image = nib.load(path)
        assert image.shape == there.shape
        assert np.allclose(image.affine, there.affine, atol=1e-6)
    again = nib.load(samples / "phantom_0004" / "phantom_0004_seg.nii.gz")
    assert np.array_equal(np.asarray(again.dataobj), np.asarray(there.dataobj))
    flair = nib.load(samples / "phantom_0004" / "phantom_0004_flair.nii.gz").get_fdata()
    assert flair.min() >= 0 and flair.max() <= 1 and flair.std() > 0


def test_one_seed_is_one_volume_to_the_byte_through_both_doors(tiny_runs, mask, samples, tmp_path):
    again = run_here(
        "sample", "--model", tiny_runs.diffusion / "checkpoints" / "best.pt", "--mask", mask, "--out", tmp_path / "a",
        "--seed", 3,
    )  # fmt: skip
    reference = run_process(
        "inference/sample.py", "-r", tiny_runs.diffusion, "--batch_size", 1, "--mask", mask, "--out", tmp_path / "b",
        "--seed", 3,
    )  # fmt: skip
    assert again.code == 0 and reference.code == 0, again.err + reference.err
    assert files_of(samples) == files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_seed_is_another_volume_and_the_kth_sample_has_the_kth_seed(tiny_runs, mask, samples, tmp_path):
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path, "--seed", 2, "-n", 2)
    assert ended.code == 0, ended.err
    of_2, of_3, alone = (
        nib.load(path).get_fdata()
        for path in (
            tmp_path / "phantom_0004_seed0002" / "phantom_0004_seed0002_t1.nii.gz",
            tmp_path / "phantom_0004_seed0003" / "phantom_0004_seed0003_t1.nii.gz",
            samples / "phantom_0004" / "phantom_0004_t1.nii.gz",
        )
    )
    assert np.array_equal(of_3, alone)
    assert not np.array_equal(of_2, alone)


def test_a_mask_stored_along_other_axes_gets_the_same_volume_in_the_world(tiny_runs, mask, samples, tmp_path):
    to_pil = nib.orientations.ornt_transform(
        nib.io_orientation(nib.load(mask).affine), nib.orientations.axcodes2ornt("PIL")
    )
    nib.save(nib.load(mask).as_reoriented(to_pil), tmp_path / "turned_seg.nii.gz")
    ended = run_here(
        "sample", "-r", tiny_runs.diffusion, "--mask", tmp_path / "turned_seg.nii.gz", "--out", tmp_path, "--seed", 3
    )
    assert ended.code == 0, ended.err
    turned = nib.load(tmp_path / "turned" / "turned_t2.nii.gz")
    assert nib.aff2axcodes(turned.affine) == tuple("PIL")
    plain = nib.as_closest_canonical(nib.load(samples / "phantom_0004" / "phantom_0004_t2.nii.gz"))
    back = nib.as_closest_canonical(turned)
    assert np.allclose(back.affine, plain.affine, atol=1e-5)
    assert np.array_equal(back.get_fdata(), plain.get_fdata())


def test_the_crop_alone_can_be_written(tiny_runs, mask, samples, tmp_path):
    ended = run_here(
        "sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path, "--seed", 3, "--grid", "crop"
    )
    assert ended.code == 0, ended.err
    crop = nib.load(tmp_path / "phantom_0004" / "phantom_0004_t1.nii.gz")
    whole = nib.load(samples / "phantom_0004" / "phantom_0004_t1.nii.gz")
    assert crop.shape == (16, 16, 16)
    assert np.allclose(crop.get_fdata(), whole.get_fdata())  # the phantoms are as large as the crop
    assert np.allclose(crop.affine, whole.affine, atol=1e-5)


def test_a_data_sets_split_is_sampled_for(tiny_runs, tmp_path):
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--data", tiny_runs.data, "--split", "val", "--out", tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["phantom_0004", "phantom_0005"]


def test_a_folder_of_masks_is_sampled_for(tiny_runs, mask, tmp_path):
    (tmp_path / "masks").mkdir()
    for name in ("a_seg.nii.gz", "b.nii.gz"):
        shutil.copy(mask, tmp_path / "masks" / name)
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", tmp_path / "masks", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_a_model_samples_wherever_it_is_and_without_its_first_stage(phantoms, tiny_runs, mask, samples, tmp_path):
    moved = tmp_path / "moved.pt"
    shutil.copy(tiny_runs.diffusion / "checkpoints" / "best.pt", moved)
    content = checkpoints.load(moved)
    text = yaml.safe_load(content["config"])
    text["first_stage"], text["dataset_dir"] = "/nowhere/first", "/nowhere/data"
    checkpoints.save(moved, {**content, "config": config.as_yaml(text)})
    ended = run_here("sample", "-r", moved, "--mask", mask, "--out", tmp_path / "out", "--seed", 3)
    assert ended.code == 0, ended.err
    name = Path("phantom_0004") / "phantom_0004_t1.nii.gz"
    one, other = nib.load(tmp_path / "out" / name), nib.load(samples / name)  # the header names the checkpoint's hash
    assert np.array_equal(one.get_fdata(), other.get_fdata()) and np.array_equal(one.affine, other.affine)


# Unconditional, and a crop that is no cube


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory, phantoms):
    """Both stages on images without masks, padded on one axis and cropped on none."""
    folder = tmp_path_factory.mktemp("unconditional")
    shutil.copytree(phantoms, folder / "data", ignore=shutil.ignore_patterns("*_seg.nii.gz"))
    settings = {"conditioning": "none", "crop_to": [16, 24, 16], "max_epochs": 1}
    first = train_here("autoencoder", folder / "data", folder, "first", **settings)
    assert first.code == 0, first.err
    second = train_here("diffusion", folder / "data", folder, "second", first_stage=str(folder / "first"), **settings)
    assert second.code == 0, second.err
    return folder / "second"


def test_an_unconditional_model_samples_without_a_mask(unconditional, tmp_path):
    for out in ("a", "b"):
        ended = run_here("sample", "-r", unconditional, "--out", tmp_path / out, "-n", 2)
        assert ended.code == 0, ended.err
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    paths = sorted((tmp_path / "a").rglob("*_t1.nii.gz"))
    assert [path.parent.name for path in paths] == ["synthetic_seed0000", "synthetic_seed0001"]
    assert not list((tmp_path / "a").rglob("*_seg.nii.gz"))
    one, other = (nib.load(path) for path in paths)
    assert one.shape == (16, 24, 16)
    assert np.allclose(nib.affines.voxel_sizes(one.affine), 3.0, atol=1e-5)  # the phantoms' spacing
    assert not np.array_equal(one.get_fdata(), other.get_fdata())


def test_an_unconditional_model_takes_no_mask(unconditional, mask, tmp_path):
    line = refused(run_here("sample", "-r", unconditional, "--mask", mask, "--out", tmp_path / "out"))
    assert "is an unconditional model; leave --mask" in line
    assert not (tmp_path / "out").exists()


def test_a_conditional_stage_2_runs_on_a_crop_that_is_no_cube_from_a_stage_1_trained_on_another(
    phantoms, tiny_runs, mask, tmp_path
):
    settings = {
        "first_stage": str(tiny_runs.autoencoder),
        "crop_to": [8, 24, 16],
        "mask_mode": "coarse",
        "max_epochs": 1,
    }
    ended = train_here("diffusion", phantoms, tmp_path, "second", **settings)
    assert ended.code == 0, ended.err
    ended = run_here("sample", "-r", tmp_path / "second", "--mask", mask, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    image = nib.load(tmp_path / "out" / "phantom_0004" / "phantom_0004_t1.nii.gz")
    assert image.shape == nib.load(mask).shape
    assert not image.get_fdata().all(axis=(1, 2)).all()  # 0 outside the crop of 8 voxels
