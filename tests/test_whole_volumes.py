"""Volumes as large as their masks: by windows and tiles, in a budget, where they lie; and the crop's where it fits."""

import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, reference_sampler, refused, run_here, train_here

from latdiff3d import preflight
from latdiff3d.conditioning import Condition, MaskCondition, NoCondition, PackedCondition
from latdiff3d.errors import InputError
from latdiff3d.sample_folders import is_made, jobs_for
from latdiff3d.synthesis import Model
from latdiff3d.volumes import mask_on_model_grid

SHAPE = (20, 16, 37)  # longer than the crop of 16³ on two axes, on one by no whole cells
AFFINE = np.array([[-2.5, 0, 0, 30], [0, 0, 3.0, -7], [0, 3.5, 0, 11], [0, 0, 0, 1]])  # LSA: turned to RAS


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A mask of SHAPE in an orientation of its own, with a label at either end of its longest axis."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:10, 4:10, 2:8] = 1
    mask[4:10, 4:12, 24:34] = 2
    mask[6:9, 6:9, 28:31] = 4
    path = tmp_path_factory.mktemp("large") / "large_seg.nii.gz"
    nib.save(nib.Nifti1Image(mask, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def made(model, large):
    return model.sample(large, seed=3, whole=True)


def test_a_volume_is_as_large_as_its_mask_and_lies_on_it(made, large):
    volume, affine = made.on_mask_grid()
    assert volume.shape == (4, *SHAPE) and np.allclose(affine, AFFINE)
    assert made.volume.shape == (4, 20, 38, 16)  # RAS, padded to whole cells of 2
    assert made.volume.min() >= 0 and made.volume.max() <= 1
    assert (volume.reshape(4, -1).std(1) > 0).all() and (volume[..., :2].any() and volume[..., -2:].any())


def test_nothing_of_it_is_cut_or_moved(model, large):
    grid = model.for_whole_masks().grid_of(large)
    there = grid.to_mask_grid(grid.mask.as_tensor())[0]
    stored = np.asarray(nib.load(large).dataobj)
    assert np.array_equal(there, np.where(stored == 4, 3, stored))


def test_a_smaller_mask_is_padded_to_the_crop_as_it_is_without(model, tmp_path):
    mask = np.zeros((9, 16, 21), np.uint8)
    mask[2:6, 4:9, 5:9] = 1
    nib.save(nib.Nifti1Image(mask, np.diag([3.0, 3, 3, 1])), tmp_path / "a_seg.nii.gz")
    grid = model.for_whole_masks().grid_of(tmp_path / "a_seg.nii.gz")
    assert grid.mask.shape == (1, 16, 16, 22)
    assert np.array_equal(grid.to_mask_grid(grid.mask.as_tensor())[0], mask)


@pytest.mark.parametrize("memory_gb", [None, 6])
def test_a_mask_of_the_crops_size_makes_the_same_volume_as_without(model, mask, memory_gb):
    assert nib.load(mask).shape == tuple(model.crop_to)
    whole = model.sample(mask, seed=3, whole=True, memory_gb=memory_gb)
    assert torch.equal(whole.volume, model.sample(mask, seed=3).volume)


def test_a_whole_volume_depends_on_seed_and_mask_alone(model, large, made):
    torch.manual_seed(99)
    assert torch.equal(model.sample(large, seed=3, whole=True).volume, made.volume)
    assert not torch.equal(model.sample(large, seed=4, whole=True).volume, made.volume)


def test_the_noise_of_the_whole_is_one_draw(model, monkeypatch):
    synthesizer = replace(model.synthesizer)
    begun = []
    synthesizer.solve = lambda split, noise, *_, **__: begun.append(noise) or noise
    condition = Condition(synthesizer.condition(torch.zeros(1, 1, 24, 16, 40)))
    synthesizer.sample((4, 12, 8, 20), condition, [5], window=(8, 8, 8))
    assert torch.equal(begun[0][0], torch.randn(4, 12, 8, 20, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_and_every_sampler_go_window_by_window(model, in_sequence, sampler):
    guidance = replace(model.synthesizer.guidance, scale=2.0, in_sequence=in_sequence)
    synthesizer = replace(model.synthesizer, sampler=sampler, guidance=guidance)
    sizes = []
    hook = synthesizer.denoiser.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    condition = Condition(synthesizer.condition(torch.ones(1, 1, 24, 16, 16)))
    volume = synthesizer.sample((4, 12, 8, 8), condition, [5], window=(8, 8, 8))
    hook.remove()
    assert volume.shape == (1, 4, 24, 16, 16) and volume.std() > 0
    assert set(sizes) == {(1 if in_sequence else 2, 8, 8, 8, 8)}  # 4 latent channels and 4 labels


def test_an_encoded_condition_and_covariates_go_with_their_window():
    grid, covariates = torch.rand(1, 6, 12, 8, 20), torch.tensor([[1.0, 2.0]])
    part = Condition(grid, covariates).window((slice(2, 10), slice(0, 8), slice(12, 20)))
    assert torch.equal(part.grid, grid[:, :, 2:10, :, 12:20]) and part.covariates is covariates
    assert Condition(None, covariates).window((slice(0, 1),) * 3).grid is None


@pytest.mark.parametrize("kind", [MaskCondition, PackedCondition])
def test_a_windows_condition_is_that_of_its_crop(kind):
    condition = kind(4, factor=2)
    mask = torch.randint(4, (1, 1, 24, 16, 40), generator=torch.Generator().manual_seed(0))
    part = Condition(condition(mask)).window((slice(2, 10), slice(0, 8), slice(12, 20)))
    assert torch.equal(part.grid, condition(mask[..., 4:20, :16, 24:40]))


def test_a_model_with_a_learned_condition_encoder_makes_whole_volumes(tiny_runs, phantoms, large, tmp_path):
    settings = {"conditioning": "encoder", "first_stage": str(tiny_runs.autoencoder), "max_epochs": 1}
    overlay = REPOSITORY / "configs" / "condition_encoder.yaml"
    ended = train_here("diffusion", phantoms, tmp_path, "encoded", "--config", overlay, **settings)
    assert ended.code == 0, ended.err
    sample = Model.load(tmp_path / "encoded").sample(large, seed=3, whole=True)
    assert sample.volume.shape == (4, 20, 38, 16) and sample.volume.std() > 0


# the budget


@pytest.fixture
def all_for_decoding(monkeypatch):
    """Let the whole budget be the decoder's: what the rest takes is more than these tiny networks and volumes do."""
    monkeypatch.setattr("latdiff3d.synthesis.left_of", lambda memory_gb, *_: memory_gb)


def test_less_memory_decodes_by_tiles_to_the_same_volume(model, large, all_for_decoding, monkeypatch):
    in_fp32 = replace(model, synthesizer=replace(model.synthesizer, precision="fp32"))
    monkeypatch.setattr(in_fp32.synthesizer.codec, "precision", "fp32")
    at_once = in_fp32.sample(large, seed=3, whole=True, memory_gb=1).volume
    with pytest.raises(InputError) as error:
        in_fp32.sample(large, seed=3, whole=True, memory_gb=1e-4)
    needed = float(re.search(r"need ([\d.]+)\.", str(error.value)).group(1))
    assert in_fp32.synthesizer.codec.decoding_tiles((10, 19, 8), 1) is None
    assert in_fp32.synthesizer.codec.decoding_tiles((10, 19, 8), needed).tile[1] < 19
    assert torch.allclose(in_fp32.sample(large, seed=3, whole=True, memory_gb=needed).volume, at_once, atol=1e-4)


def test_too_little_memory_is_told_before_anything_is_denoised(model, large, monkeypatch, request):
    def never(*_, **__):
        raise AssertionError("denoised")

    monkeypatch.setattr(model.synthesizer, "solve", never)
    with pytest.raises(InputError, match=r"memory is 0\.5 GB; the program, the model and this volume need 1\.\d"):
        model.sample(large, seed=3, whole=True, memory_gb=0.5)
    request.getfixturevalue("all_for_decoding")
    with pytest.raises(InputError, match=r"the smallest tile, .* need [\d.]+\. Give at least that"):
        model.sample(large, seed=3, whole=True, memory_gb=1e-4)


def test_memory_that_nothing_keeps_to_is_refused(model, large, tmp_path):
    with pytest.raises(InputError, match="memory_gb is 6, which only whole volumes keep to; add whole=True"):
        model.sample(large, seed=3, memory_gb=6)
    ended = run_here("sample", "-r", model.path, "--mask", large, "--out", tmp_path / "out", "--memory", "6GB")
    assert "--memory is '6GB', which only whole volumes keep to; add --whole" in refused(ended)
    ended = run_here("sample", "-r", model.path, "--mask", large, "--out", tmp_path / "out", "--whole", "--memory", "x")
    assert "memory is 'x'; expected GB above 0" in refused(ended)
    assert not (tmp_path / "out").exists()


def test_an_unconditional_model_has_no_whole(model):
    unconditional = replace(model, synthesizer=replace(model.synthesizer, condition=NoCondition()))
    with pytest.raises(InputError, match="is an unconditional model, and no mask says how large a volume is whole"):
        unconditional.for_whole_masks()


# folders


def test_a_label_outside_the_crop_is_no_finding_of_a_whole_volume(model, large):
    assert [line for line in preflight.examine(model, large).warnings if "model's crop" in line]
    whole = preflight.examine(model.for_whole_masks(), large)
    assert not whole.errors and not [line for line in whole.warnings if "model's crop" in line]


@pytest.mark.parametrize("program", ["latdiff3d", "inference/sample.py"])
def test_the_commands_make_whole_volumes_once(model, large, made, tmp_path, program):
    words = ["-r", model.path, "--mask", large, "--out", tmp_path / "out", "--seed", 3, "--whole", "--memory", "5GB"]
    by = {} if program == "latdiff3d" else {"program": reference_sampler}
    ended = run_here(*(["sample"] if not by else []), *words, **by)
    assert ended.code == 0, ended.err
    image = nib.load(tmp_path / "out" / "large" / "large_t1.nii.gz")
    assert image.shape == SHAPE and np.allclose(image.affine, AFFINE)
    assert np.array_equal(image.get_fdata(dtype=np.float32), made.on_mask_grid()[0][1])
    said = json.loads((tmp_path / "out" / "large" / "large.json").read_text())
    assert (said["Extent"], said["MemoryGB"], said["Grid"]) == ("whole", 5, "mask")
    again = run_here(*(["sample"] if not by else []), *words, **by)
    assert "1 of them were there" in again.out


def test_a_crop_or_another_budget_is_another_volume(model, large, tmp_path):
    ended = run_here("sample", "-r", model.path, "--mask", large, "--out", tmp_path / "out", "--whole")
    assert ended.code == 0, ended.err
    for other, expected in (
        (model.for_whole_masks(6), True),
        (model.for_whole_masks(5), False),
        (model.for_whole_masks(), False),
        (model, False),
    ):
        [job], _ = jobs_for(other, [large])
        assert is_made(job, tmp_path / "out") == expected


def test_a_whole_mask_on_the_models_grid_ends_in_whole_cells(model, large):
    grid = mask_on_model_grid(large, model.preprocessing, model.crop_to, cell=8)
    assert grid.mask.shape == (1, 24, 40, 16)
