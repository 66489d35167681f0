"""CompVis-style configurations: each key accounted for once, the overlay resolves, trains, and means the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, refused, run_here
from monai.bundle import ConfigParser

from latdiff3d import config, conversion
from latdiff3d.compvis_configs import convert
from latdiff3d.errors import InputError
from latdiff3d.losses import AutoencoderLoss, Terms
from latdiff3d.networks import downsampling

CONFIGS = {path.stem: path for path in sorted((REPOSITORY / "tests" / "compvis").glob("*.yaml"))}
# The test's configurations have 32 channels, for the group norms; what is left to make small is the discriminator.
SMALL = ["discriminator_def.channels=4", "discriminator_def.num_layers_d=1"]


@pytest.fixture
def changed(tmp_path):
    """Write a configuration of the tests with a key, by its joined name, set or (by None) taken out."""

    def change(name, **changes):
        content = yaml.safe_load(CONFIGS[name].read_text())
        for joined, value in changes.items():
            *parents, last = joined.split("__")
            node = content
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return change


def overlay_of(path, **options):
    return convert(path, **options).ledger.content()


def told(path, key, **options):
    """Return what the table says of a key."""
    [line] = [line for line in convert(path, **options).ledger.table().splitlines() if line.startswith(f"{key}: ")]
    return line.partition(": ")[2]


# Nothing is dropped silently


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_every_key_is_told_of_once_in_the_files_order(path):
    leaves = conversion.leaves_of(yaml.safe_load(path.read_text()))
    lines = convert(path).ledger.table().splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(leaves)
    for line in lines:
        assert any(fate in line for fate in ("  → ", "  as here: ", "  not carried: ")), line


def test_an_unknown_key_is_named_and_does_not_stop_the_rest(changed):
    path = changed(
        "mask_ldm", model__params__frobnicate=3, model__params__unet_config__params__warp=[1], data__params__odd={},
        extra__deep__key=1,
    )  # fmt: skip
    for key in ("model.params.frobnicate", "model.params.unet_config.params.warp", "data.params.odd", "extra.deep.key"):
        assert "not carried: " in told(path, key)
    assert overlay_of(path) == overlay_of(CONFIGS["mask_ldm"])


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_each_setting_of_the_overlay_names_its_key(path):
    converted = convert(path)
    text = converted.text()
    assert all("  # " in line or line.endswith(":") for line in text.splitlines()[1:])
    named = {key for line in text.splitlines() for key in line.partition("  # ")[2].split(", ")}
    carried = {key for key, fate in converted.ledger.fates.items() if fate.kind == conversion.CARRIED}
    assert carried <= named


# The overlay is one of ours


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_the_overlay_reads_back_and_resolves(path, tmp_path):
    converted = convert(path)
    overlay = tmp_path / "overlay.yaml"
    conversion.write(overlay, converted.text(), replacing=False)
    assert config.read_yaml(overlay) == converted.ledger.content()
    parser = config.training_workflow([overlay], {"device": torch.device("cpu")}, converted.stage).parser
    assert downsampling(parser.get_parsed_content("autoencoder")) == (2 if path.stem == "vq" else 4)
    if converted.stage == "diffusion":
        assert downsampling(parser.get_parsed_content("denoiser")) == 2
    else:
        assert isinstance(parser.get_parsed_content("loss"), AutoencoderLoss)


def test_the_three_train(phantoms, tmp_path):
    """KL and VQ autoencoders, and the masked latent diffusion model on the first: two steps each."""
    once = ["max_epochs=1", "val_interval=1", "quality_cases=0", "precision=fp32"]
    for name, stage, words in (
        ("kl", "autoencoder", [*SMALL, "max_epochs=1"]),
        ("vq", "autoencoder", [*SMALL, "modalities=[t1]", "batch_size=2"]),
        ("mask_ldm", "diffusion", [f"first_stage={tmp_path / 'kl'}", "sampling_steps=2"]),
    ):
        overlay = tmp_path / f"{name}.yaml"
        converted = run_here("convert", CONFIGS[name], "--out", overlay)
        assert converted.code == 0, converted.err
        if stage == "diffusion":
            once.remove("quality_cases=0")  # stage 1's
        command = ["train", stage, "--data", phantoms, "--config", overlay, "-l", tmp_path, "--name", name]
        trained = run_here(*command, *once, *words)
        assert trained.code == 0, trained.err
        assert "1 epochs, 2 steps" in trained.out


# What the numbers become


def test_the_learning_rate_is_scaled_as_compvis_scales_it(changed):
    assert overlay_of(CONFIGS["kl"])["learning_rate"] == pytest.approx(5e-5 * 2 * 2)  # accumulated × batch size
    assert overlay_of(CONFIGS["kl"], num_ranks=4)["learning_rate"] == pytest.approx(5e-5 * 2 * 2 * 4)
    assert overlay_of(CONFIGS["kl"], num_ranks=4, is_scaled=False)["learning_rate"] == 5e-5
    assert "2 accumulated × 4 ranks × batch size 2" in told(CONFIGS["kl"], "model.base_learning_rate", num_ranks=4)
    vq = overlay_of(CONFIGS["vq"])
    assert vq["learning_rate"] == pytest.approx(2e-4) and vq["disc_learning_rate"] == pytest.approx(1e-4)
    with pytest.raises(InputError, match=r"data\.params\.batch_size is missing"):
        convert(changed("kl", data__params__batch_size=None))
    assert "batch_size" not in overlay_of(changed("kl", data__params__batch_size=None), is_scaled=False)


def test_the_balance_of_kl_and_reconstruction_is_that_of_compvis_sums():
    loss = overlay_of(CONFIGS["kl"])["loss"]
    ours = AutoencoderLoss(kl_weight=loss["kl_weight"], kl_reduction=loss["kl_reduction"], disc_weight=0)
    torch.manual_seed(0)
    image, made = torch.rand(2, 4, 16, 16, 16), torch.rand(2, 4, 16, 16, 16)
    mean, std = torch.randn(2, 4, 4, 4, 4), torch.rand(2, 4, 4, 4, 4) + 0.1
    terms = ours.reconstruction_terms(made, image, torch.ones(2, 1, 16, 16, 16), made)
    ours.add_regularisation(terms, mean, std)
    summed = (made - image).abs().sum() / 2
    divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum() / 2
    expected = 1e-6 * divergence / summed
    found = terms.weights["kl"] * terms.raw["kl"] / (terms.weights["l1"] * terms.raw["l1"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_codebooks_beta_lies_on_the_term_that_compvis_lays_it_on():
    loss = overlay_of(CONFIGS["vq"])["loss"]
    ours = AutoencoderLoss(
        codebook_weight=loss["codebook_weight"], commitment_weight=loss["commitment_weight"], disc_weight=0
    )
    terms = Terms()
    ours.add_regularisation(terms, {"codebook": torch.tensor(3.0), "commitment": torch.tensor(5.0)})
    assert terms.total().item() == pytest.approx(2.0 * (0.25 * 3 + 5))


def test_the_noise_has_compvis_betas():
    content = config.merged(config.bundle_files(config.DEFAULT_BUNDLE, "diffusion"))
    parser = ConfigParser(content)
    parser.update(config.flat(overlay_of(CONFIGS["mask_ldm"]), content))
    betas = np.linspace(0.0015**0.5, 0.0205**0.5, 500) ** 2
    found = parser.get_parsed_content("noise_schedule").betas
    np.testing.assert_allclose(found.numpy(), betas, rtol=1e-5)


@pytest.mark.parametrize(("target", "objective"), [("eps", "Epsilon"), ("x0", "Sample"), ("v", "VPrediction")])
def test_the_parameterization_is_the_objective(changed, target, objective):
    content = overlay_of(changed("mask_ldm", model__params__parameterization=target))
    assert content["objective"]["_target_"] == f"latdiff3d.objectives.{objective}"


def test_attention_lies_on_the_levels_of_the_named_sizes(changed):
    def at(sizes, resolution=64):
        dd = "model__params__ddconfig__"
        path = changed("kl", **{f"{dd}attn_resolutions": sizes, f"{dd}resolution": resolution})
        return overlay_of(path)["autoencoder_def"]["attention_levels"]

    assert at([16, 32]) == [False, True, True]
    assert at([]) == [False, False, False]
    assert at([8]) == [False, False, False]
    path = changed("kl", model__params__ddconfig__resolution=[64, 64, 32])
    assert "follows from one resolution" in told(path, "model.params.ddconfig.attn_resolutions")


def test_without_attention_no_level_has_any(changed):
    dd = "model__params__ddconfig__"
    path = changed("kl", **{f"{dd}attn_type": "none", f"{dd}attn_resolutions": [4], f"{dd}resolution": 16})
    network = overlay_of(path)["autoencoder_def"]
    assert network["attention_levels"] == [False, False, False]
    assert network["with_encoder_nonlocal_attn"] is network["with_decoder_nonlocal_attn"] is False
    path = changed("kl", **{f"{dd}attn_type": "linear"})
    assert "so it is the full one" in told(path, "model.params.ddconfig.attn_type")


def test_what_three_dimensions_mean_there_is_told():
    assert "leaves the first axis its length" in told(CONFIGS["mask_ldm"], "model.params.unet_config.params.dims")


def test_heads_are_channels_of_each_level():
    denoiser = overlay_of(CONFIGS["mask_ldm"])["denoiser_def"]
    assert denoiser["channels"] == [32, 64] and denoiser["num_head_channels"] == [8, 16]
    assert denoiser["attention_levels"] == [False, True]


def test_the_latents_size_is_the_crops_where_no_crop_is_named(changed):
    path = changed("mask_ldm", data__params__train__params__crop_to=None, model__params__image_size=[8, 16, 16])
    assert overlay_of(path)["crop_to"] == [32, 64, 64]
    path = changed("mask_ldm", model__params__image_size=[8, 8, 8])
    assert "makes other latents" in told(path, "model.params.image_size")


# Conditions


def conditioning(changed, **changes):
    content = overlay_of(changed("mask_ldm", **{f"model__params__{key}": value for key, value in changes.items()}))
    return content["conditioning"], content.get("encoded_channels")


def test_conditions_become_ours(changed):
    in_channels = "unet_config__params__in_channels"
    assert conditioning(changed) == ("scalar", None)
    assert conditioning(changed, **{in_channels: 8}) == ("concat", None)
    assert conditioning(changed, **{in_channels: 7}, cond_stage_trainable=True) == ("encoder", 3)
    assert conditioning(changed, cond_stage_config="__is_unconditional__") == ("none", None)
    assert conditioning(changed, cond_stage_key="class_label", conditioning_key="crossattn") == ("none", None)
    assert conditioning(changed, conditioning_key="crossattn", **{in_channels: 4}) == ("concat", None)


def test_an_unconditional_model_says_so(changed):
    path = changed("mask_ldm", model__params__cond_stage_config="__is_unconditional__")
    assert "→ conditioning: none" in told(path, "model.params.cond_stage_config")
    path = changed("mask_ldm", model__params__cond_stage_key="class_label")
    assert "class_label is no mask" in told(path, "model.params.cond_stage_key")


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("kl", {"model__target": "mine.Autoencoder"}, "'mine.Autoencoder'; expected a class that ends in"),
        ("kl", {"model__params__embed_dim": "four"}, "model.params.embed_dim is 'four'; expected a whole number"),
        ("kl", {"model__params__ddconfig__ch": None}, "model.params.ddconfig.ch is missing; expected a whole"),
        ("kl", {"model__params__ddconfig__ch_mult": 2}, "ddconfig.ch_mult is 2; expected a list of whole numbers"),
        ("kl", {"model__base_learning_rate": "${lr}"}, "model.base_learning_rate: ${lr}, a reference"),
        ("kl", {"data__params__train__params__crop_to": [8, 8]}, "crop_to is [8, 8]; expected one length, or three"),
        ("mask_ldm", {"model__params__beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
        ("mask_ldm", {"model__params__parameterization": "mu"}, "parameterization is 'mu'"),
        ("mask_ldm", {"model__params__unet_config__target": "mine.UNet"}, "'mine.UNet'; expected a class named"),
        ("mask_ldm", {"model__params__unet_config__params__num_heads": None}, "num_head_channels are both missing"),
        (
            "mask_ldm",
            {"model__params__first_stage_config__target": "ldm.models.autoencoder.IdentityFirstStage"},
            "model.params.first_stage_config.target is 'ldm.models.autoencoder.IdentityFirstStage'",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(changed, tmp_path, name, changes, named):
    overlay = tmp_path / "overlay.yaml"
    line = refused(run_here("convert", changed(name, **changes), "--out", overlay))
    assert named in line
    assert not overlay.exists()


def test_an_overlay_that_is_there_stays_unless_forced(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("max_epochs: 3\n")
    assert "--force" in refused(run_here("convert", CONFIGS["kl"], "--out", overlay))
    assert overlay.read_text() == "max_epochs: 3\n"
    assert run_here("convert", CONFIGS["kl"], "--out", overlay, "--force").code == 0
    assert config.read_yaml(overlay)["latent_channels"] == 4
    assert sorted(Path(path).name for path in tmp_path.iterdir()) == ["overlay.yaml"]


def test_the_report_names_the_next_command(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    out = run_here("convert", CONFIGS["mask_ldm"], "--out", overlay).out
    assert f"Next: latdiff3d train diffusion --data DATA --config {overlay} first_stage=RUN" in out
