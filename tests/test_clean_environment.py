"""Exported bundles of each kind where nothing but their packages is installed: every check, and their runs' volumes.

`make bundles` makes such an environment, with pip, of the packages in a bundle's metadata and those that exporting to
ONNX needs. `CLEAN_PYTHON=/path/to/python make bundles` takes one that is there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY, TINY, as_words, run_here, train_here

from latdiff3d.bundle_checks import OK, verify

EXPORT_PACKAGES = ("jsonschema", "onnx", "onnxscript", "onnxruntime")
PATIENCE_S = 5400  # a kind has up to 30 checks, each a process that imports MONAI
# By kind: its overlays of stage 2, and on how many processes it is tried beside one.
KINDS = {
    "masks": ((), 2),
    "unconditional": ((), 2),
    "vq": (("autoencoder_vq.yaml",), 1),
    "encoder": (("condition_encoder.yaml",), 1),
    "covariates": (("covariates.yaml",), 1),
}
UNCONDITIONAL = f"bundle={json.dumps(str(REPOSITORY / 'bundles' / 'mri_unconditional_ldm'))}"
TINY_VQ = {"autoencoder_def::channels": [8, 8], "autoencoder_def::n_embed": 16}


@pytest.fixture(scope="session")
def clean_python(exported_bundle, tmp_path_factory):
    """Return the interpreter of an environment with a bundle's packages alone."""
    place = tmp_path_factory.mktemp("clean")
    python = os.environ.get("CLEAN_PYTHON") or str(place / "venv" / "bin" / "python")
    if "CLEAN_PYTHON" not in os.environ:
        metadata = json.loads((exported_bundle / "configs" / "metadata.json").read_text())
        own = {name: metadata[f"{key}_version"] for name, key in (("torch", "pytorch"), ("monai",) * 2, ("numpy",) * 2)}
        wanted = [f"{name}=={version}" for name, version in {**own, **metadata["required_packages_version"]}.items()]
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "-c", REPOSITORY / "constraints.txt"]
        subprocess.run([*install, *wanted, *EXPORT_PACKAGES], check=True)
    found = subprocess.run([python, "-c", "import latdiff3d"], cwd=place, env=alone(), capture_output=True)
    assert b"No module named 'latdiff3d'" in found.stderr
    return python


def alone():
    """Return an environment in which Python finds no repository."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def train(kind, stage, data, logdir, **settings):
    """Train a tiny stage of `kind`, and return its run."""
    overlays = [word for name in KINDS[kind][0] for word in ("--config", REPOSITORY / "configs" / name)]
    if kind == "vq":
        tiny = {key: value for key, value in TINY[stage].items() if not key.startswith("autoencoder_def")}
        words = as_words({**tiny, **TINY_VQ, **settings})
        ended = run_here("train", stage, *overlays, "--data", data, "-l", logdir, "--name", stage, *words)
    else:
        bundle = [UNCONDITIONAL] if kind == "unconditional" else []
        ended = train_here(stage, data, logdir, stage, *overlays, *bundle, **settings)
    assert ended.code == 0, ended.err
    return logdir / stage


@pytest.fixture
def run(kind, tiny_runs, phantoms, tmp_path):
    """Return a tiny run of stage 2 of `kind`."""
    if kind == "masks":
        return tiny_runs.diffusion
    first, data = tiny_runs.autoencoder, phantoms
    if kind in ("unconditional", "vq"):
        first = train(kind, "autoencoder", phantoms, tmp_path)
    if kind == "covariates":
        data = shutil.copytree(phantoms, tmp_path / "data")
        cases = sorted(path.name for path in data.iterdir() if path.is_dir())
        rows = [f"{case},{50 + number},{'FM'[number % 2]}" for number, case in enumerate(cases)]
        (data / "covariates.csv").write_text("\n".join(["case,age,sex", *rows]) + "\n")
    return train(kind, "diffusion", data, tmp_path, first_stage=str(first))


def sha256_of_volumes(folder):
    """Return a hash of the voxels and affines of all volumes in `folder`, which hold no name of a place or a time."""
    volumes = [nib.load(path) for path in sorted(folder.rglob("*.nii.gz"))]
    assert volumes
    parts = [part for volume in volumes for part in (np.asarray(volume.dataobj).tobytes(), volume.affine.tobytes())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.soak
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_needs_its_packages_alone(kind, run, mask, clean_python, tmp_path):
    given = ["--mask", mask] if kind in ("masks", "vq", "encoder") else []
    bundle = tmp_path / "elsewhere" / f"{kind}_bundle"
    ended = run_here("export", "--run", run, "--to", tmp_path / "exported", *given)
    assert ended.code == 0, ended.err
    shutil.copytree(tmp_path / "exported", bundle)

    ended = run_here("sample", "--model", run, *given, "--seed", 1, "--out", tmp_path / "by_the_run")
    assert ended.code == 0, ended.err
    files = str(["configs/common.yaml", "configs/inference.yaml"])
    words = ["run", "inference", "--config_file", files, *given, "--seed", 1, "--out", tmp_path / "by_the_bundle"]
    command = [clean_python, "-m", "monai.bundle", *(str(word) for word in words)]
    subprocess.run(command, cwd=bundle, env=alone(), check=True)
    hashes = [sha256_of_volumes(tmp_path / place) for place in ("by_the_run", "by_the_bundle")]
    print(f"\n{kind}: volumes by the run {hashes[0]}, by the bundle {hashes[1]}")
    assert hashes[0] == hashes[1]

    checks = []
    for check in verify(bundle, num_processes=KINDS[kind][1], python=clean_python):
        print(f"{check.outcome:<8} {check.name}{': ' + check.said if check.said else ''}", flush=True)
        checks.append(check)
    assert [check for check in checks if check.outcome != OK] == []
