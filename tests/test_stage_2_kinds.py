"""Each kind of stage 2 trains and samples through the bundle by its overlay, and runs in MONAI's own inferer."""

import json
import math
import re
from dataclasses import replace

import nibabel
import pytest
import torch
import yaml
from conftest import REPOSITORY, reference_sampler, refused, run_here, train_here
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import nn

from latdiff3d import checkpoints, samplers
from latdiff3d.conditioning import Condition
from latdiff3d.covariates import Covariates
from latdiff3d.guidance import Guidance
from latdiff3d.synthesis import Model

OVERLAYS = {
    "flow": ["flow.yaml"],
    "v_prediction": ["v_prediction.yaml"],
    "encoder": ["condition_encoder.yaml"],
    "scalar": ["scalar_mask.yaml"],
    "unconditional": ["unconditional.yaml"],
}
COVARIATES = (
    "covariates=[{name: age, mean: 60, std: 15}, {name: sex, classes: [F, M]}, {name: spacing, mean: 1, std: 1}]"
)
SETTINGS = {
    "min_snr": ["min_snr_gamma=5"],
    "ddpm": ["sampler=ddpm"],
}


@pytest.fixture(scope="module")
def flow(tiny_runs, tmp_path_factory):
    return trained("flow", tiny_runs, tmp_path_factory.mktemp("flow"))


def trained(kind, tiny_runs, logdir):
    overlays = [word for name in OVERLAYS.get(kind, []) for word in ("--config", REPOSITORY / "configs" / name)]
    words = [*overlays, *SETTINGS.get(kind, [])]
    ended = train_here("diffusion", tiny_runs.data, logdir, kind, *words, first_stage=str(tiny_runs.autoencoder))
    assert ended.code == 0, ended.err
    return logdir / kind


@pytest.fixture(scope="module")
def encoder(tiny_runs, tmp_path_factory):
    return trained("encoder", tiny_runs, tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("kind", [*OVERLAYS, *SETTINGS])
def test_every_kind_trains_and_samples(kind, tiny_runs, tmp_path):
    run = trained(kind, tiny_runs, tmp_path)
    mask = [] if kind == "unconditional" else ["--mask", sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]]
    ended = run_here("sample", "--model", run, *mask, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    [volume] = (tmp_path / "out").rglob("*t1.nii.gz")
    assert nibabel.load(volume).get_fdata().std() > 0
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "val_loss_1" in header and "val_loss_4" in header


def synthesizer_of(run):
    """Return a run's synthesizer in float32, its denoiser's layers no longer near the 0 that some start from."""
    synthesizer = Model.load(run).synthesizer
    synthesizer.precision = synthesizer.codec.precision = "fp32"
    torch.manual_seed(0)
    unet = getattr(synthesizer.denoiser, "denoiser", synthesizer.denoiser)
    nn.init.normal_(unet.out[-1].conv.weight, std=0.05)
    for name, parameter in unet.named_parameters():
        if name.endswith("conv2.conv.weight"):
            nn.init.normal_(parameter, std=0.05)
    return synthesizer


def conditions(synthesizer, count=2):
    mask = torch.randint(4, (count, 1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    return synthesizer.condition(mask)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_monais_inferer_samples_flow_as_we_do(flow, scale):
    synthesizer = synthesizer_of(flow)
    synthesizer.guidance = Guidance(scale)
    synthesizer.times = synthesizer.schedule.times(5)
    synthesizer.solve = samplers.euler
    condition = conditions(synthesizer)
    shape = (4, 8, 8, 8)
    ours = synthesizer.sample(shape, Condition(condition), [3, 4])
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    scheduler = synthesizer.noise_schedule
    scheduler.set_timesteps(5)
    theirs = LatentDiffusionInferer(scheduler, scale_factor=1.0).sample(
        input_noise=noise, autoencoder_model=synthesizer.codec, diffusion_model=synthesizer.denoiser.eval(),
        scheduler=scheduler, conditioning=condition, mode="concat", verbose=False,
        cfg=scale if scale != 1 else None, cfg_fill_value=0.0,
    )  # fmt: skip
    assert torch.allclose(theirs.clamp(0, 1), ours, atol=1e-4)
    assert ours.std() > 0


@pytest.mark.parametrize(("sampler", "scheduler_type"), [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)])
@pytest.mark.parametrize("kind", ["concat", "encoder"])
def test_monais_inferer_samples_diffusion_as_we_do_where_it_takes_all_times(
    kind, sampler, scheduler_type, tiny_runs, encoder
):
    settings = {"schedule": "scaled_linear_beta", "beta_start": 0.05, "beta_end": 0.6, "clip_sample": False}
    trained, guidance = synthesizer_of(encoder if kind == "encoder" else tiny_runs.diffusion), Guidance(2.0)
    synthesizer = replace(
        trained, noise_schedule=DDPMScheduler(20, **settings), num_steps=20, sampler=sampler, guidance=guidance
    )
    condition, shape = conditions(synthesizer, 1), (4, 8, 8, 8)
    ours = synthesizer.sample(shape, Condition(condition), [3])
    torch.manual_seed(3)  # of one volume, MONAI draws what we do: its noise, then that of each step
    scheduler = scheduler_type(20, **settings)
    theirs = LatentDiffusionInferer(scheduler, scale_factor=1.0).sample(
        input_noise=torch.randn(1, *shape), autoencoder_model=synthesizer.codec, scheduler=scheduler,
        diffusion_model=synthesizer.denoiser.eval(), conditioning=condition, mode="concat", verbose=False, cfg=2.0,
        cfg_fill_value=0.0,
    )  # fmt: skip
    assert torch.allclose(theirs.clamp(0, 1), ours, atol=1e-4)
    assert ours.std() > 0


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_monais_inferer_asks_the_denoiser_what_training_asks(kind, tiny_runs, flow):
    synthesizer = synthesizer_of(flow if kind == "flow" else tiny_runs.diffusion)
    codec, condition = synthesizer.codec, conditions(synthesizer)
    image, noise = torch.rand(2, 4, 16, 16, 16), torch.randn(2, 4, 8, 8, 8)
    timesteps = torch.tensor([100, 900])
    torch.manual_seed(5)
    with torch.no_grad():
        theirs = LatentDiffusionInferer(synthesizer.noise_schedule, scale_factor=1.0)(
            inputs=image, autoencoder_model=codec, diffusion_model=synthesizer.denoiser.eval(), noise=noise,
            timesteps=timesteps, condition=condition, mode="concat",
        )  # fmt: skip
        torch.manual_seed(5)
        latents = codec.encode_stage_2_inputs(image)
        alpha, sigma = (v.float().view(-1, 1, 1, 1, 1) for v in synthesizer.schedule.alpha_sigma(timesteps))
        ours = synthesizer.denoiser(torch.cat([alpha * latents + sigma * noise, condition], 1), timesteps)
    assert torch.allclose(theirs, ours, atol=1e-5)


# Covariates


@pytest.fixture(scope="module")
def datalist(tiny_runs, tmp_path_factory):
    """Return a JSON datalist of the phantoms that says ages and sexes, not all of them."""
    entries = []
    for number, folder in enumerate(sorted(path for path in tiny_runs.data.iterdir() if path.is_dir())):
        images = [str(folder / f"{folder.name}_{part}.nii.gz") for part in ("flair", "t1", "t1ce", "t2")]
        mask, said = str(folder / f"{folder.name}_seg.nii.gz"), {"age": 50 + 5 * number, "sex": "FM"[number % 2]}
        entry = {"case": folder.name, "image": images, "mask": mask, "fold": number}
        entries.append(entry | (said if number != 1 else {}))
    file = tmp_path_factory.mktemp("datalist") / "datalist.json"
    file.write_text(json.dumps({"training": entries[:4], "validation": entries[4:]}))
    return file


def described(datalist, tiny_runs, logdir, *words):
    settings = {"first_stage": str(tiny_runs.autoencoder)}
    ended = train_here("diffusion", datalist, logdir, "described", *words, **settings)
    assert ended.code == 0, ended.err
    return logdir / "described", ended.out


@pytest.fixture(scope="module")
def classes(datalist, tiny_runs, tmp_path_factory):
    """Return a run by configs/covariates.yaml, without masks, and what it said."""
    overlay = ["--config", REPOSITORY / "configs" / "covariates.yaml"]
    return described(datalist, tiny_runs, tmp_path_factory.mktemp("classes"), *overlay)


def test_classes_and_numbers_train_and_sample_without_masks(classes, tmp_path):
    run, said = classes
    assert "known of 4 training cases: age of 3, sex of 3" in said
    words = ("--model", run, "--out", tmp_path, "--guidance", "2")
    ended = run_here("sample", *words, "--covariate", "age=60", "--covariate", "sex=F")
    assert ended.code == 0, ended.err
    [sidecar] = tmp_path.rglob("*.json")
    assert json.loads(sidecar.read_text())["Covariates"] == {"age": 60.0, "sex": "F"}


def test_the_reference_sampler_takes_covariates_too(classes, tmp_path):
    words = ("--covariate", "age=60", "--guidance", "2", "--seed", "3")
    for folder, start, program in (
        ("theirs", ("-r", classes[0]), {"program": reference_sampler}),
        ("ours", ("sample", "--model", classes[0]), {}),
    ):
        ended = run_here(*start, "--out", tmp_path / folder, *words, **program)
        assert ended.code == 0, ended.err
    [sidecar] = (tmp_path / "theirs").rglob("*.json")
    assert json.loads(sidecar.read_text())["Covariates"] == {"age": 60.0, "sex": None}
    theirs, ours = (
        [nibabel.load(file).get_fdata() for file in sorted((tmp_path / folder).rglob("*.nii.gz"))]
        for folder in ("theirs", "ours")
    )
    assert len(theirs) == 4 and all((one == other).all() for one, other in zip(theirs, ours, strict=True))
    words = ("-r", classes[0], "--out", tmp_path / "no", "--covariate", "agee=60")
    assert "no covariate 'agee'; it knows age, sex" in refused(run_here(*words, program=reference_sampler))
    assert not (tmp_path / "no").exists()


def test_what_is_known_changes_a_volume_and_nothing_known_is_the_null(classes):
    model = Model.load(classes[0])
    model.synthesizer = synthesizer_of(classes[0])
    nothing = model.sample(None, 3).volume
    assert torch.equal(model.sample(None, 3, {"age": ""}).volume, nothing)
    assert torch.equal(synthesizer_null(model, 3), nothing)
    volumes = [model.sample(None, 3, {"sex": sex}).volume for sex in "FM"]
    assert not any(torch.allclose(volume, nothing, atol=1e-4) for volume in volumes)
    assert not torch.allclose(*volumes, atol=1e-4)


def synthesizer_null(model, seed):
    """Return the volume of what guidance asks for as the null."""
    null = Condition(None, torch.tensor([[60.0, 0.0]])).null(model.synthesizer.condition.null_value)
    return model.synthesizer.sample((4, 8, 8, 8), null, [seed])[0]


def test_an_embedding_is_saved_averaged_and_loaded(classes):
    saved = torch.load(classes[0] / "checkpoints" / "best.pt", weights_only=True)["objects"]
    loaded = Model.load(classes[0]).synthesizer.denoiser.state_dict()
    key = "class_embedding.missing.weight"
    assert torch.equal(loaded[key], saved["ema"][key]) and not torch.equal(saved["denoiser"][key], saved["ema"][key])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["agee=60"], "--covariate: the model has no covariate 'agee'; it knows age, sex; did you mean age?"),
        (["sex=X"], "--covariate: sex is 'X'; known are F, M."),
        (["age=old"], "--covariate: age is 'old'; expected a number, or nothing where unknown."),
        (["age"], "'age' is no covariate; expected name=value, such as age=60."),
        (["age=1", "age=2"], "the covariate age is given twice, as '1' and '2'"),
    ],
)
def test_what_no_model_knows_is_one_line(words, line, classes, tmp_path):
    given = [part for word in words for part in ("--covariate", word)]
    assert line in refused(run_here("sample", "--model", classes[0], "--out", tmp_path / "no", *given))
    assert not (tmp_path / "no").exists()


def test_a_model_without_covariates_takes_none(tiny_runs, tmp_path):
    mask = sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]
    words = ("--model", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path, "--covariate", "age=60")
    assert "the model has no covariate 'age'; it knows none. Leave it out." in refused(run_here("sample", *words))


@pytest.fixture(scope="module")
def before_covariates(tiny_runs, tmp_path_factory):
    """Return the tiny run's checkpoint with a configuration as it was recorded before there were covariates."""
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    config = yaml.safe_load(content["config"])
    for key in ("covariates", "known_covariates", "described_cases"):
        del config[key]
    config["all_splits"]["cases"] = "@sound_cases"
    config["conditioned"]["denoiser"] = "@denoiser_def"
    config["guided"]["condition_dropout"] = "$@condition_dropout if @conditioning != 'none' else 0"
    config["train"]["check"] = [line for line in config["train"]["check"] if "covariates" not in line]
    assert not re.search("covariate|described", yaml.safe_dump(config))
    path = tmp_path_factory.mktemp("before_covariates") / "earlier.pt"
    checkpoints.save(path, {**content, "config": yaml.safe_dump(config)})
    return path


@pytest.mark.parametrize("source", ["mask", "data"])
def test_a_model_from_before_covariates_samples_as_ever(source, before_covariates, tiny_runs, tmp_path):
    place = {"mask": tiny_runs.data / "phantom_0004" / "phantom_0004_seg.nii.gz", "data": tiny_runs.data}[source]
    for name, model in (("earlier", before_covariates), ("now", tiny_runs.diffusion)):
        words = ("--model", model, f"--{source}", place, "--out", tmp_path / name, "--seed", "3", "--guidance", "2")
        ended = run_here("sample", *words)
        assert ended.code == 0, ended.err
    earlier, now = (sorted((tmp_path / name).rglob("*.nii.gz")) for name in ("earlier", "now"))
    assert [file.name for file in earlier] == [file.name for file in now] and len(now) >= 4
    for one, other in zip(earlier, now, strict=True):
        assert (nibabel.load(one).get_fdata() == nibabel.load(other).get_fdata()).all()
    [sidecar, *_] = (tmp_path / "earlier").rglob("*.json")
    assert json.loads(sidecar.read_text())["Covariates"] == {}


def test_a_model_from_before_covariates_takes_none(before_covariates, tiny_runs, tmp_path):
    words = ("--model", before_covariates, "--data", tiny_runs.data, "--out", tmp_path / "no", "--covariate", "age=60")
    assert "the model has no covariate 'age'; it knows none. Leave it out." in refused(run_here("sample", *words))


@pytest.mark.parametrize(
    "words",
    [
        ["conditioning=concat", "encode=on_the_fly"],
        ["conditioning=encoder"],
        ["conditioning=scalar", "use_checkpoint=true"],
    ],
    ids=["concat", "encoder", "scalar"],
)
def test_masks_and_covariates_go_together(words, datalist, tiny_runs, tmp_path):
    run, _ = described(datalist, tiny_runs, tmp_path, COVARIATES, *words)
    words = ("--model", run, "--data", datalist, "--out", tmp_path / "out", "--guidance", "2", "--covariate", "sex=M")
    ended = run_here("sample", *words, "guidance_in_sequence=true")
    assert ended.code == 0, ended.err
    said = [json.loads(file.read_text())["Covariates"] for file in sorted((tmp_path / "out").rglob("*.json"))]
    assert [(one["age"], one["sex"]) for one in said] == [(70.0, "M"), (75.0, "M")]  # the cases' ages, the given sex
    header = nibabel.load(sorted((tmp_path / "out").rglob("*t1.nii.gz"))[0]).header
    assert said[0]["spacing"] == pytest.approx([float(size) for size in header.get_zooms()], abs=1e-4)
    mask = sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]
    words = ("--model", run, "--mask", mask, "--out", tmp_path / "no", "--covariate", "spacing=1,1,3")
    assert "spacing is '1,1,3', and a mask has its own; leave spacing out" in refused(run_here("sample", *words))


def test_a_volume_without_mask_has_the_spacing_it_was_told(classes):
    model = Model.load(classes[0])
    model.covariates = Covariates([{"name": "spacing", "mean": 1, "std": 1}])
    model.synthesizer.sample = lambda shape, condition, seeds: torch.zeros(1, 4, 16, 16, 16)
    sample = model.sample(None, 0, {"spacing": "1,1,3"})
    assert sample.known == {"spacing": [1.0, 1.0, 3.0]} and sample.affine.diagonal().tolist() == [1.0, 1.0, 3.0, 1.0]
    assert model.sample(None, 0).known == {"spacing": pytest.approx(model.spacing_mm)}
    assert math.isnan(model.numbers_of({"spacing": ""}, None)[0])


def test_a_case_of_an_unknown_class_is_named_before_anything_is_encoded(datalist, tiny_runs, tmp_path):
    words = ["covariates=[{name: sex, classes: [F, W]}]"]
    ended = train_here("diffusion", datalist, tmp_path, "wrong", *words, first_stage=str(tiny_runs.autoencoder))
    assert "phantom_0003: sex is 'M'; known are F, W." in refused(ended)
    words = ["covariates=[{name: scanner, classes: [A]}]"]
    ended = train_here("diffusion", datalist, tmp_path, "wrong", *words, first_stage=str(tiny_runs.autoencoder))
    assert "none of the 4 training cases says its scanner; expected a column scanner in cov" in refused(ended)
    assert not (tmp_path / "latent_cache").exists()


def test_an_encoder_is_trained_saved_and_loaded_with_its_denoiser(encoder, tiny_runs):
    content = torch.load(encoder / "checkpoints" / "best.pt", weights_only=True)
    saved, loaded = content["objects"], Model.load(encoder).synthesizer.denoiser.state_dict()
    assert set(saved["denoiser"]) == set(saved["ema"]) == set(loaded)
    assert {key.split(".")[0] for key in loaded} == {"denoiser", "encoder"}
    assert all(torch.equal(loaded[key], saved["ema"][key]) for key in loaded)
    [first] = [key for key in loaded if key.startswith("encoder.0.") and key.endswith("weight")]
    assert not torch.equal(saved["denoiser"][first], saved["ema"][first])  # it moved


@pytest.mark.parametrize("words", [["encode=on_the_fly"], ["use_checkpoint=true"], ["mask_mode=coarse"]])
def test_an_encoder_trains_however_latents_come_and_activations_go(words, tiny_runs, tmp_path):
    overlay = ["--config", REPOSITORY / "configs" / "condition_encoder.yaml"]
    settings = {"max_epochs": 1, "first_stage": str(tiny_runs.autoencoder)}
    ended = train_here("diffusion", tiny_runs.data, tmp_path, "run", *overlay, *words, **settings)
    assert ended.code == 0, ended.err


def test_an_encoder_that_does_not_fit_is_one_line(tiny_runs, tmp_path):
    network = {"_target_": "torch.nn.Conv3d", "in_channels": "@condition_channels", "out_channels": 3, "kernel_size": 1}
    settings = {"conditioning": "encoder", "condition_encoder_def": network, "first_stage": str(tiny_runs.autoencoder)}
    line = refused(train_here("diffusion", tiny_runs.data, tmp_path, "wrong", **settings))
    assert "condition_encoder_def, a Conv3d, makes (1, 3, 8, 8, 8)" in line
    assert not (tmp_path / "latent_cache").exists()


def test_a_flows_sampler_on_a_diffusion_model_is_one_line(tiny_runs, tmp_path):
    mask = sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]
    words = ("--model", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / "out", "--sampler", "heun")
    assert "sampler is 'heun', which is for flow" in refused(run_here("sample", *words))
    assert not (tmp_path / "out").exists()


def test_sampling_takes_settings_of_its_own(flow, tiny_runs, tmp_path):
    mask = sorted(tiny_runs.data.glob("*/*_seg.nii.gz"))[0]
    words = ("sampling_spacing=log_snr", "--sampler", "dpm_solver++", "--steps", "4", "guidance_interval=[0.2, 0.9]")
    ended = run_here("sample", "--model", flow, "--mask", mask, "--out", tmp_path / "out", *words)
    assert ended.code == 0, ended.err
    [sidecar] = (tmp_path / "out").rglob("*.json")
    written = json.loads(sidecar.read_text())
    assert (written["Sampler"], written["Steps"], written["StepSpacing"]) == ("dpm_solver++", 4, "log_snr")
    words = ("--model", flow, "--mask", mask, "--out", tmp_path / "no", "crop_to=[8, 8, 8]")
    assert "sampling sets the unknown key crop_to" in refused(run_here("sample", *words))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sampler": "ddpm", "sampling_eta": 0.5}, "sampling_eta is 0.5, which only the sampler 'ddim' has"),
        ({"sampling_steps": 1001}, "steps is 1001; expected 1 to 1000"),
        ({"noise_schedule__clip_sample": True}, "noise_schedule::clip_sample is True, which is not followed"),
    ],
)
def test_what_could_not_be_sampled_is_refused_before_anything_is_encoded(settings, line, tiny_runs, tmp_path):
    settings = {**settings, "first_stage": str(tiny_runs.autoencoder)}
    assert line in refused(train_here("diffusion", tiny_runs.data, tmp_path, "wrong", **settings))
    assert not (tmp_path / "latent_cache").exists()


def test_an_objective_without_its_schedule_is_one_line(tiny_runs, tmp_path):
    settings = {"objective": {"_target_": "latdiff3d.objectives.Flow"}, "first_stage": str(tiny_runs.autoencoder)}
    line = refused(train_here("diffusion", tiny_runs.data, tmp_path, "wrong", **settings))
    assert "the objective is Flow and noise_schedule a DDPMScheduler; expected Flow with RFlowScheduler" in line
