"""The Python API: `latdiff3d.load(path).sample(mask, seed)` gives what the commands write."""

import nibabel as nib
import numpy as np
import pytest
from conftest import run_here, run_process

import latdiff3d
from latdiff3d.synthesis import Model


def test_load_is_that_of_the_doors():
    assert latdiff3d.load == Model.load
    assert "load" in dir(latdiff3d)
    with pytest.raises(AttributeError, match="'latdiff3d' has no attribute 'lod'"):
        _ = latdiff3d.lod


def test_importing_latdiff3d_imports_no_pytorch():
    ended = run_process("-c", "import sys, latdiff3d; print({'torch', 'monai', 'numpy'} & set(sys.modules))")
    assert ended.out == "set()\n", ended.err


def test_a_sample_of_the_api_is_the_volume_that_the_command_writes(tiny_runs, tmp_path):
    mask = tiny_runs.data / "phantom_0004" / "phantom_0004_seg.nii.gz"
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path, "--seed", 5, "--steps", 2)
    assert ended.code == 0, ended.err
    model = latdiff3d.load(tiny_runs.diffusion, num_steps=2)
    volume, affine = model.sample(mask, seed=5).on_mask_grid()
    for channel, modality in zip(volume, model.modalities, strict=True):
        written = nib.load(tmp_path / "phantom_0004" / f"phantom_0004_{modality}.nii.gz")
        assert np.array_equal(written.get_fdata(dtype=np.float32), channel)
        assert np.allclose(written.affine, affine, atol=1e-5)
