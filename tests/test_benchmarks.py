"""The benchmarks run from their command line and end in a JSON object; what they measure is their own affair."""

import json
import shutil

import pytest
import yaml
from conftest import REPOSITORY, TINY, TINY_AUTOENCODER, run_process

from latdiff3d.phantoms import write_phantoms
from latdiff3d.synthesis import Model


def last_line(ended):
    assert ended.code == 0, ended.err
    return json.loads(ended.out.strip().split("\n")[-1])


def test_the_autoencoders_race_and_a_second_call_trains_nothing(phantoms, tmp_path):
    overlay = tmp_path / "tiny.yaml"
    overlay.write_text(yaml.safe_dump({**TINY_AUTOENCODER, "crop_to": [32, 32, 32]}))
    words = ("--data", phantoms, "--config", overlay, "--run", tmp_path / "race", "--minutes", "0.005")
    figures = last_line(run_process("benchmarks/autoencoder.py", *words))
    assert {"time_to_plain_ratio", "time_to_quality_ratio", "psnr_gain_db", "psnr_over_pca_db"} <= set(figures)
    assert (tmp_path / "race" / "autoencoder.png").stat().st_size > 5000
    again = run_process("benchmarks/autoencoder.py", *words)
    assert last_line(again) == figures and "to start" not in again.out


def test_monais_recipe_becomes_a_model_of_ours_and_a_second_call_trains_nothing(phantoms, tmp_path):
    overlay, run = tmp_path / "tiny.yaml", tmp_path / "run"
    overlay.write_text(yaml.safe_dump({**TINY_AUTOENCODER, "crop_to": [32, 32, 32]}))
    words = ("--data", phantoms, "--config", overlay, "--run", run, "--minutes", "0.001", "0.001")
    figures = last_line(run_process("benchmarks/monai_recipe.py", *words))
    assert figures["steps"]["autoencoder"] >= 1 and figures["steps"]["denoiser"] >= 1
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert last_line(run_process("benchmarks/monai_recipe.py", *words)) == figures
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    ended = run_process("benchmarks/monai_recipe.py", *words[:-1], "0.002")
    assert ended.code == 2 and "is of 0.001 minutes; give another --run" in ended.err
    model = Model.load(run / "model.pt", num_steps=2)
    assert model.config["conditioning"] == "scalar" and model.synthesizer.guidance.scale == 1
    mask = next(phantoms.glob("*/*_seg.nii.gz"))
    assert model.sample(str(mask), seed=0).volume.shape == (4, 32, 32, 32)


def test_sharpness_goes_on_from_a_run_in_both_arms(tiny_runs):
    words = ("--data", tiny_runs.data, "--run", tiny_runs.autoencoder, "--minutes", "0.01")
    ended = run_process("benchmarks/sharpness.py", *words)
    figures = last_line(ended)
    assert "the perceptual term is left out" in ended.out
    assert figures["steps"] >= 1 and figures["on_spectrum_ratio"] > 0
    assert figures["psnr_fall_db"] >= 0  # the start is one of the checks


def test_training_from_the_cache_races_training_that_encodes(tiny_runs, tmp_path):
    overlay, run = tmp_path / "tiny.yaml", tmp_path / "first"
    overlay.write_text(yaml.safe_dump({k: v for k, v in TINY["diffusion"].items() if "epochs" not in k}))
    shutil.copytree(tiny_runs.autoencoder, run)
    words = ("--data", tiny_runs.data, "--config", overlay, "--run", run, "--short")
    ended = run_process("benchmarks/diffusion.py", *words)
    figures = last_line(ended)
    assert figures["train_speedup"] > 0 and figures["train_speedup_same_codec"] > 0 and figures["cache_s"] > 0
    assert figures["tutorials_unet"]["train_speedup"] > 0
    assert "6 to encode" in ended.out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["first", "tiny.yaml"]  # the cache is gone


def test_a_dozen_calls_race_fifty_steps_before_a_judge_that_is_trained_first(tiny_runs, tmp_path):
    overlay, judge = tmp_path / "tiny.yaml", tmp_path / "judge"
    overlay.write_text(yaml.safe_dump(TINY_AUTOENCODER))
    words = ("--data", tiny_runs.data, "--config", overlay, "--run", tiny_runs.diffusion, "--segmenter", judge)
    figures = last_line(run_process("benchmarks/sampling.py", *words, "--guidance", "2", "--seeds", "1"))
    assert (figures["calls_ours"], figures["calls_ddim"], figures["calls_monai"]) == (12, 100, 100)
    assert 0 < figures["time_ratio"] < 0.5 and {"mmd_ratio", "mmd_ratio_interval"} <= set(figures)
    assert figures["ms_ssim_ours"] is None  # volumes of 16³ hold no two scales
    assert (judge / "checkpoints" / "best.pt").is_file()


def test_the_samplers_benchmark_knows_the_truth():
    figures = last_line(run_process("benchmarks/samplers.py", "--short"))
    mean, std = figures["truth"]["gaussian"]
    assert figures["gaussian"]["heun"]["50"] == pytest.approx([mean, std], abs=0.002)
    assert {"5", "10", "25", "50"} == set(figures["two modes"]["MONAI ddim"])
    assert figures["orders"]["dpm_solver++"] == pytest.approx(2, abs=0.1)


def test_a_benchmark_of_no_time_is_refused(phantoms, tmp_path):
    words = ("--data", phantoms, "--run", tmp_path, "--minutes", "0")
    ended = run_process("benchmarks/autoencoder.py", *words)
    assert ended.code == 2 and "--minutes is 0.0; expected a number above 0" in ended.err


def test_guidance_is_swept_before_the_judge_and_beside_painted_masks(tiny_runs, tmp_path):
    overlay, judge, run = tmp_path / "tiny.yaml", tmp_path / "judge", tmp_path / "run"
    overlay.write_text(yaml.safe_dump(TINY_AUTOENCODER))
    shutil.copytree(tiny_runs.diffusion, run)
    words = ("--data", tiny_runs.data, "--config", overlay, "--run", run, "--segmenter", judge)
    ended = run_process("benchmarks/guidance.py", *words, "--scales", "1", "--at", "2")
    figures = last_line(ended)
    assert list(figures["scales"]) == ["1", "2"] and figures["scales"]["2"]["dice"] is not None
    assert {"mask_fidelity", "spectrum_ratio", "mmd", "mmd_painted"} <= set(figures)
    assert figures["painted"]["dice"] > 0 and "real volumes: Dice" in ended.out
    assert (run / "guidance.png").stat().st_size > 5000


def test_configuration_is_counted_and_links_count_where_they_lead(tmp_path):
    configs = tmp_path / "one" / "configs"
    configs.mkdir(parents=True)
    (configs / "a.yaml").write_text("# x\nlr: 1\nnet: {size: [1, 2], more: $@lr > 0}\n")
    (configs / "b.json").write_text('{"lr": 1, "f": "$lambda x: x", "imports": ["$import os"]}')
    (configs / "c.yaml").symlink_to("a.yaml")
    figures = last_line(run_process("benchmarks/configuration.py", configs))
    assert list(figures["one"].values()) == [2, 7, 2, 1, 12, 1]
    ended = run_process("benchmarks/configuration.py", tmp_path)
    assert ended.code == 2 and "holds no configuration" in ended.err


def test_a_whole_volume_is_made_in_a_process_of_its_own_and_its_borders_looked_at(tiny_runs):
    words = ("--run", tiny_runs.diffusion, "--data", tiny_runs.data, "--size", "40", "24", "31", "--steps", "2")
    ended = run_process("benchmarks/whole_volume.py", *words, "--memory", "4GB", "--compare")
    figures = last_line(ended)
    assert 0 < figures["peak_gb"] < 4 and figures["seam_ratio"] > 0 and figures["minutes"] > 0
    assert figures["tiles"] is None and figures["num_windows"] == 2 * 3 * 2 * 3 and figures["size"] == [40, 24, 31]
    assert list(figures["arms"]) == ["ours", "side by side", "half shared"] and None not in figures["arms"].values()


def test_edits_are_measured_outside_at_the_border_and_by_the_judge(tiny_runs, tmp_path):
    overlay, run = tmp_path / "tiny.yaml", tmp_path / "run"
    overlay.write_text(yaml.safe_dump(TINY_AUTOENCODER))
    shutil.copytree(tiny_runs.diffusion, run)
    data = write_phantoms(tmp_path / "data", 2, 4, (24, 28, 24), spacing_mm=6)
    words = ("--data", data, "--config", overlay, "--run", run, "--segmenter", tmp_path / "judge", "--short")
    figures = last_line(run_process("benchmarks/edit.py", *words))
    assert figures["outside_identical"] == 1 and figures["num_edits"] >= 1
    assert 0 < figures["border_gradient_ratio"] < figures["border_gradient_ratio_pasted"]
    assert {"segmenter_dice", "segmenter_dice_before", "segmenter_dice_real", "lesions_found"} <= set(figures)
    assert list((run / "edited").glob("*/*.png"))


def test_imported_weights_compute_what_their_networks_do():
    figures = last_line(run_process("benchmarks/import_table.py"))  # without monai-generative, which is not installed
    *networks, u_net = figures["rows"]
    assert [row["format"] for row in networks] == 3 * ["MONAI 1.6"] + 2 * ["MAISI"]
    assert figures["largest"] <= 1e-5
    *flags, norm = (float(row["wrong"]) for row in networks)
    assert all(wrong > 0.1 for wrong in flags) and "region_index_layer" in u_net["refused"]
    assert 1e-6 < norm < 1e-4  # PyTorch's group norm in place of MAISI's only rounds otherwise


def test_the_audit_of_memorisation_runs_on_a_model_of_five_cases_and_on_another(tiny_runs, tmp_path):
    overlay = tmp_path / "tiny.yaml"
    tiny = {k: v for k, v in TINY["diffusion"].items() if k.startswith(("denoiser", "autoencoder", "crop"))}
    overlay.write_text(yaml.safe_dump({**tiny, "sampling_steps": 2}))
    data = write_phantoms(tmp_path / "data", 6, 20, (16, 16, 16))
    words = ("--data", data, "--run", tmp_path / "run", "--config", overlay, "--first-stage", tiny_runs.autoencoder)
    ended = run_process("benchmarks/memorisation.py", *words, "--all", tiny_runs.diffusion, "--short")
    figures = last_line(ended)
    assert list(figures) == ["overfitted", "all"]
    assert (figures["overfitted"]["num_training"], figures["all"]["num_training"]) == (5, 6)
    for found in figures.values():
        assert found["planted_found"] > 0 and found["num_samples"] == 20
        assert set(found["flagged_by_space"]) == {"image", "latent", "features"}


IMPORTED_ALONE = """
import importlib, os, sys
import monai  # which takes ten seconds; the rest is each one's own, in a fork of its own
sys.path.insert(0, "benchmarks")
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(module)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported")
"""


def test_every_benchmark_finds_what_it_imports():
    modules = sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))
    assert "diffusion" in modules
    ended = run_process("-c", IMPORTED_ALONE, *modules)
    assert ended.code == 0, ended.err
    broken = run_process("-c", IMPORTED_ALONE, "no_such_benchmark")
    assert broken.code == 1 and "no_such_benchmark cannot be imported" in broken.err
