"""Guidance: what it computes, what it costs, where it acts, and that training and sampling share one null."""

import pytest
import torch
from conftest import run_here
from monai.networks.nets import DiffusionModelUNet

from latdiff3d.conditioning import Condition, MaskCondition, ScalarCondition, dropped
from latdiff3d.errors import InputError
from latdiff3d.guidance import Guidance, guidance_for

CLASSES, CHANNELS = 3, 2


def fractions(count=2):
    mask = torch.randint(CLASSES, (count, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    return Condition(MaskCondition(CLASSES, 2)(mask))


def said(count=2):
    return torch.arange(2.0 * count).view(count, 2)


def noisy(count=2):
    return torch.randn(count, CHANNELS, 8, 8, 8, generator=torch.Generator().manual_seed(1))


class Counted:
    """A denoiser that says the condition's mean, and how large each batch was."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, condition):
        self.batches.append(len(z))
        return z + condition.grid.mean(dim=(1, 2, 3, 4), keepdim=True)


def test_the_prediction_is_extrapolated_from_the_null():
    condition, z = fractions(), noisy()
    guided = Guidance(3.0)(Counted(), z, condition, 0.5)
    assert torch.allclose(guided, z + 3 * condition.grid.mean(dim=(1, 2, 3, 4), keepdim=True), atol=1e-5)


def test_samples_can_be_pushed_away_from_another_condition_than_the_null():
    condition, other, z = fractions(), Condition(torch.full((2, CLASSES, 8, 8, 8), 0.2)), noisy()
    for in_sequence in (False, True):
        guided = Guidance(3.0, against=other, in_sequence=in_sequence)(Counted(), z, condition, 0.5)
        assert torch.allclose(guided, z + 0.2 + 3 * (condition.grid.mean((1, 2, 3, 4), keepdim=True) - 0.2), atol=1e-5)


def test_scale_0_is_the_null_and_scale_1_the_denoisers_own():
    condition, z = fractions(), noisy()
    assert torch.allclose(Guidance(0.0)(Counted(), z, condition, 0.5), z)
    assert torch.equal(Guidance(1.0)(Counted(), z, condition, 0.5), Counted()(z, condition))


@pytest.mark.parametrize(
    ("guidance", "sigma", "batches"),
    [
        (Guidance(1.0), 0.5, [2]),
        (Guidance(2.0), 0.5, [4]),
        (Guidance(2.0, in_sequence=True), 0.5, [2, 2]),
        (Guidance(2.0, (0.2, 0.6)), 0.2, [4]),
        (Guidance(2.0, (0.2, 0.6)), 0.6, [4]),
        (Guidance(2.0, (0.2, 0.6)), 0.61, [2]),
        (Guidance(2.0, (0.2, 0.6)), 0.19, [2]),
    ],
)
def test_a_second_prediction_is_made_only_where_guidance_acts(guidance, sigma, batches):
    predict = Counted()
    guidance(predict, noisy(), fractions(), sigma)
    assert predict.batches == batches


def test_batched_and_in_sequence_agree():
    torch.manual_seed(0)
    unet = DiffusionModelUNet(
        3, CHANNELS + CLASSES, CHANNELS, num_res_blocks=1, channels=(8, 8), norm_num_groups=4,
        attention_levels=(False, True), num_head_channels=8,
    ).eval()  # fmt: skip
    for parameter in unet.out.parameters():  # MONAI starts it at 0, where all predictions agree
        torch.nn.init.normal_(parameter)

    def predict(z, condition):
        return unet(torch.cat([z, condition.grid], 1), torch.full((len(z),), 500))

    with torch.no_grad():
        batched, in_sequence, own = (
            guidance(predict, noisy(), fractions(), 0.5)
            for guidance in (Guidance(2.5), Guidance(2.5, in_sequence=True), Guidance())
        )
    assert (batched - in_sequence).abs().max() < 1e-5 * batched.abs().max()
    assert (batched - own).abs().max() > 1e-3 * batched.abs().max()


def test_an_unconditional_model_is_asked_once():
    predict_calls = []

    def predict(z, condition):
        predict_calls.append(condition)
        return z

    Guidance(2.0)(predict, noisy(), Condition(), 0.5)
    assert predict_calls == [Condition()]


# Dropout


def test_no_mask_is_the_null():
    assert torch.allclose(fractions().grid.sum(1), torch.ones(1)) and MaskCondition.null_value == 0
    assert ScalarCondition(CLASSES, 2)(torch.zeros(1, 1, 4, 4, 4)).min() == 0 > ScalarCondition.null_value


def test_the_null_is_the_conditions_own():
    seen = []

    def predict(z, condition):
        seen.append(condition)
        return z

    condition = Condition(fractions().grid, said())
    Guidance(2.0, null_value=-1.0)(predict, noisy(), condition, 0.5)
    assert torch.equal(seen[0].grid[:2], condition.grid) and (seen[0].grid[2:] == -1).all()
    assert torch.equal(seen[0].covariates[:2], said()) and seen[0].covariates[2:].isnan().all()
    lost = dropped(condition, 0.999999, -1.0)
    assert (lost.grid == -1).all() and lost.covariates.isnan().all()


def test_covariates_alone_guide_too_batched_and_in_sequence():
    def predict(z, condition):
        return z + condition.covariates.nan_to_num(nan=-1.0).sum(1).view(-1, 1, 1, 1, 1)

    for in_sequence in (False, True):
        guided = Guidance(3.0, in_sequence=in_sequence)(predict, noisy(), Condition(None, said()), 0.5)
        expected = noisy() - 2 + 3 * (said().sum(1) + 2).view(-1, 1, 1, 1, 1)
        assert torch.allclose(guided, expected, atol=1e-5)


def test_volumes_lose_their_conditions_one_by_one_at_the_rate_that_is_asked():
    torch.manual_seed(0)
    grid = fractions(1).grid.expand(4000, -1, -1, -1, -1)
    left = dropped(Condition(grid, torch.ones(4000, 1)), 0.1, 0.0)
    lost, kept = (left.grid == 0).flatten(1).all(1), (left.grid == grid).flatten(1).all(1)
    assert torch.equal(lost, left.covariates[:, 0].isnan())  # both go together
    assert torch.equal(lost, ~kept)
    assert 0.08 < lost.float().mean() < 0.12 and 0.88 < kept.float().mean() < 0.92


def test_without_dropout_no_random_number_is_drawn():
    state = torch.get_rng_state()
    condition = fractions()
    assert dropped(condition, 0, 0.0) is condition
    assert torch.equal(torch.get_rng_state(), state)


# Mistakes


@pytest.mark.parametrize("scale", [-0.1, float("nan")])
def test_a_scale_below_0_is_refused(scale):
    with pytest.raises(InputError, match=r"guidance is .*; expected a number from 0 on"):
        Guidance(scale)


@pytest.mark.parametrize("interval", [(0.6, 0.2), (-0.1, 1), (0, 1.1)])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(InputError, match=r"guidance_interval is .*; expected two noise levels"):
        Guidance(2.0, interval)


def test_a_model_that_never_went_without_its_mask_cannot_be_guided():
    with pytest.raises(InputError, match=r"guidance is 2\.0, but this model .*train with condition_dropout=0\.1"):
        guidance_for(2.0, (0, 1), 0.0, False, condition_dropout=0)
    assert guidance_for(1.0, (0, 1), 0.0, False, condition_dropout=0) == Guidance()
    assert guidance_for(2.0, (0, 1), -1.0, True, condition_dropout=0.1) == Guidance(2.0, (0, 1), -1.0, True)


# In the sampling command


def test_guidance_reaches_the_samples_and_their_record(tiny_runs, tmp_path):
    import nibabel

    mask = sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]
    voxels = {}
    for scale in ("1", "4"):
        words = ("--model", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / scale, "--guidance", scale)
        assert run_here("sample", *words).code == 0
        voxels[scale] = nibabel.load(sorted((tmp_path / scale).rglob("*t1.nii.gz"))[0]).get_fdata()
        [record] = (tmp_path / scale).rglob("*.json")
        assert f'"Guidance": {scale}.0' in record.read_text()
    assert abs(voxels["1"] - voxels["4"]).max() > 1e-4
