"""The quality gate: what is measured of a codec, the page, and stage 2's warning."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import train_here
from monai.bundle import ConfigParser
from monai.data import Dataset
from torch import nn
from torch.nn import functional as F

from latdiff3d import checkpoints, quality, runs
from latdiff3d.codec import LatentCodec
from latdiff3d.errors import InputError
from latdiff3d.linear_codes import average_pooling
from latdiff3d.quantization import VectorQuantizer

SECTIONS = [
    "Reconstruction, by modality",
    "Error inside each mask label",
    "Spectrum",
    "Latents",
    "Codebook",
    "Worst cases",
    "How it was measured",
]
MODALITIES, LABELS = ["flair", "t1"], [0, 4]


class Pooling(nn.Module):
    """Keeps the mean of each 2³ block of each channel, and quantises it if it has a codebook."""

    downsampling = 2

    def __init__(self, codes=None):
        super().__init__()
        if codes is not None:
            self.quantizer = VectorQuantizer(len(codes), 2)
            self.quantizer.codes.copy_(torch.tensor(codes))

    def encode(self, image):
        mean = F.avg_pool3d(image, 2)
        return mean, torch.full_like(mean, 0.01)

    def decode(self, latents):
        return F.interpolate(latents, scale_factor=2, mode="nearest")


def case(seed, size=16, pad=0, fill=0.0):
    """A case of two channels; padded by `fill` before and behind, if at all."""
    image = torch.rand(2, size, size, size, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(1, size, size, size)
    mask[:, 2:5, 2:5, 2:5] = 1
    padded = {
        "image": F.pad(image, [pad] * 6, value=fill),
        "valid": F.pad(torch.ones(1, size, size, size), [pad] * 6),
        "mask": F.pad(mask, [pad] * 6),
    }
    return {"case": f"folder/case_{seed}", **padded}


def measured(codec, batches):
    codec.measure([{"image": item["image"][None]} for item in batches])
    return codec


def figures_of(codec, validation, training=None, num_cases=64):
    training = training or [case(seed) for seed in range(10, 13)]
    data = Dataset(validation), Dataset(training)
    return quality.measure(codec, *data, MODALITIES, LABELS, num_cases)


def without_latents(figures):
    """Return the numbers of all figures but the latents', by their path."""
    numbers = {}

    def walk(value, path):
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            walk(entry, (*path, key))
        if isinstance(value, (int, float)):
            numbers[path] = value

    walk({key: value for key, value in figures.items() if key != "latents"}, ())
    return numbers


@pytest.fixture(scope="module")
def pooling():
    """The codec whose reconstruction is average pooling, what it was measured on, and its figures."""
    validation = [case(seed) for seed in range(3)]
    codec = measured(LatentCodec(Pooling(), 2), validation)
    return codec, validation, *figures_of(codec, validation)


def test_a_known_codec_has_its_known_errors(pooling):
    _, validation, figures, _, _ = pooling
    images = [item["image"].numpy() for item in validation]
    errors = [average_pooling(image, 2) - image for image in images]
    own = figures["autoencoder"]
    assert own["psnr_db"] == pytest.approx(np.mean([-10 * np.log10((e**2).mean()) for e in errors]), abs=1e-4)
    for c, modality in enumerate(MODALITIES):
        by_channel = own["modalities"][modality]
        assert by_channel["psnr_db"] == pytest.approx(np.mean([-10 * np.log10((e[c] ** 2).mean()) for e in errors]))
        inside = np.mean([np.abs(e[c, 2:5, 2:5, 2:5]).mean() for e in errors])
        assert own["mae"]["4"][modality] == pytest.approx(inside, abs=1e-5)
        assert 0 < by_channel["ssim"] < 1
        assert by_channel["spectrum_ratio"] < 0.3
    assert figures["label_voxels"] == {"0": 3 * (16**3 - 27), "4": 3 * 27}


def test_block_pca_has_the_codecs_rate(pooling):
    _, _, figures, _, _ = pooling
    assert (figures["num_latents"], figures["block"]) == (2, 2)
    linear, own = figures["block_pca"]["psnr_db"], figures["autoencoder"]["psnr_db"]
    assert linear == pytest.approx(own, abs=0.3)  # of white noise, no two numbers tell more than the means
    assert figures["gain_over_pca_db"] == pytest.approx(own - linear)


def test_too_small_for_ms_ssim_is_said_and_no_nan(pooling):
    figures, spectra, worst = pooling[2:]
    assert figures["ms_ssim_scales"] is None and figures["autoencoder"]["ms_ssim"] is None
    json.dumps(figures, allow_nan=False)
    assert "MS-SSIM was not measured: no volume has the 22 voxels" in quality.render("run", figures, spectra, worst)


def test_a_volume_padded_otherwise_has_the_same_figures(pooling):
    codec, _, figures, _, _ = pooling
    padded = [case(seed, pad=2 * (seed + 1), fill=0.7) for seed in range(3)]
    again, _, _ = figures_of(codec, padded, [case(seed, pad=4, fill=0.2) for seed in range(10, 13)])
    assert without_latents(again) == pytest.approx(without_latents(figures), abs=1e-5)
    assert again["latents"] != figures["latents"]  # the denoiser sees padding too


def test_latents_are_those_the_denoiser_is_given(pooling):
    for channel in pooling[2]["latents"]:
        assert (channel["mean"], channel["std"]) == pytest.approx((0, 1), abs=1e-3)
        assert abs(channel["excess_kurtosis"]) < 0.3  # means of eight uniform numbers
        assert channel["noise_share"] == pytest.approx(0.01**2 / (1 / 12 / 8), rel=0.05)


def test_the_worst_cases_come_first():
    validation = [case(seed) for seed in range(5)]
    validation[3]["image"] = validation[3]["image"].round()  # the strongest contrast, the worst reconstruction
    codec = measured(LatentCodec(Pooling(), 2), validation)
    figures, _, worst = figures_of(codec, validation)
    assert [example.name for example in worst] == [entry["case"] for entry in figures["worst"]]
    assert worst[0].name == "case_3" and len(worst) == quality.NUM_WORST
    assert worst[0].psnr_db < worst[1].psnr_db <= worst[2].psnr_db


def test_many_cases_are_thinned_out_evenly(pooling):
    codec, validation = pooling[:2]
    figures, _, _ = figures_of(codec, [*validation, *validation, validation[0]], num_cases=3)
    assert (figures["num_validation"], figures["num_validation_in_all"]) == (3, 7)
    assert {entry["case"] for entry in figures["worst"]} == {"case_0"}  # numbers 0, 3 and 6


def test_cases_without_masks_have_no_labels(pooling):
    codec, validation = pooling[:2]
    bare = [{key: value for key, value in item.items() if key != "mask"} for item in validation]
    figures, spectra, worst = figures_of(codec, bare)
    assert figures["label_voxels"] is None
    assert "These cases have no masks." in quality.render("run", figures, spectra, worst)


def test_no_validation_cases_are_refused(pooling):
    with pytest.raises(InputError, match="0 validation and 1 training cases"):
        quality.measure(pooling[0], Dataset([]), Dataset([case(0)]), MODALITIES, LABELS, 64)


def test_the_codes_in_use_are_counted():
    item = case(0)
    item["image"][:, :8], item["image"][:, 8:] = 0.1, 0.9
    codec = measured(LatentCodec(Pooling([[0.0, 0.0], [1.0, 1.0], [7.0, 7.0], [9.0, 9.0]]), 2), [item])
    figures, spectra, worst = figures_of(codec, [item])
    assert figures["codebook"] == {"used": 2, "size": 4, "use": 0.5, "perplexity": pytest.approx(2)}
    assert "2 of 4 codes are in use" in quality.render("run", figures, spectra, worst)


# The run


def text_of(run):
    return (run / "quality.html").read_text(encoding="utf-8")


def test_stage_1_ends_with_the_page(tiny_runs):
    text = text_of(tiny_runs.autoencoder)
    assert re.findall("<h2>(.*?)</h2>", text) == SECTIONS
    for word in ("flair", "t1ce", "label 4", "outside all labels", "block PCA", "phantom_0004", "no codebook"):
        assert word in text
    assert not (tiny_runs.diffusion / "quality.html").exists()


def test_the_page_stands_alone(tiny_runs):
    text = text_of(tiny_runs.autoencoder)
    sources = re.findall(r'src="(.{20})', text)
    assert len(sources) == 3 and set(sources) == {"data:image/png;base6"}  # spectra and both validation cases
    assert not re.search(r"http|url\(|<script|<link|href", text)


def test_the_figures_are_beside_the_page_and_in_the_checkpoint(tiny_runs):
    told = json.loads((tiny_runs.autoencoder / "quality.json").read_text())
    assert {"verdict", "poor", "autoencoder", "block_pca", "gain_over_pca_db", "latents", "codebook", "worst"} <= set(
        told
    )
    assert told["autoencoder"]["modalities"].keys() == {"flair", "t1", "t1ce", "t2"}
    assert {"psnr_db", "ssim", "ms_ssim", "spectrum_ratio"} <= told["autoencoder"]["modalities"]["t1"].keys()
    assert set(told["autoencoder"]["mae"]) == {"0", "1", "2", "4"}
    kept = checkpoints.load(tiny_runs.autoencoder / "checkpoints" / "best.pt")["quality"]
    assert kept == {key: value for key, value in told.items() if key not in ("verdict", "poor")}
    assert told["verdict"] in text_of(tiny_runs.autoencoder).replace("&#x27;", "'")


def test_the_closing_lines_name_the_page(phantoms, tiny_runs, tmp_path):
    shutil.copytree(tiny_runs.autoencoder, tmp_path / "first")
    ended = train_here("autoencoder", phantoms, tmp_path, "first")
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.out.splitlines() if line.startswith(f"{tmp_path / 'first' / 'quality.html'}: ")]
    assert "PSNR" in line and "the best linear code" in line


def test_without_quality_cases_there_is_no_page(phantoms, tmp_path):
    ended = train_here("autoencoder", phantoms, tmp_path, "first", max_epochs=1, quality_cases=0)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "first" / "quality.html").exists() and "quality.html" not in ended.out
    assert checkpoints.load(tmp_path / "first" / "checkpoints" / "best.pt")["quality"] is None


# Stage 2's warning


@pytest.fixture
def first_stage(tiny_runs, tmp_path):
    """Write the tiny checkpoint with other figures, alone, and load it as stage 2 does."""
    path = tiny_runs.autoencoder / "checkpoints" / "best.pt"
    content = checkpoints.load(path, "autoencoder")
    parser = ConfigParser(yaml.safe_load(content["config"]))
    parser.parse(True)

    def load(change):
        content["quality"] = change(content["quality"])
        if content["quality"] is None:
            del content["quality"]
        checkpoints.save(tmp_path / "alone.pt", content)
        runs.first_stage_codec(str(tmp_path / "alone.pt"), parser.get_parsed_content("codec"), {})
        return tmp_path / "alone.pt"

    return load


def with_psnr(figures, own, linear):
    channels = [{**channel, "std": 1.0, "excess_kurtosis": 0.0} for channel in figures["latents"]]
    codes = {code: {**figures[code], "psnr_db": psnr} for code, psnr in (("autoencoder", own), ("block_pca", linear))}
    return {**figures, **codes, "latents": channels}


def test_stage_2_warns_of_a_poor_codec_in_one_line(first_stage, capsys):
    path = first_stage(lambda figures: with_psnr(figures, 18.0, 19.0))
    assert capsys.readouterr().out == (
        f"warning: stage 2 begins on a poor codec, {path}: PSNR 18.00 dB is not above block PCA's 19.00 dB.\n"
    )


@pytest.mark.parametrize("change", [lambda figures: with_psnr(figures, 20.0, 19.0), lambda figures: None])
def test_stage_2_does_not_warn_of_a_good_codec_nor_of_an_old_checkpoint(first_stage, capsys, change):
    first_stage(change)
    assert capsys.readouterr().out == ""
