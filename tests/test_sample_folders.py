"""Masks in, folders out: which masks there are, and what is written for each."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from latdiff3d import checkpoints, provenance
from latdiff3d.errors import InputError, root_input_error
from latdiff3d.sample_folders import masks_at, sample_to_folder
from latdiff3d.synthesis import Model


@pytest.fixture(scope="module")
def model(tiny_runs):
    return Model.load(tiny_runs.diffusion)


@pytest.fixture(scope="module")
def mask(phantoms):
    return phantoms / "phantom_0004" / "phantom_0004_seg.nii.gz"


def test_each_case_is_yielded_when_it_is_written(model, mask, tmp_path):
    shutil.copy(mask, tmp_path / "a_seg.nii.gz")
    made = sample_to_folder(model, [tmp_path / "a_seg.nii.gz", mask], tmp_path / "out", seed=3)
    name, sample, files = next(made)
    assert name == "a" and [file.name for file in files] == [f"a_{m}.nii.gz" for m in model.modalities]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]  # the second is yet to be made
    written = np.stack([nib.load(file).get_fdata(dtype=np.float32) for file in files])
    assert np.array_equal(written, sample.on_mask_grid()[0])
    assert [name for name, _, _ in made] == ["phantom_0004"]


def test_every_mask_is_looked_at_before_the_first_volume_is_made(model, mask, tmp_path, monkeypatch):
    bad = nib.load(mask)
    voxels = np.asarray(bad.dataobj).copy()
    voxels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(voxels, bad.affine), tmp_path / "bad_seg.nii.gz")
    monkeypatch.setattr(Model, "sample", lambda *_: pytest.fail("a volume was made"))
    with pytest.raises(Exception) as error:
        list(sample_to_folder(model, [mask, tmp_path / "bad_seg.nii.gz"], tmp_path / "out"))
    assert "bad_seg.nii.gz has labels {7}" in str(root_input_error(error.value))
    assert not (tmp_path / "out").exists()


def test_a_file_or_a_folder_names_masks(mask, tmp_path):
    assert masks_at(mask) == [mask]
    for name in ("b.nii", "a_seg.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in masks_at(tmp_path)] == ["a_seg.nii.gz", "b.nii"]
    with pytest.raises(InputError, match="there is no mask at"):
        masks_at(tmp_path / "nowhere")


def test_the_sidecar_says_what_made_a_sample_and_on_what(model, mask, tmp_path):
    [(name, _, files)] = sample_to_folder(model, [mask], tmp_path, seed=3)
    said = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert said["Seed"] == 3 and said["Sampler"] == "ddim" and said["Steps"] == 3
    assert said["Device"].startswith("cpu") and said["Precision"] == model.synthesizer.precision
    assert said["NumThreads"] == torch.get_num_threads()
    assert list(said["Files"]) == [*(file.name for file in files), f"{name}_seg.nii.gz"]
    found = provenance.inspect(files[0])
    assert found.unchanged and found.said["Checkpoint"]["SHA256"] == checkpoints.sha256(model.path)


def test_a_picture_lies_beside_each_case_unless_it_is_left_out(model, mask, tmp_path):
    list(sample_to_folder(model, [mask], tmp_path / "a", seed=3, gif=True))
    list(sample_to_folder(model, [mask], tmp_path / "b", seed=3, gif=True))
    list(sample_to_folder(model, [mask], tmp_path / "none", seed=3, picture=False))
    for ending in ("png", "gif"):
        [one], [other] = (list((tmp_path / out).rglob(f"*.{ending}")) for out in "ab")
        assert one.name == f"phantom_0004.{ending}" and one.read_bytes() == other.read_bytes()
    assert not [*(tmp_path / "none").rglob("*.png"), *(tmp_path / "none").rglob("*.gif")]
    assert len(list((tmp_path / "none").rglob("*.nii.gz"))) == 5
