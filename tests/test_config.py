"""A bundle, overlays and the command line become one configuration; what is misspelt is refused."""

import re

import pytest
import yaml
from conftest import TINY
from monai.bundle import ConfigParser

from latdiff3d import config
from latdiff3d.errors import InputError, InputExit
from latdiff3d.transforms import RandFlipsd

STAGES = list(config.STAGE_FILES)
OVERLAYS = sorted(config.CONFIG_FOLDER.glob("*.yaml"))
BUNDLE_FILES = sorted(config.DEFAULT_BUNDLE.glob("configs/*.yaml"))


@pytest.fixture
def base():
    return config.merged(config.bundle_files(config.DEFAULT_BUNDLE, "autoencoder"))


@pytest.fixture
def overlay(tmp_path):
    """Write an overlay and return its path."""

    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def workflow(*overlays, stage="autoencoder", **settings):
    return config.training_workflow(overlays, settings, stage)


# Unknown keys


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"max_epoch": 3}, "the unknown key max_epoch; did you mean max_epochs?"),
        ({"autoencoder_def::chanels": [8]}, "autoencoder_def::chanels; did you mean autoencoder_def::channels?"),
        ({"autoencoder_def": {"chanels": [8]}}, "autoencoder_def::chanels; did you mean autoencoder_def::channels?"),
        ({"train": {"optimizer": {"lrr": 1}}}, "train::optimizer::lrr; did you mean train::optimizer::lr?"),
        ({"train::trainer::max_epoch": 3}, "did you mean train::trainer::max_epochs?"),
        ({"train::handlers::99::title": "x"}, "the unknown key train::handlers::99"),
        ({"max_epochs::more": 3}, "the unknown key max_epochs::more"),
        ({"zzzzzz": 3}, "the unknown key zzzzzz; known here: ["),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(base, content, named):
    with pytest.raises(InputError) as error:
        config.refuse_unknown_keys(content, base, "mine.yaml")
    assert str(error.value).startswith("mine.yaml sets the unknown key ")
    assert named in str(error.value)


def test_known_keys_in_every_spelling_pass(base):
    config.refuse_unknown_keys(
        {
            "max_epochs": 3,
            "loss::disc_start": 3,
            "loss": {"disc_start": 3},
            "autoencoder_def": {"channels": [8]},
            "train::handlers::0::handler": 1,
            "+train::handlers": [],
        },
        base,
        "mine.yaml",
    )


def test_an_overlays_key_is_refused_before_anything_runs(overlay):
    with pytest.raises(InputError, match=r"mine\.yaml sets the unknown key crop_too; did you mean crop_to\?"):
        workflow(overlay("crop_too: [16, 16, 16]\n"))


@pytest.mark.parametrize("key", ["loss.disc_strt", "loss::disc_strt"])
def test_the_command_lines_key_is_refused(key):
    with pytest.raises(
        InputError, match=r"the command line sets the unknown key loss::disc_strt; .*loss::disc_start\?"
    ):
        workflow(**{key: 3})


@pytest.mark.parametrize("key", ["autoencoder_def.channels", "autoencoder_def::channels"])
def test_dots_and_colons_both_reach_a_leaf(key):
    parser = workflow(**{key: [8, 8]}).parser
    assert parser["autoencoder_def"]["channels"] == [8, 8]
    assert parser["autoencoder_def"]["_target_"] == "AutoencoderKL"


# Plain settings

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
    "modalities": [[], "t1", [1], None],
    "labels": [[], [1, 2, 4], 3, [0, 0.5], "0,1,2"],
    "intensity_percentiles": [99, [99], [0, "max"]],
    "spacing": [2, [1, 1], [1, 1, 0], [1, 1, "x"], "1,1,1"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_SETTINGS.items() for value in values], ids=str
)
def test_a_bad_plain_setting_is_told_with_what_is_expected(key, value):
    with pytest.raises(InputError) as error:
        config.check_settings({key: value})
    assert str(error.value) == f"{key} is {value!r}; expected {config.EXPECTED[key][1]}."


def test_every_expectation_is_tested_and_is_a_key_of_the_bundle():
    assert set(BAD_SETTINGS) == set(config.EXPECTED)
    keys = {key for stage in STAGES for key in config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage))}
    assert set(config.EXPECTED) <= keys


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
    config.check_settings(settings)


def test_a_validation_that_would_never_happen_is_told():
    with pytest.raises(InputError, match="val_interval 4 is above max_epochs 3; expected a validation before the end"):
        config.check_settings({"max_epochs": 3, "val_interval": 4})


@pytest.mark.parametrize("stage", STAGES)
def test_the_bundles_own_settings_pass(stage):
    config.check_settings(config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage)))


# Overlays


def test_a_dict_in_an_overlay_changes_its_leaves_and_keeps_its_siblings(overlay):
    parser = workflow(overlay("loss:\n  disc_start: 7\ntrain:\n  optimizer: {lr: 0.5}\n")).parser
    assert parser["loss"]["disc_start"] == 7 and parser["loss"]["_target_"] == "latdiff3d.losses.AutoencoderLoss"
    assert parser["train"]["optimizer"]["lr"] == 0.5
    assert parser["train"]["optimizer"]["_target_"] == "torch.optim.Adam"


def test_later_files_win_and_the_command_line_wins_over_all(overlay):
    one = overlay("max_epochs: 1\nval_interval: 1\nbatch_size: 1\nseed: 1\n", "one.yaml")
    two = overlay("max_epochs: 2\nbatch_size: 3\n", "two.yaml")
    parser = workflow(one, two, max_epochs=5).parser
    assert (parser["max_epochs"], parser["batch_size"], parser["seed"]) == (5, 3, 1)
    parser = workflow(two, one).parser
    assert (parser["max_epochs"], parser["batch_size"]) == (1, 1)


def test_the_same_leaf_as_a_dict_and_joined_follows_the_order_too(overlay):
    one, two = overlay("loss: {disc_start: 1}\n", "one.yaml"), overlay("loss::disc_start: 2\n", "two.yaml")
    assert workflow(one, two).parser["loss"]["disc_start"] == 2
    assert workflow(two, one).parser["loss"]["disc_start"] == 1


def test_an_empty_overlay_changes_nothing(overlay):
    assert workflow(overlay("# nothing\n")).parser.get() == workflow().parser.get()


LINEAR = "discriminator_def:\n  _target_: torch.nn.Linear\n  in_features: 3\n  out_features: 2\n"


def test_another_target_replaces_a_component_with_its_arguments(overlay):
    parser = workflow(overlay(LINEAR)).parser
    assert parser["discriminator_def"] == {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}


def test_a_component_takes_the_place_of_null(overlay):
    parser = workflow(overlay("loss::perceptual: {_target_: torch.nn.MSELoss, reduction: sum}\n")).parser
    assert parser["loss"]["perceptual"] == {"_target_": "torch.nn.MSELoss", "reduction": "sum"}
    with pytest.raises(InputError, match=r"the unknown key loss::perceptual::reductoin; did you mean"):
        workflow(overlay("loss::perceptual: {_target_: torch.nn.MSELoss, reductoin: sum}\n"))


def test_later_files_change_and_replace_a_component_that_was_replaced(overlay):
    one, two = overlay(LINEAR, "one.yaml"), overlay("discriminator_def::out_features: 5\n", "two.yaml")
    assert workflow(one, two).parser["discriminator_def"]["out_features"] == 5
    assert workflow(one, two, **{"discriminator_def.in_features": 7}).parser["discriminator_def"]["in_features"] == 7
    with pytest.raises(InputError, match=r"two\.yaml sets the unknown key discriminator_def::out_features"):
        workflow(two, one)
    back = overlay("discriminator_def: {_target_: PatchDiscriminator, spatial_dims: 2}\n", "back.yaml")
    there = {"_target_": "PatchDiscriminator", "spatial_dims": 2}
    assert workflow(one, two, back).parser["discriminator_def"] == there


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LINEAR.replace("in_f", "in_ff"), r"discriminator_def::in_ffeatures; did you mean discriminator_def::in_feat"),
        (LINEAR + "  channels: 16\n", r"the unknown key discriminator_def::channels; known here: \["),
        (LINEAR.replace("nn.Linear", "nn.Linnear"), r"_target_ to 'torch\.nn\.Linnear', where no class or function is"),
    ],
)
def test_what_a_new_component_does_not_take_is_refused(overlay, text, named):
    with pytest.raises(InputError, match=named):
        workflow(overlay(text))


def test_arguments_handed_on_to_a_base_are_known(overlay):
    vq = "autoencoder_def:\n  _target_: latdiff3d.quantization.VQAutoencoder\n"
    assert workflow(overlay(vq + "  n_embed: 4\n  num_res_layers: 2\n")).parser["autoencoder_def"]["n_embed"] == 4
    with pytest.raises(InputError, match=r"unknown key autoencoder_def::num_res_blocks; did you mean"):
        workflow(overlay(vq + "  num_res_blocks: 2\n"))


# Stages


def test_the_stage_comes_from_an_overlay(overlay):
    assert "discriminator" in workflow(overlay("stage: autoencoder\n"), stage=None).parser
    assert "denoiser_def" in workflow(config.CONFIG_FOLDER / "diffusion.yaml", stage=None).parser


def test_no_stage_is_refused(overlay):
    with pytest.raises(InputError, match=r"stage is None; expected 'autoencoder', 'diffusion' or 'segmenter'"):
        workflow(overlay("seed: 3\n"), stage=None)
    with pytest.raises(InputError, match=r"stage is 'autoencodr'"):
        workflow(overlay("stage: autoencodr\n"), stage=None)


def test_two_stages_are_refused(overlay):
    with pytest.raises(InputError, match=r"of stage 'diffusion'; the command trains 'autoencoder'"):
        workflow(overlay("stage: diffusion\n"), stage="autoencoder")


def test_another_bundle_must_be_one(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*common\.yaml; expected `bundle` to name a bundle's folder"):
        workflow(bundle=str(tmp_path))


# Files and words that cannot be read


def test_a_missing_overlay_is_told():
    with pytest.raises(InputError, match=r"cannot read the configuration nowhere\.yaml: No such file"):
        workflow("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2\n", "is not YAML"),
        ("- 1\n- 2\n", "holds a list; expected `key: value` lines"),
        ("3\n", "holds a int"),
    ],
)
def test_an_overlay_that_is_no_mapping_is_told_in_one_line(overlay, text, words):
    with pytest.raises(InputError, match=words) as error:
        workflow(overlay(text))
    assert "\n" not in str(error.value)


def test_a_binary_overlay_is_told(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"x\.yaml is not YAML"):
        workflow(tmp_path / "x.yaml")


def test_settings_are_read_as_yaml():
    assert config.parse_settings(["a=3", "b=[1, 2]", "c=x=y", "d=", "e::f=1.0e-3"]) == {
        "a": 3,
        "b": [1, 2],
        "c": "x=y",
        "d": None,
        "e::f": 0.001,
    }


@pytest.mark.parametrize("word", ["1e-3", "1E-3", "1.0e-3"])
def test_a_number_with_an_exponent_is_a_number(word):
    # YAML 1.1, and so PyYAML, reads 1e-3 as text; nobody who types it means text.
    assert config.parse_settings([f"learning_rate={word}"]) == {"learning_rate": 0.001}


def test_a_number_with_an_exponent_is_one_in_a_file_and_on_the_command_line(overlay):
    words = config.parse_settings(["learning_rate=1e-3"])
    parser = workflow(overlay("disc_learning_rate: 2e-4\nloss: {kl_weight: 1e-6}\n"), **words).parser
    found = (parser["learning_rate"], parser["disc_learning_rate"], parser["loss"]["kl_weight"])
    assert found == (1e-3, 2e-4, 1e-6) and all(isinstance(number, float) for number in found)
    # What the run keeps is read back by any YAML, the checkpoint's reader among them.
    assert yaml.safe_load(config.as_yaml({"learning_rate": found[0], "tiny": 1e-30})) == {
        "learning_rate": 1e-3,
        "tiny": 1e-30,
    }


@pytest.mark.parametrize("text", ["case_1e3", "1e", "e3", "t1-e3"])
def test_what_only_looks_like_an_exponent_stays_text(text):
    assert config.parse_settings([f"name={text}"]) == {"name": text}


@pytest.mark.parametrize("word", ["max_epochs", "=3", ""])
def test_a_word_that_is_no_setting_is_told(word):
    with pytest.raises(InputError, match=r"is not a setting; expected key=value"):
        config.parse_settings([word])


def test_a_value_that_is_no_yaml_is_told():
    with pytest.raises(InputError, match=r"'crop_to=\[1, 2' is not YAML"):
        config.parse_settings(["crop_to=[1, 2"])


# What is in the repository


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_fits_the_bundle(path):
    content = config.read_yaml(path)
    stages = [content.pop("stage")] if "stage" in content else STAGES
    content.pop("bundle", None)
    fits = []
    for stage in stages:
        base = config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage))
        config.refuse_unknown_keys(content, base, path.name)
        fits.append(stage)
    assert fits == stages


def test_there_are_overlays():
    assert {"autoencoder.yaml", "diffusion.yaml", "hippocampus.yaml"} <= {path.name for path in OVERLAYS}


def expressions(node):
    if isinstance(node, dict):
        return [e for child in node.values() for e in expressions(child)]
    if isinstance(node, list):
        return [e for child in node for e in expressions(child)]
    return [node] if isinstance(node, str) and node.startswith("$") else []


@pytest.mark.parametrize("path", [*BUNDLE_FILES, *OVERLAYS], ids=lambda path: path.name)
def test_expressions_are_short_and_hold_no_logic(path):
    for expression in expressions(yaml.safe_load(path.read_text())):
        assert "lambda" not in expression
        assert len(expression) <= 80, expression


def test_both_ids_start_the_training():
    for stage in STAGES:
        merged = config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage))
        assert merged["run"] == "%training" or merged["run"] == merged["training"]
        # MONAI's check_properties looks into each handler for its `_target_`, and holds transforms against references.
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in merged["train"]["handlers"])
        data_sets = [merged[split].get("images", merged[split]["dataset"]) for split in ("train", "validate")]
        assert [one["transform"] for one in data_sets] == ["@train::preprocessing", "@validate::preprocessing"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_mirrors_its_training_volumes_as_flips_says(stage, phantoms):
    merged = config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage))
    parser = ConfigParser({**merged, **TINY[stage], "dataset_dir": str(phantoms), "flips": [0, 2]})
    for split, expected in (("train", [(0, 2)]), ("validate", [])):
        transforms = parser.get_parsed_content(f"{split}::preprocessing").transforms
        assert [one.axes for one in transforms if isinstance(one, RandFlipsd)] == expected


# MONAI's view


def test_monai_finds_every_property_it_requires(phantoms, tiny_runs, tmp_path):
    for stage in STAGES:
        settings = {**TINY[stage], "dataset_dir": str(phantoms), "run_dir": str(tmp_path / stage)}
        if stage == "diffusion":
            settings["first_stage"] = str(tiny_runs.autoencoder)
        flow = config.training_workflow([], settings, stage)
        assert flow.check_properties() == []
        assert flow.max_epochs == 2 and flow.trainer.state.max_epochs == 2
        assert len(flow.train_dataset) == 4 and flow.network_def is not None
        assert flow.evaluator is not None and flow.val_interval == 1
        assert not (tmp_path / stage).exists()  # looking leaves nothing behind
    assert (tmp_path / "latent_cache").is_dir()  # but what would have been encoded anyhow, beside the run


def test_through_monai_too_an_unknown_key_stops_the_run():
    from monai.bundle import ConfigWorkflow

    files = [str(file) for file in config.bundle_files(config.DEFAULT_BUNDLE, "autoencoder")]
    flow = ConfigWorkflow(config_file=files, workflow_type="train", bundle_root=str(config.DEFAULT_BUNDLE), max_epoch=3)
    with pytest.raises(
        InputExit, match=r"^the configuration sets the unknown key max_epoch; did you mean max_epochs\?$"
    ):
        flow.initialize()


def test_a_bundle_root_that_is_none_is_told():
    from monai.bundle import ConfigWorkflow

    files = [str(file) for file in config.bundle_files(config.DEFAULT_BUNDLE, "autoencoder")]
    flow = ConfigWorkflow(config_file=files, workflow_type="train", bundle_root="elsewhere")
    with pytest.raises(InputExit, match=r"bundle_root is 'elsewhere'; expected the bundle's folder"):
        flow.initialize()


# Text


def test_a_configuration_reads_back_alike(base):
    assert yaml.safe_load(config.as_yaml(base)) == base


def test_the_first_difference_is_named():
    assert config.first_difference({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) is None
    assert config.first_difference({"a": 1, "b": [2]}, {"a": 1, "b": [3]}) == "b"
    assert config.first_difference({"a": 1}, {"a": 1, "c": 0}) == "c"


def test_a_parser_is_found_inside_a_workflow_only():
    with pytest.raises(RuntimeError, match=re.escape("calling_parser() works in an expression")):
        config.calling_parser()
