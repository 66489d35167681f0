"""The bundle's programs behind training: the volumes of `latdiff3d sample`, the metrics of the run itself."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import MODALITIES, run_here, run_process
from monai.bundle import create_workflow

from latdiff3d import checkpoints
from latdiff3d.config import DEFAULT_BUNDLE
from latdiff3d.errors import InputExit

CONFIGS = DEFAULT_BUNDLE / "configs"


def workflow(kind, files, **settings):
    """Return MONAI's workflow, initialised, of files of the bundle and of others."""
    named = [str(file if "/" in str(file) else CONFIGS / file) for file in files]
    return create_workflow(config_file=named, workflow_type=kind, bundle_root=str(DEFAULT_BUNDLE), **settings)


def sampling(**settings):
    return workflow("inference", ["common.yaml", "inference.yaml"], run_id="inference", **settings)


def evaluation(runs, stage, **settings):
    run = getattr(runs, stage)
    files = ["common.yaml", f"train_{stage}.yaml", run / "config.yaml", "evaluate.yaml"]
    return workflow("evaluation", files, run_id="evaluate", model=str(run), **settings)


def voxels_of(folder, case="phantom_0004"):
    return [np.asarray(nib.load(folder / case / f"{case}_{modality}.nii.gz").dataobj) for modality in MODALITIES]


def test_monais_command_samples_what_ours_does(tiny_runs, mask, tmp_path):
    given = ["--mask", mask, "--seed", 3]
    assert run_here("sample", "-r", tiny_runs.diffusion, "--out", tmp_path / "ours", *given).code == 0
    ended = run_process(
        "-m", "monai.bundle", "run", "inference", "--bundle_root", DEFAULT_BUNDLE, "--config_file",
        [str(CONFIGS / file) for file in ("common.yaml", "inference.yaml")], "--model", tiny_runs.diffusion,
        "--out", tmp_path / "monai", *given,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "1 synthetic cases are in" in ended.out
    for ours, theirs in zip(voxels_of(tmp_path / "ours"), voxels_of(tmp_path / "monai"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_inference_has_the_properties_that_monai_asks_for(tiny_runs, mask, tmp_path):
    flow = sampling(model=str(tiny_runs.diffusion), mask=str(mask), out=str(tmp_path))
    assert flow.check_properties() == []
    assert len(flow.dataset) == 1


def test_whole_volumes_and_the_training_sets_range_are_those_of_our_command(tiny_runs, mask, tmp_path):
    words = ["--mask", mask, "--whole", "--memory", "4GB", "--like", "training"]
    assert run_here("sample", "-r", tiny_runs.diffusion, "--out", tmp_path / "ours", *words).code == 0
    sampling(
        model=str(tiny_runs.diffusion), mask=str(mask), out=str(tmp_path / "monai"), whole=True, memory="4GB",
        like="training",
    ).run()  # fmt: skip
    for ours, theirs in zip(voxels_of(tmp_path / "ours"), voxels_of(tmp_path / "monai"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert max(voxels.max() for voxels in ours) > 1


def test_without_a_mask_those_of_the_split_are_taken(tiny_runs, tmp_path):
    flow = sampling(model=str(tiny_runs.diffusion), dataset_dir=str(tiny_runs.data), out=str(tmp_path), num_samples=2)
    assert [job.name for job in flow.dataset.jobs] == [
        f"phantom_{case:04d}_seed{seed:04d}" for case in (4, 5) for seed in (0, 1)
    ]


def test_a_volume_that_is_there_is_kept(tiny_runs, mask, tmp_path, capsys):
    for _ in range(2):
        sampling(model=str(tiny_runs.diffusion), mask=str(mask), out=str(tmp_path)).run()
    assert capsys.readouterr().out.strip().endswith("phantom_0004; 1 of them were there")


def test_a_setting_of_sampling_reaches_the_sampler(tiny_runs, mask, tmp_path):
    flow = sampling(
        model=str(tiny_runs.diffusion), mask=str(mask), out=str(tmp_path), **{"sampling::sampling_steps": 2}
    )
    assert flow.inferer.num_steps == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sampling_steps": 2}, "sampling_steps is set, and sampling takes the model's own; say sampling::samp"),
        ({"crop_to": [16, 16, 16]}, "crop_to is set, and sampling takes the model's own; leave it out"),
        ({"maks": "x"}, "sets the unknown key maks; did you mean mask"),
        ({"grid": "latent"}, "grid is 'latent'; expected mask or crop"),
        ({"num_samples": 0}, "num_samples is 0; expected a whole number from 1 on"),
        ({"model": ""}, "there is no checkpoint at"),
    ],
)
def test_a_bad_setting_is_told_in_one_line(tiny_runs, mask, tmp_path, settings, words):
    given = {"model": str(tiny_runs.diffusion), "mask": str(mask), "out": str(tmp_path / "out"), **settings}
    with pytest.raises(InputExit, match=words):
        sampling(**given).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage, metric", [("autoencoder", "psnr"), ("diffusion", "loss")])
def test_evaluation_measures_what_the_run_did(tiny_runs, tmp_path, stage, metric):
    flow = evaluation(tiny_runs, stage, figures=str(tmp_path / "figures.json"))
    assert flow.check_properties() == []
    flow.run()
    figures = json.loads((tmp_path / "figures.json").read_text())
    best = checkpoints.load(tiny_runs._asdict()[stage] / "checkpoints" / "best.pt")["best_metric"]
    assert figures["cases"] == 2
    assert figures[metric] == pytest.approx(best, rel=1e-6)


def test_weights_of_the_other_stage_are_refused(tiny_runs):
    files = ["common.yaml", "train_autoencoder.yaml", tiny_runs.autoencoder / "config.yaml", "evaluate.yaml"]
    flow = workflow("evaluation", files, run_id="evaluate", model=str(tiny_runs.diffusion))
    with pytest.raises(InputExit, match="is a checkpoint of stage 'diffusion'; expected one of stage 'autoencoder'"):
        flow.run()
