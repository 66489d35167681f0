"""Each kind of stage 2 trains and samples through the bundle by its overlay, and runs in MONAI's own inferer."""

import json
from dataclasses import replace

import nibabel
import pytest
import torch
from conftest import REPOSITORY, refused, run_here, train_here
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import nn

from latdiff3d import samplers
from latdiff3d.guidance import Guidance
from latdiff3d.synthesis import Model

OVERLAYS = {"flow": ["flow.yaml"], "v_prediction": ["v_prediction.yaml"], "encoder": ["condition_encoder.yaml"]}
SETTINGS = {
    "unconditional": ["conditioning=none"],
    "scalar": ["conditioning=scalar"],
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
    """Return a run's synthesizer in float32, its denoiser's last layer no longer at the 0 that it starts from."""
    synthesizer = Model.load(run).synthesizer
    synthesizer.precision = synthesizer.codec.precision = "fp32"
    torch.manual_seed(0)
    unet = getattr(synthesizer.denoiser, "denoiser", synthesizer.denoiser)
    nn.init.normal_(unet.out[-1].conv.weight, std=0.05)
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
    ours = synthesizer.sample(shape, condition, [3, 4])
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
    ours = synthesizer.sample(shape, condition, [3])
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
