"""Tiny NIfTI files in the layouts that the readers know, and the real volumes where they are at hand."""

import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import nibabel
import numpy as np
import pytest

import latdiff3d.cli
from latdiff3d.phantoms import write_phantoms
from latdiff3d.synthesis import Model

REPOSITORY = Path(__file__).parents[1]
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
MODALITIES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def real_data():
    """Return the folder of real volumes, or skip."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real volumes are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture
def write_volume():
    """Write a NIfTI file; without voxels, a ramp of 4 × 5 × 6 in int16."""

    def write(path, voxels=None, affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        voxels = np.arange(120, dtype=np.int16).reshape(4, 5, 6) if voxels is None else voxels
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
        return str(path)

    return write


@pytest.fixture
def write_brats_case(write_volume):
    """Write `<root>/<name>/<name>_<part>.nii.gz` for four modalities and a mask; `replaced` holds other voxels."""

    def write(root, name, without=(), **replaced):
        for number, part in enumerate((*MODALITIES, "seg")):
            voxels = np.arange(120, dtype=np.float32).reshape(4, 5, 6) + number
            if part == "seg":
                voxels = np.zeros((4, 5, 6), np.uint8)
                voxels[1:3, 1:3, 1:3] = 1
            if part not in without:
                write_volume(root / name / f"{name}_{part}.nii.gz", replaced.get(part, voxels))
        return root / name

    return write


def truncate(path, keep=0.5):
    """Cut a file to a share of its bytes."""
    with open(path, "rb+") as file:
        file.truncate(int(len(file.read()) * keep))


# Runs small enough for a test: volumes of 16³, 8 channels behind the wavelet stem, two epochs.
NUM_TRAIN = 4
TINY_AUTOENCODER = {
    "crop_to": [16, 16, 16],
    "autoencoder_def::channels": [8],
    "autoencoder_def::attention_levels": [False],
    "autoencoder_def::norm_num_groups": 4,
}
TINY = {
    "autoencoder": {
        **TINY_AUTOENCODER,
        "discriminator_def::channels": 4,
        "discriminator_def::num_layers_d": 1,
        "loss::disc_start": 3,
        "loss::disc_warmup": 1,
        "max_epochs": 2,
        "val_interval": 1,
    },
    "diffusion": {
        **TINY_AUTOENCODER,
        "denoiser_def::channels": [8, 8],
        "denoiser_def::attention_levels": [False, False],
        "denoiser_def::norm_num_groups": 4,
        "denoiser_def::num_head_channels": 4,
        "max_epochs": 2,
        "val_interval": 1,
        "sampling_steps": 3,
    },
    "segmenter": {
        "crop_to": [16, 16, 16],
        "segmenter_def::channels": [4, 8],
        "segmenter_def::strides": [2],
        "max_epochs": 2,
        "val_interval": 1,
    },
}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_here(*words, program=latdiff3d.cli.main):
    """Run a command of ours in this process, as `latdiff3d *words` would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["latdiff3d", *(str(word) for word in words)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            program()
        except SystemExit as exit:
            code = exit.code or 0
    return Ended(code, out.getvalue(), err.getvalue())


def reference_sampler():
    """Be `inference/sample.py`, a program for `run_here`."""
    runpy.run_path(str(REPOSITORY / "inference" / "sample.py"), run_name="__main__")


def run_process(*words, cwd=None):
    """Run a command in a process of its own; a first word that ends in .py, or -m, is Python's."""
    start = [sys.executable] if str(words[0]).endswith(".py") or words[0] in ("-m", "-c") else []
    ended = subprocess.run(
        [*start, *(str(word) for word in words)], cwd=cwd or REPOSITORY, capture_output=True, text=True
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def as_words(settings):
    """Return settings as `key=value` words."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def train_here(stage, data, logdir, name, *words, **settings):
    """Train a tiny stage in this process; `settings` come on top of `TINY`."""
    named = as_words({**TINY[stage], **{key.replace("__", "::"): value for key, value in settings.items()}})
    return run_here("train", stage, "--data", data, "-l", logdir, "--name", name, *words, *named)


def refused(ended):
    """Return the one line that a refused command leaves on stderr."""
    assert ended.code == 2, ended
    [line] = ended.err.strip().split("\n")
    assert line.startswith("error: ") and "\r" not in line, ended.err
    return line


class TinyRuns(NamedTuple):
    """A data set and a trained run of both stages on it; not to be written to."""

    data: Path
    autoencoder: Path
    diffusion: Path


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Return a folder of tiny phantoms, not to be written to."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", NUM_TRAIN, 2, (16, 16, 16))


@pytest.fixture(scope="session")
def tiny_runs(phantoms, tmp_path_factory):
    """Return a tiny run of both stages, trained once in this session."""
    logdir = tmp_path_factory.mktemp("tiny_runs")
    first = train_here("autoencoder", phantoms, logdir, "first")
    assert first.code == 0, first.err
    second = train_here("diffusion", phantoms, logdir, "second", first_stage=str(logdir / "first"))
    assert second.code == 0, second.err
    return TinyRuns(phantoms, logdir / "first", logdir / "second")


@pytest.fixture(scope="session")
def judge(phantoms, tmp_path_factory):
    """Return the run of a tiny segmenter for evaluation; not to be written to."""
    logdir = tmp_path_factory.mktemp("judge")
    ended = train_here("segmenter", phantoms, logdir, "judge", purpose="evaluation", max_epochs=1)
    assert ended.code == 0, ended.err
    return logdir / "judge"


@pytest.fixture(scope="module")
def model(tiny_runs):
    """Return the tiny run of stage 2, loaded."""
    return Model.load(tiny_runs.diffusion)


@pytest.fixture(scope="module")
def mask(phantoms):
    """Return the mask of a held-out phantom."""
    return phantoms / "phantom_0004" / "phantom_0004_seg.nii.gz"


@pytest.fixture(scope="session")
def exported_bundle(tiny_runs, tmp_path_factory):
    """Return the tiny run of stage 2 as a bundle, with a sample in its card; not to be written to."""
    folder = tmp_path_factory.mktemp("exported") / "tiny_bundle"
    mask = tiny_runs.data / "phantom_0004" / "phantom_0004_seg.nii.gz"
    ended = run_here("export", "--run", tiny_runs.diffusion, "--to", folder, "--mask", mask)
    assert ended.code == 0, ended.err
    return folder
