"""Several real processes: one run, one folder, and the figures of a single process with their joint batch."""

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, as_words, run_process

from latdiff3d import checkpoints
from latdiff3d.handlers import read_metrics
from latdiff3d.phantoms import write_phantoms

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
STILL = {"learning_rate": 1e-12, "max_epochs": 1}  # so that what is measured is measured on the same weights


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A data set of 5 training and 3 validation cases."""
    return write_phantoms(tmp_path_factory.mktemp("odd") / "data", 5, 3, (16, 16, 16))


def train(launcher, stage, data, logdir, program="main.py", **settings):
    words = as_words({**TINY[stage], **settings, "dataset_dir": str(data), "num_workers": 0})
    base = ["--base", f"configs/{stage}.yaml", "-t", "-l", logdir, "--name", stage]
    ended = run_process(*launcher, program, *base, *words)
    assert ended.code == 0, ended.err
    return logdir / stage, ended


def content(run, which="best"):
    return checkpoints.load(run / "checkpoints" / f"{which}.pt")


@pytest.fixture(scope="module")
def stage_1(odd, tmp_path_factory):
    """Stage 1 on two ranks and on one, each with four cases a step."""
    logdir = tmp_path_factory.mktemp("stage_1")
    two = train(TORCHRUN, "autoencoder", odd, logdir / "two", batch_size=2, **STILL)
    one = train((), "autoencoder", odd, logdir / "one", batch_size=4, **STILL)
    return two, one


def test_two_ranks_measure_what_one_does(stage_1):
    (two, _), (one, _) = stage_1
    ours, theirs = content(two), content(one)
    assert ours["iteration"] == theirs["iteration"] == 1
    assert ours["best_metric"] == pytest.approx(theirs["best_metric"], rel=1e-5)
    for name in ("latent_mean", "latent_std", "num_volumes"):
        measured, expected = ours["objects"]["codec"][name], theirs["objects"]["codec"][name]
        assert torch.allclose(measured, expected, rtol=1e-4, atol=1e-6), name
    [row], [other] = read_metrics(two / "metrics.csv"), read_metrics(one / "metrics.csv")
    assert row.keys() == other.keys()
    for name in ("val_psnr", "val_l1"):  # the noise of training is each rank's own
        assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def test_the_first_rank_alone_speaks_and_writes(stage_1):
    (two, ended), (one, _) = stage_1
    assert ended.out.count("Stage 'autoencoder' is trained") == 1
    assert {path.name for path in two.rglob("*")} - {path.name for path in one.rglob("*")} <= {
        path.name for path in (two / "tensorboard").iterdir()
    }
    assert len(list((two / "tensorboard").iterdir())) == 1


@pytest.fixture(scope="module")
def stage_2(stage_1, odd, tmp_path_factory):
    """Stage 2 on two ranks, three steps in as many epochs, and its settings."""
    settings = {"first_stage": str(stage_1[0][0]), "batch_size": 2, "max_epochs": 3}
    return train(TORCHRUN, "diffusion", odd, tmp_path_factory.mktemp("stage_2"), **settings)[0], settings


def test_stage_2_trains_on_two_ranks(stage_2):
    last = content(stage_2[0], "last")
    assert last["iteration"] == 3 and math.isfinite(last["best_metric"])


# The second rank is killed in its third step, in the first of the group's two lives; each life says where it begins.
KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {repository!r})
from latdiff3d import checkpointing, training
from latdiff3d.cli import door
from main import main
step, restore = training.DiffusionStep.__call__, checkpointing.Run.restore
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
def step_or_die(self, engine, batch):
    if os.environ["RANK"] == "1" and life == "0" and engine.state.iteration == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, engine, batch)
def restore_and_say(self, engine, content):
    restore(self, engine, content)
    print("life", life, "goes on after step", engine.state.iteration, flush=True)
training.DiffusionStep.__call__, checkpointing.Run.restore = step_or_die, restore_and_say
door(main)
"""


def test_a_group_that_torchrun_restarts_after_a_kill_ends_as_if_nothing_had_happened(stage_2, odd, tmp_path):
    whole, settings = stage_2
    program = tmp_path / "train.py"
    program.write_text(KILLED_ONCE.format(repository=str(REPOSITORY)))
    restarting = (*TORCHRUN, "--max-restarts", 1)
    restarted, ended = train(restarting, "diffusion", odd, tmp_path / "restarted", program, **settings)
    assert ended.out.count("life 1 goes on after step 2") == 1 and "life 0 goes on" not in ended.out
    assert ended.out.count("Stage 'diffusion' is trained: 3 epochs, 3 steps") == 1
    for which in ("best", "last"):
        ours, theirs = content(restarted, which), content(whole, which)
        assert ours["iteration"] == theirs["iteration"] and ours["best_metric"] == theirs["best_metric"]
        for name in ("denoiser", "ema", "codec"):
            for key, weight in theirs["objects"][name].items():
                assert torch.equal(ours["objects"][name][key], weight), (which, name, key)


# The second rank meets its fate in its second step: `die` without a word, `refuse` with one.
FATE = """
import os, sys
sys.path.insert(0, {repository!r})
from latdiff3d import cli, training
from latdiff3d.errors import InputError
step = training.AutoencoderStep.__call__
def step_or_not(self, engine, batch):
    if os.environ["RANK"] == "1" and engine.state.iteration == 2:
        if {fate!r} == "die":
            os._exit(9)
        raise InputError("case_7 is damaged.")
    return step(self, engine, batch)
training.AutoencoderStep.__call__ = step_or_not
cli.main()
"""


@pytest.mark.parametrize(("fate", "told"), [("die", "exitcode  : 9"), ("refuse", "error: case_7 is damaged.")])
def test_a_rank_that_ends_ends_the_others_soon_and_its_own_error_is_shown(odd, tmp_path, fate, told):
    (tmp_path / "train.py").write_text(FATE.format(repository=str(REPOSITORY), fate=fate))
    words = ["train", "autoencoder", "--data", odd, "-l", tmp_path, "--name", "ae"]
    begun = time.monotonic()
    ended = run_process(*TORCHRUN, tmp_path / "train.py", *words, *as_words(TINY["autoencoder"]))
    assert ended.code != 0 and told in ended.err
    assert "rank 0 has lost another rank" in ended.err or "SIGTERM" in ended.err
    assert time.monotonic() - begun < 120  # of which torchrun's 30 s at most are waited; the rest is starting up
    assert content(tmp_path / "ae", "last")["iteration"] == 1


def test_the_slurm_script_trains_on_two_nodes(odd, tmp_path):
    """Two nodes are two of torchrun's agents on this machine, which find each other at a real rendezvous."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {
        "scontrol": 'test "$*" = "show hostnames node[1-2]" && echo localhost && echo localhost',
        "srun": '"$@" & one=$!\n"$@" & two=$!\nwait $one && wait $two',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7",
        "RENDEZVOUS_PORT": str(port), "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    words = as_words({**TINY["autoencoder"], **STILL, "dataset_dir": str(odd)})
    base = ["main.py", "--base", "configs/autoencoder.yaml", "-t", "-l", tmp_path, "--name", "ae"]
    script = [REPOSITORY / "docs" / "slurm.sh", *base, *words]
    ended = subprocess.run(script, cwd=REPOSITORY, env={**os.environ, **slurm}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Stage 'autoencoder' is trained") == 1
    assert content(tmp_path / "ae")["iteration"] == 1
