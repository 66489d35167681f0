"""Faults that really happen to a run, a file system that takes no more and a cut file: what is said, what stays."""

import resource
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, run_here, truncate

from latdiff3d import checkpoints

MORE = ("max_epochs=3",)


@pytest.fixture
def run(tiny_runs, tmp_path):
    """A copy of the tiny stage-1 run of two epochs, to go on with."""
    shutil.copytree(tiny_runs.autoencoder, tmp_path / "first")
    return tmp_path / "first"


def last(run):
    return run / "checkpoints" / "last.pt"


def test_a_file_system_that_takes_no_more_leaves_the_last_checkpoint_whole(run):
    largest = last(run).stat().st_size // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    program = "from latdiff3d import cli; cli.main()"
    words = [sys.executable, "-c", program, "train", "autoencoder", "-r", str(run), *MORE]
    ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
    assert ended.returncode == 2
    line = ended.stderr.strip().split("\n")[-1]
    assert line.startswith("error: ") and ".pt cannot be written" in line and "no space left; make room" in line
    assert "Traceback" not in ended.stderr
    assert checkpoints.load(last(run))["epoch"] == 2
    assert not [path for path in last(run).parent.iterdir() if path.name.endswith(".tmp")]
    again = run_here("train", "autoencoder", "-r", run, *MORE)
    assert again.code == 0 and checkpoints.load(last(run))["epoch"] == 3, again.err


def test_a_last_checkpoint_cut_short_is_named_and_the_one_before_it_goes_on_to_the_same_end(run, tiny_runs):
    truncate(last(run))
    ended = run_here("train", "autoencoder", "-r", run)
    assert ended.code == 0, ended.err
    assert f"warning: {last(run)} is not a readable checkpoint" in ended.out
    assert f"Going on from {run / 'checkpoints' / 'last-1.pt'}" in ended.out
    ours, theirs = checkpoints.load(last(run)), checkpoints.load(last(tiny_runs.autoencoder))
    assert ours["epoch"] == theirs["epoch"] == 2 and ours["best_metric"] == theirs["best_metric"]
