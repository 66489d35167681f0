"""Faults that really happen to a run, a file system that takes no more and a cut file: what is said, what stays."""

import resource
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from conftest import REPOSITORY, refused, run_here, train_here, truncate

from latdiff3d import checkpoints
from latdiff3d.phantoms import write_phantoms

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


def test_bad_cases_are_named_counted_and_left_out_where_that_is_allowed(tmp_path):
    data = write_phantoms(tmp_path / "data", 5, 2, (16, 16, 16))
    cut, planted = (data / f"phantom_{name}_t1.nii.gz" for name in ("0001/phantom_0001", "0002/phantom_0002"))
    truncate(cut)
    image = nibabel.load(planted)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), planted)
    stopped = train_here("autoencoder", data, tmp_path, "strict")
    assert stopped.code == 2 and "phantom_000" in stopped.err
    ended = train_here("autoencoder", data, tmp_path, "lenient", skip_bad_cases=True)
    assert ended.code == 0, ended.err
    skipped = [line for line in ended.out.split("\n") if line.startswith("skipped: ")]
    assert len(skipped) == 2 and "phantom_0001" in skipped[0] and "1 NaN" in skipped[1]
    assert "2 of 5 train cases are skipped" in ended.out
    best = checkpoints.load(tmp_path / "lenient" / "checkpoints" / "best.pt")
    assert best["objects"]["codec"]["num_volumes"] == 2  # of three, in batches of two


def test_a_data_set_of_bad_cases_alone_is_refused(tmp_path):
    data = write_phantoms(tmp_path / "data", 2, 2, (16, 16, 16))
    for file in data.glob("*/*_t1.nii.gz"):
        truncate(file)
    line = refused(train_here("autoencoder", data, tmp_path, "none", skip_bad_cases=True))
    assert "none of the 2 train cases can be used" in line
