"""What is asked for and the volumes it comes to, the same through every door."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import run_here

from latdiff3d.errors import InputError
from latdiff3d.inference import Jobs
from latdiff3d.sample_folders import DEFAULTS, make
from latdiff3d.sampling_jobs import Request


@pytest.fixture
def masks(mask, tmp_path):
    """Return a folder of two masks and one that no volume can be made for."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(mask, folder / f"{name}_seg.nii.gz")
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.uint8), image.affine), folder / "c_seg.nii.gz")
    return folder


def test_what_is_made_already_is_not_left(model, masks, tmp_path, capsys):
    work = Request(masks).work(model, tmp_path / "out")
    assert [job.name for job in work.jobs] == [job.name for job in work.left] == ["a", "b"]
    assert work.num_masks == 3 and [*work.refused] == [str(masks / "c_seg.nii.gz")]
    assert "error: c_seg.nii.gz has labels {7}" in capsys.readouterr().err
    assert work.said("out") == "2 synthetic cases are in out, such as out/a"
    list(make(model, work.left[:1], tmp_path / "out"))
    again = Request(masks).work(model, tmp_path / "out")
    assert [job.name for job in again.left] == ["b"] and len(again.jobs) == 2
    assert again.said("out") == "2 synthetic cases are in out, such as out/a; 1 of them were there"


def test_a_splits_masks_bring_what_is_known_of_them(model, phantoms):
    jobs = Request(data=phantoms, num_samples=2, seed=5, grid="crop").work(model, "out").jobs
    assert [(job.name, job.seed) for job in jobs] == [
        (f"phantom_{case:04d}_seed{seed:04d}", seed) for case in (4, 5) for seed in (5, 6)
    ]
    assert {job.provenance["Grid"] for job in jobs} == {"crop"}


def test_the_only_mask_that_is_bad_is_one_line_through_every_door(model, tiny_runs, masks, tmp_path, capsys):
    bad = masks / "c_seg.nii.gz"
    with pytest.raises(InputError, match=r"^c_seg\.nii\.gz has labels \{7\}"):
        Request(bad).work(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"^c_seg\.nii\.gz has labels \{7\}"):
        Jobs(model, str(tmp_path / "out"), str(bad), "data", "val", 1, 0, "mask", {}, DEFAULTS)
    assert not capsys.readouterr().err
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", bad, "--out", tmp_path / "out")
    assert ended.code == 2 and ended.err.startswith("error: c_seg.nii.gz has labels {7}") and ended.err.count("\n") == 1


def test_another_grid_is_refused_before_any_model_is_read():
    with pytest.raises(InputError, match="grid is 'latent'; expected mask or crop"):
        Request(grid="latent")
