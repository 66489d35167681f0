"""What a plain setting must be is told, with what was found, before anything runs."""

import pytest

from latdiff3d.config import DEFAULT_BUNDLE, STAGE_FILES, bundle_files, merged
from latdiff3d.errors import InputError
from latdiff3d.settings import EXPECTED, USED_ONLY_WITH, check_settings, refuse_unused

BAD_SETTINGS = {
    "batch_size": [0, -1, 2.5, True, "two", None, [2]],
    "accumulate_grad_batches": [0, 1.5, True, None],
    "max_epochs": [0, "many"],
    "val_interval": [0, 1.5],
    "encode": ["once", True, None],
    "encode_memory_gb": [0, "much"],
    "flips": [0, None, [3], [0, 0], [True], ["x"], [[0]]],
    "compile": [1, None],
    "num_fine_cases": [0, -1, 1.5, True, "few"],
    "num_workers": [-1, "4", None, True, "many"],
    "prefetch_factor": [0, 1.5, "auto"],
    "cache": ["smart", True, None],
    "cache_rate": [-0.1, 1.5, "half", None],
    "skip_bad_cases": ["yes", 1, None],
    "checkpoint_every": [-1, 0.5, None],
    "keep_checkpoints": [0, "2"],
    "time_distribution": ["normal"],
    "min_snr_gamma": [0, "five"],
    "sampling_spacing": ["leading"],
    "sampling_eta": [-0.1, 1.5, "some"],
    "condition_dropout": [-0.1, 1],
    "sampling_steps": [0, 2.5],
    "quality_cases": [-1, 2.5],
    "latent_channels": [0, "four"],
    "initial_posterior_std": [0, "small", None],
    "seed": [-1, 0.5, "x"],
    "learning_rate": [0, -1e-3, "fast", None],
    "mlflow": [True, None],
    "first_stage": [3, None],
    "modalities": [[], "t1", [1], None, ["t1", "t1"]],
    "labels": [[], [1, 2, 4], 3, [0, 0.5], "0,1,2", [0, 1, 1], [0, 0], [0, True]],
    "intensity_percentiles": [99, [99], [0, "max"]],
    "spacing": [2, [1, 1], [1, 1, 0], [1, 1, "x"], "1,1,1"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_SETTINGS.items() for value in values], ids=str
)
def test_a_bad_plain_setting_is_told_with_what_is_expected(key, value):
    with pytest.raises(InputError) as error:
        check_settings({key: value})
    assert str(error.value) == f"{key} is {value!r}; expected {EXPECTED[key][1]}."


def test_every_expectation_is_tested_and_is_a_key_of_the_bundle():
    assert set(BAD_SETTINGS) == set(EXPECTED)
    keys = {key for stage in STAGE_FILES for key in merged(bundle_files(DEFAULT_BUNDLE, stage))}
    assert set(EXPECTED) <= keys


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 1, "seed": 0, "learning_rate": 1, "flips": [], "num_workers": 0, "first_stage": ""},
        {"spacing": None, "encode_memory_gb": None, "encode": "on_the_fly", "flips": [2, 0]},
        {"num_workers": "auto", "prefetch_factor": None, "cache": "disk", "cache_rate": 1},
        {"spacing": [1, 1.5, 3], "labels": [0], "modalities": ["t1"], "intensity_percentiles": [0.5, 99.5]},
        {"max_epochs": 3, "val_interval": 3},
        {"batch_size": "@train::size", "max_epochs": "$2 * 3", "val_interval": "%other.yaml::val_interval"},
    ],
)
def test_good_settings_and_expressions_pass(settings):
    check_settings(settings)


def test_a_validation_that_would_never_happen_is_told():
    with pytest.raises(InputError, match="val_interval 4 is above max_epochs 3; expected a validation before the end"):
        check_settings({"max_epochs": 3, "val_interval": 4})


@pytest.mark.parametrize("stage", STAGE_FILES)
def test_the_bundles_own_settings_pass(stage):
    check_settings(merged(bundle_files(DEFAULT_BUNDLE, stage)))


# Settings that nothing uses


@pytest.fixture
def own():
    return merged(bundle_files(DEFAULT_BUNDLE, "diffusion"))


@pytest.mark.parametrize("conditioning", ["concat", "scalar", "none"])
@pytest.mark.parametrize(
    ("key", "changed", "named"),
    [
        ("condition_encoder_def", {"channels": 64}, "condition_encoder_def::channels"),
        ("condition_encoder_def", {"norm_num_groups": 4}, "condition_encoder_def::norm_num_groups"),
        ("condition_encoder_def", {"_target_": "torch.nn.Conv3d"}, "condition_encoder_def::_target_"),
        ("encoded_channels", 4, "encoded_channels"),
    ],
)
def test_what_is_set_for_an_encoder_that_is_not_there_is_refused(own, conditioning, key, changed, named):
    value = {**own[key], **changed} if isinstance(changed, dict) else changed
    resolved = {**own, "conditioning": conditioning, key: value}
    with pytest.raises(InputError) as error:
        refuse_unused(resolved, own)
    assert str(error.value) == (
        f"{named} is set, and with conditioning {conditioning!r} nothing uses it; set conditioning=encoder, or leave "
        f"{named} out."
    )
    refuse_unused({**resolved, "conditioning": "encoder"}, own)


def test_what_the_bundle_itself_sets_is_no_users_mistake(own):
    for conditioning in ("concat", "none", "encoder"):
        refuse_unused({**own, "conditioning": conditioning}, own)
    assert set(USED_ONLY_WITH) <= set(own) and {switch for switch, _ in USED_ONLY_WITH.values()} <= set(own)
