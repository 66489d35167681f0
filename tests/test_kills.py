"""SIGKILL at random moments, checkpoint writes included: the same command ends with an undisturbed run's weights.

`make soak` kills 20 times: both stages, on one process and on two. The seed of the moments is printed; `SOAK_SEED=7
make soak` takes another.
"""

import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import REPOSITORY, TINY, as_words

from latdiff3d import checkpoints

SEED = int(os.environ.get("SOAK_SEED", "0"))
LONGER = {"max_epochs": 4, "checkpoint_every": 1, "batch_size": 1}  # 16 steps, or 8 on two processes
PATIENCE_S = 300


def command(stage, data, logdir, num_processes, **settings):
    """Return the command that trains `stage`, and its run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    words = as_words({**TINY[stage], **LONGER, "dataset_dir": str(data), **settings})
    base = ["main.py", "--base", f"configs/{stage}.yaml", "-t", "-l", str(logdir), "--name", stage]
    return [sys.executable, *(torchrun if num_processes > 1 else []), *base, *words], logdir / stage


def started(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(words):
    assert started(words).wait(PATIENCE_S) == 0


def kill(process):
    """Kill a process and all that it started, at once."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(PATIENCE_S)


def undisturbed(words, run):
    """Train, and return how long it took to the first checkpoint and in all, in seconds."""
    begun, first = time.monotonic(), None
    process = started(words)
    while process.poll() is None:
        if first is None and (run / "checkpoints" / "last.pt").exists():
            first = time.monotonic() - begun
        time.sleep(0.02)
    assert process.returncode == 0 and first is not None
    return first, time.monotonic() - begun


def assert_alike(run, other):
    for which in ("best", "last"):
        one, two = (checkpoints.load(place / "checkpoints" / f"{which}.pt") for place in (run, other))
        assert one["iteration"] == two["iteration"] and one["best_metric"] == two["best_metric"]
        for name in ("codec", "denoiser", "ema", "discriminator"):
            for key, weight in one["objects"].get(name, {}).items():
                assert torch.equal(weight, two["objects"][name][key]), (which, name, key)


@pytest.mark.parametrize(
    ("stage", "num_processes", "num_kills"),
    [
        ("autoencoder", 1, 3),
        *(pytest.param(*kind, 5, marks=pytest.mark.soak) for kind in (("autoencoder", 1), ("diffusion", 1))),
        *(pytest.param(*kind, 5, marks=pytest.mark.soak) for kind in (("autoencoder", 2), ("diffusion", 2))),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    phantoms, tiny_runs, tmp_path, stage, num_processes, num_kills
):
    settings = {"first_stage": str(tiny_runs.autoencoder)} if stage == "diffusion" else {}
    words, whole = command(stage, phantoms, tmp_path / "whole", num_processes, **settings)
    first, total = undisturbed(words, whole)
    moments = random.Random(f"{SEED} {stage} {num_processes}")
    words, run = command(stage, phantoms, tmp_path / "killed", num_processes, **settings)
    told = []
    for _ in range(num_kills):
        process, delay = started(words), moments.uniform(0.8 * first, total)
        time.sleep(delay)
        kill(process)
        last = run / "checkpoints" / "last.pt"
        told.append(f"{delay:.2f} s: step {checkpoints.load(last)['iteration'] if last.exists() else 0}")
    print(f"seed {SEED}, {stage} on {num_processes}: killed after {'; '.join(told)}")
    finish(words)
    assert_alike(run, whole)
