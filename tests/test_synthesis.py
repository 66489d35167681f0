"""What a loaded model says of itself, and where its samples lie."""

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from latdiff3d import checkpoints
from latdiff3d.conditioning import Condition
from latdiff3d.errors import InputError, root_input_error
from latdiff3d.guidance import Guidance
from latdiff3d.model_cases import cases_of_split
from latdiff3d.samplers import dpm_solver_pp_2m
from latdiff3d.synthesis import Model


def test_a_loaded_model_knows_what_it_was_trained_on(model, tiny_runs):
    assert model.path == tiny_runs.diffusion / "checkpoints" / "best.pt"
    assert model.crop_to == [16, 16, 16] and model.modalities == ["flair", "t1", "t1ce", "t2"]
    assert model.spacing_mm == pytest.approx([3, 3, 3], abs=1e-5)
    assert model.is_conditional and model.synthesizer.num_steps == 3 == len(model.synthesizer.times) - 1


def test_the_steps_are_checked_when_the_model_is_loaded(tiny_runs):
    assert len(Model.load(tiny_runs.diffusion, num_steps=7).synthesizer.times) == 8
    with pytest.raises(InputError, match="steps is 0; expected 1 to 1000"):
        Model.load(tiny_runs.diffusion, num_steps=0)


def test_what_concerns_sampling_alone_may_differ_from_the_configuration(tiny_runs):
    settings = {"sampler": "dpm_solver++", "guidance": 2, "guidance_interval": [0.1, 0.8]}
    model = Model.load(tiny_runs.diffusion, num_steps=4, settings=settings)
    assert model.synthesizer.solve is dpm_solver_pp_2m
    assert model.synthesizer.times == model.synthesizer.schedule.times(4, "log_snr")
    assert model.synthesizer.guidance == Guidance(2, (0.1, 0.8))
    model = Model.load(tiny_runs.diffusion, num_steps=4, settings={"sampling_spacing": "trailing"})
    assert model.synthesizer.times == model.synthesizer.schedule.times(4, "trailing")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"crop_to": [8, 8, 8]}, r"sampling sets the unknown key crop_to; .*sampler"),
        ({"sampling_stepps": 4}, r"unknown key sampling_stepps; did you mean sampling_steps\?"),
        ({"sampling_spacing": "leading"}, "sampling_spacing is 'leading'; expected one of linear"),
        ({"sampling_eta": 0.5, "sampler": "ddpm"}, r"sampling_eta is 0\.5, which only the sampler 'ddim' has"),
        ({"guidance_interval": [0.8, 0.1]}, r"guidance_interval is \[0\.8, 0\.1\]; expected two noise levels"),
    ],
)
def test_other_sampling_settings_are_refused(tiny_runs, settings, line):
    with pytest.raises(Exception) as error:
        Model.load(tiny_runs.diffusion, settings=settings)
    assert re.search(line, str(root_input_error(error.value)))


def test_a_setting_that_an_earlier_version_lacked_is_asked_for(tiny_runs, monkeypatch):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt", "diffusion")
    earlier = content | {"config": content["config"].replace("sampling_eta: 0\n", "")}
    monkeypatch.setattr(checkpoints, "load", lambda *_: earlier)
    with pytest.raises(InputError, match=r"best\.pt is of an earlier version, without sampling_eta; give key=value"):
        Model.load(tiny_runs.diffusion)
    assert Model.load(tiny_runs.diffusion, settings={"sampling_eta": 0.5}).synthesizer.eta == 0.5


def test_a_sample_is_a_volume_on_its_masks_grid(model, mask):
    sample = model.sample(mask, seed=3)
    assert sample.volume.shape == (4, 16, 16, 16) and sample.volume.device.type == "cpu"
    assert sample.volume.min() >= 0 and sample.volume.max() <= 1
    assert nib.aff2axcodes(sample.affine) == ("R", "A", "S")
    volume, affine = sample.on_mask_grid()
    assert volume.shape == (4, *nib.load(mask).shape)
    assert np.allclose(affine, nib.load(mask).affine, atol=1e-5)
    assert np.allclose(np.sort(volume.ravel()), np.sort(sample.volume.numpy().ravel()))  # the phantoms fill the crop


def test_a_sample_depends_on_seed_and_mask_alone(model, mask):
    one = model.sample(mask, seed=3).volume
    torch.manual_seed(99)
    assert torch.equal(model.sample(mask, seed=3).volume, one)
    assert not torch.equal(model.sample(mask, seed=4).volume, one)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_volume_is_the_same_whatever_is_sampled_beside_it(model, sampler):
    synthesizer = replace(model.synthesizer, sampler=sampler, precision="fp32")
    masks = torch.randint(4, (2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    condition = synthesizer.condition(masks)
    together = synthesizer.sample((4, 8, 8, 8), Condition(condition), [3, 4])
    alone = synthesizer.sample((4, 8, 8, 8), Condition(condition[1:]), [4])
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert not torch.allclose(together[:1], alone, atol=1e-2)


def test_a_conditional_model_needs_a_mask(model):
    for use in (model.grid_of, lambda mask: model.sample(mask, 0)):
        with pytest.raises(InputError, match=r"best\.pt is conditioned on masks; give --mask FILE_OR_FOLDER"):
            use(None)


def test_a_splits_cases_are_read_as_the_model_reads_data(model, phantoms):
    assert [case["case"] for case in cases_of_split(model, phantoms, "val")] == ["phantom_0004", "phantom_0005"]
    assert len(cases_of_split(model, phantoms, "train")) == 4
    with pytest.raises(InputError, match=r"has no test case; choose another --split, or list some in test\.list"):
        cases_of_split(model, phantoms, "test")
    with pytest.raises(InputError, match="split is 'all'; expected train, val or test"):
        cases_of_split(model, phantoms, "all")
