"""A run becomes a bundle that runs where no latdiff3d is installed, and gives the run's own volumes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import MODALITIES, REPOSITORY, refused, run_here, train_here
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL

from latdiff3d import bundle_files, checkpoints, config, export
from latdiff3d.bundle_modules import modules_needed, packages_needed
from latdiff3d.config import read_yaml
from latdiff3d.quantization import VQAutoencoder
from latdiff3d.synthesis import Model
from latdiff3d.wavelets import WaveletAutoencoder

# MONAI's command, on the modules beside it or on none; an editable latdiff3d is found by a finder or a path of its own.
ALONE = """
import os, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path = [place for place in sys.path if not place or not os.path.isfile(os.path.join(place, "latdiff3d", "cli.py"))]
import latdiff3d
assert latdiff3d.__file__.startswith(os.getcwd()), latdiff3d.__file__
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def bundle(exported_bundle):
    return exported_bundle


def run_alone(folder, *words):
    """Run MONAI's command in `folder`, where neither the repository nor an installed latdiff3d is found."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, *(str(word) for word in words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_a_bundle_holds(bundle):
    assert bundle_files.problems(bundle) == {
        name: [] for name in (
            "files", "model card", "weights without pickled code", "hashes", "no absolute paths", "sizes",
            "version and changelog",
        )
    }  # fmt: skip
    assert not list(bundle.rglob("*.pyc"))
    assert {path.name for path in bundle.iterdir()} == {
        "configs", "docs", "latdiff3d", "models", "LICENSE", "SHA256SUMS"
    }  # fmt: skip


def test_the_weights_are_the_moving_average_and_the_codec_with_its_statistics(bundle, tiny_runs):
    best = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")["objects"]
    for file, prefix, name in (("model.pt", "denoiser.", "ema"), ("model_autoencoder.pt", "codec.", "codec")):
        weights = torch.load(bundle / "models" / file, weights_only=True)
        assert {key.removeprefix(prefix) for key in weights} == set(best[name])
        assert all(torch.equal(weights[prefix + key], value) for key, value in best[name].items())
    assert int(weights["codec.num_volumes"]) > 0


def test_the_bundle_loads_as_the_run_does(bundle, tiny_runs, mask):
    ours, theirs = (Model.load(place).sample(mask, seed=1).volume for place in (bundle, tiny_runs.diffusion))
    assert torch.equal(ours, theirs)


def test_the_metadata_hold_what_was_measured(bundle, tiny_runs):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    figures = json.loads((tiny_runs.autoencoder / "quality.json").read_text())
    best = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    assert metadata["eval_metrics"]["autoencoder_psnr_db"] == pytest.approx(figures["autoencoder"]["psnr_db"], abs=1e-4)
    assert metadata["eval_metrics"]["diffusion_validation_loss"] == pytest.approx(best["best_metric"], abs=1e-4)
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 4 + 4 + 1
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == [8, 8, 8]
    assert "phantom" not in json.dumps(metadata)  # no name of a case


def test_the_configuration_is_the_runs_without_its_places(bundle, tiny_runs):
    common = read_yaml(bundle / "configs" / "common.yaml")
    assert common["crop_to"] == [16, 16, 16]
    assert common["bundle_root"] == "." and common["dataset_dir"] == "data"
    assert common["sampling_steps"] == 3
    assert read_yaml(bundle / "configs" / "train_autoencoder.yaml")["loss"]["disc_start"] == 3


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_stages_configuration_is_all_of_its_runs(bundle, tiny_runs, stage):
    run = read_yaml(getattr(tiny_runs, stage) / "config.yaml")
    common, own = (read_yaml(bundle / "configs" / name) for name in ("common.yaml", f"train_{stage}.yaml"))
    assert {**common, **own}.keys() == run.keys()
    assert {"train", "validate", "loss" if stage == "autoencoder" else "latents"} <= own.keys()
    assert {key for key in own if run[key] != own[key]} <= {*export.PLACES}


@pytest.mark.parametrize(
    ("kind", "network", "has_stem"),
    [("kl", AutoencoderKL, False), ("vq", VQAutoencoder, True), ("fast", AutoencoderKL, True)],
)
def test_an_overlay_in_the_bundle_is_another_autoencoder(bundle, kind, network, has_stem):
    files = [bundle / "configs" / name for name in ("common.yaml", f"autoencoder_{kind}.yaml")]
    autoencoder = ConfigParser(config.merged(files)).get_parsed_content("autoencoder")
    assert isinstance(autoencoder, WaveletAutoencoder) == has_stem
    assert isinstance(getattr(autoencoder, "network", autoencoder), network)
    assert (bundle / "latdiff3d" / "quantization.py").is_file()


def test_a_bundle_alone_samples_what_its_run_does(bundle, tiny_runs, mask, tmp_path):
    assert run_here("sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / "run").code == 0
    alone = copied(bundle, tmp_path)
    files = ["configs/common.yaml", "configs/inference.yaml"]
    ended = run_alone(alone, "run", "inference", "--config_file", files, "--mask", mask, "--out", tmp_path / "bundle")
    assert ended.returncode == 0, ended.stderr
    for modality in MODALITIES:
        name = f"phantom_0004/phantom_0004_{modality}.nii.gz"
        ours, theirs = (nib.load(tmp_path / place / name) for place in ("bundle", "run"))
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
        np.testing.assert_array_equal(ours.affine, theirs.affine)


def test_a_bundle_alone_trains_and_goes_on(bundle, tiny_runs, tmp_path):
    alone = copied(bundle, tmp_path)
    files = ["configs/common.yaml", "configs/train_diffusion.yaml"]
    given = ["run", "training", "--config_file", files, "--dataset_dir", tiny_runs.data, "--logdir", tmp_path / "runs"]
    for epochs in (1, 2):
        going_on = ["--resume", tmp_path / "runs" / "diffusion"] if epochs > 1 else []
        ended = run_alone(alone, *given, "--max_epochs", epochs, "--val_interval", 1, *going_on)
        assert ended.returncode == 0, ended.stderr
    assert "2 epochs, 2 steps" in ended.stdout
    assert checkpoints.load(tmp_path / "runs" / "diffusion" / "checkpoints" / "last.pt")["epoch"] == 2


@pytest.mark.slow
def test_a_bundle_alone_trains_and_samples_on_two_processes(bundle, tiny_runs, tmp_path):
    alone = copied(bundle, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(alone), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    masks = tmp_path / "masks"
    masks.mkdir()
    for case in ("phantom_0004", "phantom_0005"):
        shutil.copyfile(tiny_runs.data / case / f"{case}_seg.nii.gz", masks / f"{case}.nii.gz")
    training = ["configs/common.yaml", "configs/train_diffusion.yaml"]
    given = ["--dataset_dir", tiny_runs.data, "--logdir", tmp_path / "runs", "--batch_size", 2]
    for words in (
        ["run", "training", "--config_file", training, *given],
        ["run", "evaluate", "--config_file", [*training, "configs/evaluate.yaml"], *given,
         "--figures", tmp_path / "f.json"],
        ["run", "inference", "--config_file", ["configs/common.yaml", "configs/inference.yaml"], "--mask", masks,
         "--out", tmp_path / "out"],
    ):  # fmt: skip
        command = [*torchrun, "-m", "monai.bundle", *(str(word) for word in words)]
        ended = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert checkpoints.load(tmp_path / "runs" / "diffusion" / "checkpoints" / "best.pt")["finished"]
    assert json.loads((tmp_path / "f.json").read_text())["cases"] == 2
    assert ended.stdout.count("2 synthetic cases are in") == 1  # one rank tells
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"phantom_0004", "phantom_0005"}
    model = Model.load(bundle)
    written = nib.load(tmp_path / "out" / "phantom_0005" / "phantom_0005_t1.nii.gz")
    expected = model.sample(masks / "phantom_0005.nii.gz", seed=0).on_mask_grid()[0][1]
    np.testing.assert_allclose(np.asarray(written.dataobj), expected, atol=1e-6)


def copied(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "alone"))


def test_what_the_bundle_needs_is_listed(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert {"nibabel", "einops", "pytorch-ignite", "fire", "PyYAML", "tensorboard"} <= set(
        metadata["required_packages_version"]
    )
    assert not {"highdicom", "mlflow-skinny", "torch", "typer"} & set(metadata["required_packages_version"])


def test_modules_are_those_named_and_those_they_import():
    assert modules_needed(["_target_: latdiff3d.objectives.Epsilon"]) == sorted(
        modules_needed(["$import latdiff3d.objectives as objectives"])
    )
    assert "cli" not in modules_needed(["_target_: latdiff3d.runs.train"])
    assert "errors" in modules_needed(["_target_: latdiff3d.objectives.Epsilon"])
    assert "nibabel" in packages_needed(["volumes"])


def test_a_setting_with_a_place_on_this_machine_stays_here():
    said = []
    value = {"_target_": "x", "weights": "/somewhere/resnet.pt", "steps": [1, 2]}
    assert export.portable(value, {"weights": ""}, "teacher", said) == {"_target_": "x", "weights": "", "steps": [1, 2]}
    assert said == ["teacher::weights was a place on this machine, and is '' in the bundle."]


def test_a_folder_with_something_in_it_is_refused_and_left(tiny_runs, tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    assert "is there already" in refused(run_here("export", "--run", tiny_runs.diffusion, "--to", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_what_cannot_be_exported_leaves_nothing(tiny_runs, tmp_path):
    stage_1 = refused(run_here("export", "--run", tiny_runs.autoencoder, "--to", tmp_path / "b"))
    assert "expected one of stage 'diffusion'" in stage_1
    no_mask = refused(
        run_here("export", "--run", tiny_runs.diffusion, "--to", tmp_path / "b", "--mask", tmp_path / "x")
    )
    assert str(tmp_path / "x") in no_mask
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_refused(tiny_runs, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    checkpoints.save(tmp_path / "half.pt", {**content, "finished": False})
    assert "is not finished" in refused(run_here("export", "--run", tmp_path / "half.pt", "--to", tmp_path / "b"))


@pytest.mark.slow
def test_an_unconditional_run_of_the_other_bundle_is_exported(tiny_runs, phantoms, tmp_path):
    bundle = f"bundle={json.dumps(str(REPOSITORY / 'bundles' / 'mri_unconditional_ldm'))}"
    assert train_here("autoencoder", phantoms, tmp_path, "ae", bundle).code == 0
    ended = train_here("diffusion", phantoms, tmp_path, "dm", bundle, first_stage=str(tmp_path / "ae"))
    assert ended.code == 0, ended.err
    ended = run_here("export", "--run", tmp_path / "dm", "--to", tmp_path / "bundle")
    assert ended.code == 0, ended.err
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["name"] == "MRI unconditional latent diffusion"
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 5
    assert not any(file.is_symlink() for file in (tmp_path / "bundle").rglob("*"))
    assert (tmp_path / "bundle" / "docs" / "sample.png").is_file()
