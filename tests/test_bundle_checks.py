"""Verification finds what is wrong with a bundle, passes one that is right, and says what it did not check."""

import json
import shutil
import subprocess
from importlib.util import find_spec

import pytest
import torch
from conftest import REPOSITORY, refused, run_here
from monai.bundle import ConfigParser

from latdiff3d import bundle_checks, bundle_files
from latdiff3d.bundle_checks import FAILED, NOT_MADE, OK, verify
from latdiff3d.bundle_trial import write_trial_data

BUNDLES = sorted(path for path in (REPOSITORY / "bundles").iterdir() if path.is_dir())
EXPORT_PACKAGES = ("jsonschema", "onnx", "onnxscript", "onnxruntime")


@pytest.fixture
def bundle(exported_bundle, tmp_path):
    """Return a copy of the exported tiny bundle, to be spoilt."""
    return shutil.copytree(exported_bundle, tmp_path / "bundle")


def changed(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def passed(trial, name, words):
    """Be a process that ends well, for tests of what is around it."""
    return bundle_checks.Check(name, OK), subprocess.CompletedProcess(words, 0, "", "")


def outcomes(bundle, **how):
    return {check.name: check.outcome for check in verify(bundle, **how)}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_nothing_is_wrong_with_the_files_of_our_bundles(bundle):
    assert {name: found for name, found in bundle_files.problems(bundle).items() if found} == {}


@pytest.mark.slow
def test_an_exported_bundle_passes_every_check_that_can_be_made(exported_bundle, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in exported_bundle.rglob("*")}
    checks = list(verify(exported_bundle))
    assert [check for check in checks if check.outcome == FAILED] == []
    missing = [package for package in EXPORT_PACKAGES if find_spec(package) is None]
    not_made = [check for check in checks if check.outcome == NOT_MADE]
    assert bool(not_made) == bool(missing)
    assert all("is not installed: pip install 'latdiff3d[export]'" in check.said for check in not_made)
    names = {check.name for check in checks if check.outcome == OK}
    assert {
        "check_properties", "verify_net_in_out network_def", "verify_net_in_out reconstruction_def",
        "ckpt_export network_def", "ckpt_export reconstruction_def", "outputs of network_def",
        "outputs of reconstruction_def", "training autoencoder", "training diffusion", "training diffusion goes on",
        "inference", "evaluate autoencoder", "evaluate diffusion",
    } <= names  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in exported_bundle.rglob("*")} == before  # nothing left in it


@pytest.mark.slow
def test_what_a_network_gives_must_be_what_the_metadata_say(bundle):
    changed(bundle / "configs" / "metadata.json", '"num_channels": 4', '"num_channels": 5')
    found = outcomes(bundle, runs=False)
    assert found["verify_net_in_out network_def"] == FAILED
    assert found["verify_net_in_out reconstruction_def"] == OK
    assert found["training, inference, evaluation"] == NOT_MADE


@pytest.mark.parametrize(
    "spoil, check, words",
    [
        (lambda b: (b / "LICENSE").unlink(), "files", "there is no LICENSE"),
        (lambda b: changed(b / "docs/README.md", "## Performance", "## Figures"), "model card", "## Performance"),
        (lambda b: (b / "docs/sample.png").unlink(), "model card", "shows sample.png, which is not there"),
        (lambda b: torch.save({"net": print}, b / "models/model.pt"), "weights without pickled code", "model.pt"),
        (lambda b: torch.save({"a": {"b": 1}}, b / "models/x.pt"), "weights without pickled code", "more than tensors"),
        (lambda b: (b / "models/old.pkl").write_bytes(b"x"), "weights without pickled code", "pickled code"),
        (lambda b: changed(b / "docs/README.md", "Rombach", "Romboch"), "hashes", "docs/README.md is not what"),
        (lambda b: (b / "new.txt").write_text("x"), "hashes", "new.txt is not in SHA256SUMS"),
        (lambda b: (b / "SHA256SUMS").unlink(), "hashes", "there is no SHA256SUMS"),
        (lambda b: torch.save([1], b / "models/x.pt"), "weights without pickled code", "more than tensors"),
        (
            lambda b: changed(b / "configs/common.yaml", "dataset_dir: data", "dataset_dir: /home/ann/data"),
            "no absolute paths", "common.yaml names /home/ann/data",
        ),
        (lambda b: (b / "configs/empty.yaml").write_text(""), "sizes", "empty.yaml is empty"),
        (
            lambda b: changed(b / "configs/metadata.json", '"version": "0.1.0"', '"version": "0.2.0"'),
            "version and changelog", "no entry for version 0.2.0",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_files_is_found(bundle, spoil, check, words):
    spoil(bundle)
    assert any(words in problem for problem in bundle_files.problems(bundle)[check])


def test_a_check_whose_package_is_missing_is_not_passed(bundle, monkeypatch):
    monkeypatch.setattr(bundle_checks, "find_spec", lambda name: None)
    monkeypatch.setattr(bundle_checks._Trial, "_process", passed)
    found = outcomes(bundle, runs=False)
    assert found["verify_metadata metadata.json"] == found["onnx_export network_def"] == NOT_MADE
    ended = run_here("verify", bundle, "--no-runs")
    assert ended.code == 3
    assert "not made verify_metadata metadata.json: jsonschema is not installed: pip install" in ended.out


def test_a_failure_is_the_exit_code(bundle, monkeypatch):
    monkeypatch.setattr(bundle_checks._Trial, "_process", passed)
    (bundle / "LICENSE").unlink()
    ended = run_here("verify", bundle, "--no-runs")
    assert ended.code == 1
    assert "FAILED   files: there is no LICENSE" in ended.out


def test_another_interpreter_makes_the_checks_and_runs_are_on_one_process_and_on_two(bundle, tmp_path):
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text(f'#!/bin/sh\necho "$@" | tr "\\n" " " >> {told}\necho >> {told}\n')
    python.chmod(0o755)
    found = outcomes(bundle, python=python, num_processes=2)
    assert set(found.values()) == {OK}
    lines = told.read_text().splitlines()
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m monai.bundle run"
    for program in ("training", "inference", "evaluate"):
        alone, both = (sum(f"{start} {program} " in line for line in lines) for start in ("monai.bundle run", torchrun))
        assert alone == 2 * both > 0
    assert {f"training diffusion goes on{on}" for on in ("", ", 2 processes")} <= found.keys()


@pytest.mark.parametrize(
    "report",
    [
        "\nE1 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1)\nmonai.bundle FAILED\n=====\n",
        "",  # of a process alone, whose last line has no end
    ],
    ids=["a rank", "alone"],
)
def test_what_a_process_says_is_told_rather_than_torchruns_report_of_it(bundle, tmp_path, report):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "Traceback\\nInputError: no room{report}" >&2\nexit 1\n')
    python.chmod(0o755)
    said = {check.name: check.said for check in verify(bundle, python=python, num_processes=2)}
    assert said["training diffusion, 2 processes"] == said["training diffusion"] == "InputError: no room"


def test_each_rank_has_a_case_of_training_and_one_of_validation(bundle, tmp_path):
    settings = ConfigParser()
    settings.read_config(str(bundle / "configs" / "common.yaml"))
    data = write_trial_data(tmp_path / "data", settings, num_ranks=3)
    assert all(len((data / f"{split}.list").read_text().split()) == 3 for split in ("train", "val"))
    assert len(list(data.glob("*/*_seg.nii.gz"))) == 6


def test_an_interpreter_that_is_not_there_is_told_in_one_line(bundle):
    assert "expected a Python interpreter" in refused(run_here("verify", bundle, "--python", "nowhere/python"))


def test_what_is_no_bundle_is_told_in_one_line(tmp_path):
    assert "expected a bundle's folder" in refused(run_here("verify", tmp_path))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["metadata.json", "metadata_autoencoder.json"])
def test_our_metadata_fit_the_schema(bundle, name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(bundle_files.SCHEMA.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    metadata = json.loads((bundle / "configs" / name).read_text())
    jsonschema.validate(metadata, schema)
    for key in ("network_data_format", "task", "changelog"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in metadata.items() if k != key}, schema)
