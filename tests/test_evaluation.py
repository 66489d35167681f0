"""The evaluation: what it writes, that a second call does nothing new, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, refused, run_here, train_here
from monai.networks.nets import ResNetFeatures

from latdiff3d import checkpoints, evaluation, evaluation_files, evidence, fingerprints, real_volumes
from latdiff3d.phantoms import write_phantoms
from latdiff3d.segmentation import teacher_note
from latdiff3d.synthesis import Model

WRITTEN = ("evaluation.html", "evaluation.json", "model_card.md")


@pytest.fixture(scope="module")
def words(tiny_runs, judge):
    return ("evaluate", "--model", tiny_runs.diffusion, "--data", tiny_runs.data, "--segmenter", judge)


@pytest.fixture(scope="module")
def evaluated(words, tmp_path_factory):
    """The folder of a whole evaluation, and what was printed; not to be written to."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    ended = run_here(*words, "--out", out)
    assert ended.code == 0, ended.err
    return out, ended


def told(out):
    return json.loads((out / "evaluation.json").read_text())


def times(out):
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.name not in WRITTEN}


def test_the_page_stands_alone_and_has_every_section(evaluated):
    out, ended = evaluated
    page = (out / "evaluation.html").read_text()
    for section in evaluation.SECTIONS:
        assert f"<h2>{section.title}</h2>" in page and f"[{section.title}: " in ended.out
    assert page.count("data:image/png;base64,") >= 5 and "http" not in page
    assert ended.out.strip().endswith("are beside it") and str(out / "evaluation.html") in ended.out


def test_the_json_says_what_was_measured_on_what(evaluated, tiny_runs, judge):
    figures = told(evaluated[0])
    assert figures["model"] == checkpoints.record(tiny_runs.diffusion)["sha256"]
    assert figures["segmenter"] == checkpoints.record(judge)["sha256"]
    assert (figures["split"], figures["num_cases"], figures["num_samples"], figures["num_training"]) == ("val", 2, 2, 4)
    sections = figures["sections"]
    assert list(sections) == [section.name for section in evaluation.SECTIONS]
    reconstruction = sections["codec_fidelity"]
    assert set(reconstruction["modalities"]) == {"flair", "t1", "t1ce", "t2"} and reconstruction["psnr_db"] > 0
    assert set(reconstruction["mae"]) <= {"0", "1", "2", "4"} and "t1" in reconstruction["mae"]["0"]
    network = sections["realism"]["networks"]["segmenter"]
    assert network["num_features"] == 2 * (4 + 8) and network["mmd"]["value"] is not None
    assert network["frechet"]["n"] == 3 and "from 9 volumes on" in network["frechet"]["refused"]
    assert set(sections["mask_fidelity"]["labels"]) == {"1", "2", "4"}
    assert sections["diversity"]["real"]["ms_ssim"] is None  # volumes of 16³ hold no two scales


def test_the_cards_paragraph_names_n_and_the_seed(evaluated):
    card = (evaluated[0] / "model_card.md").read_text()
    assert "4 synthetic volumes, 2 for each of 2 val cases" in card and "seed 0" in card and card.count("\n") == 1
    assert "Memorisation was not measured: 2 held-out cases" in card


def test_an_exported_bundle_takes_the_evaluation_of_its_model_in_and_of_no_other(evaluated, tiny_runs, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    words = ("export", "--run", tiny_runs.diffusion, "--evaluation", out)
    ended = run_here(*words, "--to", tmp_path / "bundle")
    assert ended.code == 0, ended.err
    card = (tmp_path / "bundle" / "docs" / "README.md").read_text()
    assert (out / "model_card.md").read_text().strip() in card and "has not been measured here" in card
    metrics = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())["eval_metrics"]
    sections = told(out)["sections"]
    assert metrics["samples_mask_fidelity"] == sections["mask_fidelity"]["normalised"]["value"]
    assert metrics["samples_mmd_segmenter"] == sections["realism"]["networks"]["segmenter"]["mmd"]["value"]
    assert "samples_flagged_as_memorised" not in metrics  # that section was left out

    whole = told(out)
    sections["memorisation"] = {"any": {"share": 0.25, "held_out_share": 0.05}}
    (out / "evaluation.json").write_text(json.dumps({**whole, "sections": sections}))
    audited = evaluation_files.read(out, whole["model"])
    assert audited.says_of_memorisation and audited.figures()["samples_flagged_as_memorised"] == 0.25
    assert audited.figures()["held_out_flagged_as_memorised"] == 0.05
    for key, value, said in (("model", "x", "evaluates another model"), ("split", "train", "on training cases")):
        (out / "evaluation.json").write_text(json.dumps({**whole, key: value}))
        assert said in refused(run_here(*words, "--to", tmp_path / "other"))
    assert "holds no evaluation.json" in refused(run_here(*words[:-1], tmp_path, "--to", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_no_two_samples_share_their_noise_and_all_are_marked(evaluated):
    sidecars = [json.loads(path.read_text()) for path in sorted((evaluated[0] / "samples").glob("*/*.json"))]
    assert sorted(sidecar["Seed"] for sidecar in sidecars) == [0, 1, 2, 3]
    assert all(sidecar["SyntheticData"] for sidecar in sidecars)


def test_a_second_call_makes_nothing_and_says_the_same(evaluated, words, tmp_path, monkeypatch):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    before, said = times(out), {name: (out / name).read_bytes() for name in WRITTEN}
    monkeypatch.setattr(Model, "sample", None)
    monkeypatch.setattr(real_volumes, "real_volume", None)
    ended = run_here(*words, "--out", out)
    assert ended.code == 0, ended.err
    assert times(out) == before
    assert {name: (out / name).read_bytes() for name in WRITTEN} == said


def test_an_interrupted_evaluation_goes_on_where_it_stopped(evaluated, words, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.realism, "profile", None)
        with pytest.raises(TypeError):
            run_here(*words, "--out", out)
    assert not (out / "evaluation.json").exists() and (out / "figures" / "codec_fidelity.json").is_file()
    before = times(out)
    ended = run_here(*words, "--out", out)
    assert ended.code == 0 and "[Reconstruction" not in ended.out
    after = times(out)
    assert all(after[path] == time for path, time in before.items() if path.is_file())
    assert told(out) == told(evaluated[0])


def test_another_seed_makes_other_samples_of_the_same_reals(evaluated, words, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    reals = {path: time for path, time in times(out).items() if path.suffix == ".npz"}
    assert run_here(*words, "--out", out, "--seed", "7", "-n", "1").code == 0
    assert {path: time for path, time in times(out).items() if path.suffix == ".npz"} == reals
    assert told(out)["sections"]["realism"] != told(evaluated[0])["sections"]["realism"]


def test_what_is_cached_gives_the_same_figures_and_what_is_damaged_is_made_anew(evaluated, words, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    shutil.rmtree(out / "figures")
    damaged = sorted((out / "volumes").glob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert run_here(*words, "--out", out).code == 0
    assert told(out) == told(evaluated[0])


def test_a_segmenter_is_trained_where_none_is_given_and_published_weights_are_looked_through(
    tiny_runs, tmp_path, phantoms
):
    overlay, weights = tmp_path / "tiny.yaml", tmp_path / "weights.pth"
    tiny = {key: value for key, value in TINY["segmenter"].items() if key != "crop_to"}
    overlay.write_text(yaml.safe_dump({**tiny, "max_epochs": 1}))
    torch.save(ResNetFeatures("resnet10", False, 3, 1).state_dict(), weights)
    words = ("--model", tiny_runs.diffusion, "--data", phantoms, "--out", tmp_path / "out", "--config", overlay)
    ended = run_here("evaluate", *words, "-n", "1", "--weights", f"medicalnet_resnet10={weights}")
    assert ended.code == 0, ended.err
    assert checkpoints.load(tmp_path / "out" / "segmenter" / "checkpoints" / "best.pt")["notes"] == {
        "purpose": "evaluation"
    }
    networks = told(tmp_path / "out")["sections"]["realism"]["networks"]
    assert networks["medicalnet_resnet10"]["num_features"] == 4 * 512 and next(iter(networks)) == "segmenter"


def test_a_model_without_masks_is_evaluated_as_far_as_it_goes(tiny_runs, tmp_path):
    settings = {"conditioning": "none", "condition_dropout": 0, "first_stage": str(tiny_runs.autoencoder)}
    assert train_here("diffusion", tiny_runs.data, tmp_path, "run", **settings).code == 0
    words = ("--model", tmp_path / "run", "--data", tiny_runs.data, "--out", tmp_path / "out")
    ended = run_here("evaluate", *words)
    assert ended.code == 0, ended.err
    sections = told(tmp_path / "out")["sections"]
    assert sections["mask_fidelity"] == {"left_out": "an unconditional model has no masks to follow"}
    assert sections["realism"]["networks"] == {} and sections["realism"]["spectrum"]["ratio"] > 0
    assert "Not measured: an unconditional model" in (tmp_path / "out" / "evaluation.html").read_text()


def test_an_exported_bundle_is_evaluated_as_its_run_is(exported_bundle, evaluated, words, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    ended = run_here(*[exported_bundle if word == words[2] else word for word in words], "--out", out, "-n", 1)
    assert ended.code == 0, ended.err
    figures, of_run = told(out)["sections"], told(evaluated[0])["sections"]
    assert figures["codec_fidelity"] == of_run["codec_fidelity"]
    assert figures["mask_fidelity"]["dice_real"] == of_run["mask_fidelity"]["dice_real"]


# Bad input


def line_of(tiny_runs, judge, out, **replaced):
    given = {"model": tiny_runs.diffusion, "data": tiny_runs.data, "segmenter": judge, "out": out} | replaced
    line = refused(run_here("evaluate", *(word for key, value in given.items() for word in (f"--{key}", value))))
    assert not (out / "evaluation.json").exists()
    return line


def test_a_single_case_is_refused(tiny_runs, judge, tmp_path):
    data = write_phantoms(tmp_path / "data", 2, 1, (16, 16, 16))
    line = line_of(tiny_runs, judge, tmp_path / "out", data=data)
    assert "has 1 val case that can be used; expected 2 at least" in line


def test_segmenters_that_were_trained_on_another_models_samples_are_not_gone_on_with(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(evaluation.usefulness, "make_synthetic", lambda model, cases, out, seed: out)
    monkeypatch.setattr(evaluation.usefulness, "measure", lambda out, *others: folders.append(out) or ({}, {}))
    evidence = SimpleNamespace(
        model=None, folder=tmp_path, given={"split": "val"}, seed=0, cases=[], reals=[],
        all_training=SimpleNamespace(cases=[]),
    )  # fmt: skip
    for key in ("one", "other", "one"):
        evidence.key = key
        evaluation._usefulness_of("judge")(evidence)
    assert folders[0] == folders[2] != folders[1]


def test_a_mask_that_cannot_be_used_is_named_its_case_left_out_and_the_exit_code_3(
    tiny_runs, judge, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "SECTIONS", [])
    data = write_phantoms(tmp_path / "data", 1, 3, (16, 16, 16))
    masks = {file.name.partition("_seg")[0]: file for file in data.glob("*/*_seg.nii.gz")}
    spoilt = masks[(data / "val.list").read_text().split()[0]]
    image = nib.load(spoilt)
    nib.save(nib.Nifti1Image(np.full(image.shape, 9, np.uint8), image.affine), spoilt)
    out = tmp_path / "out"
    words = ("evaluate", "--model", tiny_runs.diffusion, "--data", data, "--segmenter", judge, "--out", out)
    ended = run_here(*words)
    assert ended.code == 3 and spoilt.name in ended.err and "1 masks are left out" in ended.err
    assert (told(out)["num_cases"], told(out)["num_left_out"]) == (2, 1)
    assert "1 more left out" in (out / "model_card.md").read_text()


def test_images_and_masks_on_other_grids_are_refused(tiny_runs, judge, tmp_path):
    data = shutil.copytree(tiny_runs.data, tmp_path / "data")
    path = data / "phantom_0004" / "phantom_0004_seg.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:12], image.affine), path)
    assert "have different shapes; expected one grid" in line_of(tiny_runs, judge, tmp_path / "out", data=data)
    path.unlink()
    assert "phantom_0004" in line_of(tiny_runs, judge, tmp_path / "out", data=data)


def test_voxels_of_another_size_are_refused(tiny_runs, judge, tmp_path):
    data = write_phantoms(tmp_path / "data", 2, 2, (16, 16, 16), spacing_mm=20)
    line = line_of(tiny_runs, judge, tmp_path / "out", data=data)
    assert "has voxels of 20×20×20 mm (RAS); this model was trained on" in line and "Resample the data" in line


def test_a_model_without_its_codec_is_refused(tiny_runs, judge, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    del content["objects"]["codec"]
    checkpoints.save(tmp_path / "bare.pt", content)
    assert "holds no codec" in line_of(tiny_runs, judge, tmp_path / "out", model=tmp_path / "bare.pt")
    line = line_of(tiny_runs, judge, tmp_path / "out", model=tiny_runs.autoencoder)
    assert "a checkpoint of stage 'autoencoder'; expected one of stage 'diffusion'" in line


def test_a_segmenter_that_taught_the_model_is_refused(tiny_runs, judge, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    checkpoints.save(tmp_path / "taught.pt", {**content, "notes": content["notes"] | teacher_note(str(judge))})
    line = line_of(tiny_runs, judge, tmp_path / "out", model=tmp_path / "taught.pt")
    assert "taught the model that it is to judge" in line


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"split": "test"}, "has no test case"),
        ({"num-training": "-1"}, "-1 training volumes"),
        ({"weights": "vgg=x.pt"}, "--weights is 'vgg=x.pt'; expected architecture=file, of medicalnet_resnet10"),
        ({"weights": "medicalnet_resnet10=none.pth"}, "there is no file none.pth"),
        ({"segmenter": "nowhere"}, "there is no checkpoint at nowhere"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_a_wrong_option_is_one_line(tiny_runs, judge, tmp_path, replaced, words):
    assert words in line_of(tiny_runs, judge, tmp_path / "out", **replaced)


# What is looked at


def test_a_real_volume_lies_where_a_sample_for_its_mask_does(model, phantoms):
    [case] = [case for case in evidence.cases_of_split(model, phantoms, "val") if case["case"].endswith("0004")]
    real = real_volumes.real_volume(model, case)
    grid = model.grid_of(case["mask"])
    assert np.array_equal(real.mask, np.asarray(grid.mask)) and real.image.shape == (4, 16, 16, 16)
    assert real.own.all() and real.image.min() >= 0 and real.image.max() <= 1
    small = replace(model, crop_to=[16, 20, 16])
    padded = real_volumes.real_volume(small, case)
    assert padded.own.sum() == 16**3 and padded.image.shape == (4, 16, 20, 16)


def test_cases_are_spread_evenly():
    assert real_volumes.spread(range(10), 4) == [0, 3, 6, 9]
    assert real_volumes.spread(range(3), 5) == [0, 1, 2] and real_volumes.spread([], 5) == []


def test_a_training_volume_that_no_figure_but_the_audit_looks_at_counts_for_what_is_kept(
    tiny_runs, tmp_path, monkeypatch
):
    looked_at, of_volume = [], fingerprints.of_volume
    monkeypatch.setattr(fingerprints, "of_volume", lambda file: looked_at.append(file) or of_volume(file))
    data = shutil.copytree(tiny_runs.data, tmp_path / "data")

    def gathered():
        model = Model.load(tiny_runs.diffusion)
        return evidence.Evidence.gathered(tmp_path / "out", model, data, "val", None, [], 1, 1, 0)

    before = gathered()
    key = before.key
    images = [file for file in looked_at if "_seg" not in file]
    assert len(images) == len(set(images)) == 6 * 4  # each once
    assert len(before.training) == 1 < len(before.all_training)
    changed = Path(before.all_training.cases[-1]["image"][0])
    image = nib.load(changed)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), changed)
    after = gathered()
    assert after.training.keys == before.training.keys and after.key != key
