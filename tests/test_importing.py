"""Weights from elsewhere through `latdiff3d import`: into stage 2, into sampling, and what is refused on the way."""

import nibabel
import pytest
import torch
import yaml
from conftest import TINY, as_words, refused, run_here
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from test_old_weights import as_generative, randomised

from latdiff3d import checkpoints, config
from latdiff3d.codec import LatentCodec
from latdiff3d.synthesis import Model

CHANNELS = {"channels": (32, 32), "num_res_blocks": 1}
SPACING = "spacing=[1,1,1]"
# What the denoiser of the tests' own runs has, and the imported one has not.
OF_THE_DENOISER = {key: value for key, value in TINY["diffusion"].items() if not key.startswith("autoencoder_def")}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Return state dicts of monai-generative's format by network, and the networks with their own projections gone."""
    folder = tmp_path_factory.mktemp("old")
    networks = {
        "autoencoder": AutoencoderKL(
            3, 4, 4, latent_channels=3, attention_levels=(False, True), include_fc=True, **CHANNELS
        ),
        "denoiser": DiffusionModelUNet(3, 3, 3, attention_levels=(False, True), num_head_channels=16, **CHANNELS),
    }
    for name, network in networks.items():
        torch.save({"state_dict": as_generative(randomised(network))}, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def autoencoder(old, phantoms, tmp_path_factory):
    """Return the checkpoint of the imported autoencoder, its latents measured over the phantoms."""
    out = tmp_path_factory.mktemp("imported") / "autoencoder.pt"
    words = ("--to", out, "--data", phantoms, SPACING, "crop_to=[16,16,16]", "precision=fp32")
    ended = run_here("import", old / "autoencoder.pt", *words)
    assert ended.code == 0, ended.err
    assert "the AutoencoderKL of monai-generative" in ended.out and "measured over 4 volumes" in ended.out
    assert "norm_num_groups is taken to be 32" in ended.out
    return out


def codec_of(path):
    content = checkpoints.load(path, "autoencoder")
    parser = config.training_workflow([], yaml.safe_load(content["config"]), "autoencoder").parser
    codec: LatentCodec = parser.get_parsed_content("codec")
    checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
    return codec.eval()


def test_the_codec_has_unit_latents_over_the_data_and_needs_no_configuration(autoencoder):
    codec = codec_of(autoencoder)
    assert codec.num_volumes == 4 and (codec.latent_std != 1).all()
    assert codec.encode(torch.rand(1, 4, 16, 16, 16))[0].shape == (1, 3, 8, 8, 8)


def test_stage_2_trains_on_it(autoencoder, phantoms, tmp_path):
    words = ("--config", autoencoder.with_suffix(".yaml"), f"first_stage={autoencoder}", "max_epochs=1")
    settings = as_words({key: value for key, value in OF_THE_DENOISER.items() if key != "max_epochs"})
    ended = run_here("train", "diffusion", "--data", phantoms, "-l", tmp_path, "--name", "dm", *settings, *words)
    assert ended.code == 0, ended.err
    assert "Stage 'diffusion' is trained: 1 epochs" in ended.out


def test_an_old_pair_samples(old, tmp_path):
    """Autoencoder and denoiser by the scale factor that they were trained with, without any data."""
    first, second = tmp_path / "autoencoder.pt", tmp_path / "denoiser.pt"
    ended = run_here("import", old / "autoencoder.pt", "--to", first, "--scale-factor", 0.5, SPACING)
    assert ended.code == 0 and "multiplied by 0.5" in ended.out, ended
    words = ("--to", second, f"first_stage={first}", "denoiser_def.num_head_channels=16", "crop_to=[16,16,16]")
    ended = run_here("import", old / "denoiser.pt", *words)
    assert ended.code == 0 and "num_head_channels to be 16" in ended.out, ended
    codec = codec_of(first)
    image = torch.rand(1, 4, 16, 16, 16)
    raw = codec.autoencoder.encode(image)[0]
    torch.testing.assert_close(codec.encode(image)[0], 0.5 * raw)
    volume = Model.load(second, num_steps=2).sample(None, seed=3).volume
    assert volume.shape == (4, 16, 16, 16) and volume.isfinite().all() and volume.std() > 0
    ended = run_here("sample", "--model", second, "--steps", 1, "--out", tmp_path / "samples", "--no-pictures")
    assert ended.code == 0, ended.err


# What is refused


def test_without_statistics_it_says_so_and_stage_2_refuses_it(old, phantoms, tmp_path):
    out = tmp_path / "autoencoder.pt"
    ended = run_here("import", old / "autoencoder.pt", "--to", out, "modalities=[flair,t1,t1ce,t2]")
    assert ended.code == 0 and "Its latents are not measured" in ended.out
    words = ("--config", out.with_suffix(".yaml"), f"first_stage={out}", *as_words(OF_THE_DENOISER))
    ended = run_here("train", "diffusion", "--data", phantoms, "-l", tmp_path, "--name", "dm", *words)
    assert "no latent statistics" in refused(ended)


def test_a_configuration_that_does_not_fit_is_refused_by_keys_and_nothing_is_written(old, tmp_path):
    out = tmp_path / "autoencoder.pt"
    line = refused(run_here("import", old / "autoencoder.pt", "--to", out, "autoencoder_def.channels=[32,64]"))
    assert "has another shape of encoder.blocks." in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["denoiser.pt"], "a denoiser needs its autoencoder"),
        (["denoiser.pt", "first_stage={first}"], "give denoiser_def.num_head_channels=64"),
        (["denoiser.pt", "first_stage={first}", "--scale-factor", "2"], "--scale-factor is an autoencoder's"),
        (["autoencoder.pt", "--scale-factor", "2", "--data", "somewhere"], "are both given"),
        (["autoencoder.pt", "--scale-factor", "0"], "--scale-factor is 0"),
        (["autoencoder.pt", "chanels=3"], "unknown key chanels"),
        (["nothing.pt"], "there is no file"),
    ],
)
def test_a_mistake_is_told_in_one_line(old, autoencoder, tmp_path, words, named):
    filled = [word.format(first=autoencoder) for word in words]
    out = tmp_path / "out.pt"
    assert named in refused(run_here("import", old / filled[0], *filled[1:], "--to", out))
    assert not out.exists()


def test_a_checkpoint_that_is_there_stays(old, autoencoder):
    before = checkpoints.sha256(autoencoder)
    assert "not there yet" in refused(run_here("import", old / "autoencoder.pt", "--to", autoencoder))
    assert checkpoints.sha256(autoencoder) == before


def test_a_missing_spacing_is_asked_for(old, tmp_path):
    first = tmp_path / "autoencoder.pt"
    assert run_here("import", old / "autoencoder.pt", "--to", first, "--scale-factor", 1).code == 0
    words = ("--to", tmp_path / "denoiser.pt", f"first_stage={first}", "denoiser_def.num_head_channels=16")
    assert "spacing=[1,1,1]" in refused(run_here("import", old / "denoiser.pt", *words))


def test_the_data_tell_a_denoisers_spacing_and_intensities(old, phantoms, tmp_path):
    first, second = tmp_path / "autoencoder.pt", tmp_path / "denoiser.pt"
    assert run_here("import", old / "autoencoder.pt", "--to", first, "--scale-factor", 1).code == 0
    words = ("--data", phantoms, f"first_stage={first}", "denoiser_def.num_head_channels=16", "crop_to=[16,16,16]")
    ended = run_here("import", old / "denoiser.pt", "--to", second, *words)
    assert ended.code == 0, ended.err
    notes = checkpoints.load(second)["notes"]
    header = nibabel.load(next(phantoms.glob("*/*_seg.nii.gz"))).header
    assert notes["spacing_mm"] == pytest.approx(list(header.get_zooms()))
    assert notes["imported"]["sha256"] == checkpoints.sha256(old / "denoiser.pt") and notes["intensities"]
