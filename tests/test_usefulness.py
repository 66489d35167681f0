"""Usefulness: arms that make as many updates, a test that none of them has seen, and intervals over seeds and cases."""

import json
from functools import partial

import numpy as np
import pytest
from conftest import run_here, train_here

from latdiff3d import checkpoints, evaluation, runs, usefulness
from latdiff3d.bootstrap import crossed_interval
from latdiff3d.errors import InputError
from latdiff3d.model_cases import cases_of_split
from latdiff3d.real_volumes import real_volume
from latdiff3d.synthesis import Model
from latdiff3d.usefulness import ARMS, make_synthetic, measure, render, sentence, summary


@pytest.fixture(scope="module")
def segmenter(phantoms, tmp_path_factory):
    """A tiny segmenter's run of 4 updates; not to be written to."""
    logdir = tmp_path_factory.mktemp("segmenter")
    assert train_here("segmenter", phantoms, logdir, "four", purpose="evaluation", max_epochs=2).code == 0
    return logdir / "four"


@pytest.fixture(scope="module")
def sets(tiny_runs, tmp_path_factory):
    """Training cases, the folder of a synthetic volume for each of their masks, held-out cases and their volumes."""
    model = Model.load(tiny_runs.diffusion, num_steps=1)
    training, held_out = (cases_of_split(model, tiny_runs.data, split) for split in ("train", "val"))
    made = make_synthetic(model, training, tmp_path_factory.mktemp("made") / "synthetic")
    return training, made, held_out, [real_volume(model, case) for case in held_out]


@pytest.fixture(scope="module")
def measured(sets, segmenter, tmp_path_factory):
    """The folder of all arms, and their figures; not to be written to."""
    out = tmp_path_factory.mktemp("useful")
    return out, measure(out, segmenter, *sets, seeds=(0, 1))[0]


def test_every_arm_makes_as_many_updates_as_the_segmenter_did(measured, segmenter):
    out, figures = measured
    lasts = [checkpoints.load(out / f"{arm}-{seed}" / "checkpoints" / "last.pt") for arm in ARMS for seed in (0, 1)]
    assert {last["iteration"] for last in lasts} == {4} == {figures["num_updates"]}
    assert checkpoints.load(segmenter / "checkpoints" / "last.pt")["iteration"] == 4
    assert figures["num_training"] == figures["num_synthetic"] == 4 and figures["num_held_out"] == 2


def test_each_arm_is_trained_on_its_own_cases_and_tested_on_the_held_out_ones(measured, sets):
    _, made, held_out, _ = sets
    for arm, num_made in (("real", 0), ("synthetic", 8), ("both", 4)):
        listed = json.loads((measured[0] / f"{arm}.json").read_text())
        folders = [str(made) in entry["label"] for entry in listed["training"]]
        assert len(folders) == 8 and len({entry["case"] for entry in listed["training"]}) == 8
        assert sum(folders) == num_made
        assert [entry["label"] for entry in listed["validation"]] == [case["mask"] for case in held_out]


def test_the_same_call_trains_and_samples_nothing_anew(measured, sets, segmenter, tiny_runs, monkeypatch):
    monkeypatch.setattr(runs, "start", None)
    monkeypatch.setattr(Model, "sample", None)
    out, figures = measured
    assert measure(out, segmenter, *sets, seeds=(0, 1))[0] == figures
    model = Model.load(tiny_runs.diffusion, num_steps=1)
    assert make_synthetic(model, sets[0], sets[1]) == sets[1]


def test_the_page_and_the_card_say_what_each_arm_reached(measured):
    figures = measured[1]
    shown, said = render(figures, {}), sentence(figures)
    for arm in ARMS:
        assert f"<td>{arm}</td>" in shown and f"{figures['arms'][arm]['dice']:.3f}" in said
    assert "4 updates each" in shown


def test_arms_are_compared_case_by_case():
    real = np.array([[0.8, 0.6, np.nan], [0.9, 0.7, np.nan]])
    found = summary({"real": real, "synthetic": real - 0.1, "both": real + 0.02})
    assert found["arms"]["real"]["dice"] == pytest.approx(0.75)
    assert found["arms"]["real"]["by_seed"] == pytest.approx([0.7, 0.8])
    # A difference that is the same for every case and seed has no spread, however much these differ.
    assert found["synthetic_minus_real"]["interval"] == pytest.approx([-0.1, -0.1])
    assert found["both_minus_real"]["dice"] == pytest.approx(0.02)


def test_the_crossed_interval_holds_what_seeds_and_cases_both_add():
    draw = np.random.default_rng(0)
    table = draw.normal(size=(40, 1)) + 2 * draw.normal(size=(1, 60))  # rows and columns vary, and nothing else
    low, high = crossed_interval(table)
    error = (table.mean(1).var() / 40 + table.mean(0).var() / 60) ** 0.5
    assert (low, high) == pytest.approx((table.mean() - 1.96 * error, table.mean() + 1.96 * error), abs=0.15 * error)
    assert crossed_interval(np.full((1, 5), 0.3)) == pytest.approx((0.3, 0.3))


def test_volumes_for_held_out_masks_are_refused(sets, segmenter, tiny_runs, tmp_path):
    training, _, held_out, volumes = sets
    leaked = make_synthetic(Model.load(tiny_runs.diffusion, num_steps=1), held_out, tmp_path / "leaked")
    with pytest.raises(InputError, match="was made for the mask of phantom_0004, on which segmenters are tested"):
        measure(tmp_path / "out", segmenter, training, leaked, held_out, volumes)


def test_arms_without_cases_and_a_segmenter_that_is_none_are_refused(sets, segmenter, tmp_path):
    training, made, held_out, volumes = sets
    with pytest.raises(InputError, match="0 real and 4 synthetic training cases, 2 held-out ones; expected at least 1"):
        measure(tmp_path / "out", segmenter, [], made, held_out, volumes)
    with pytest.raises(InputError, match=r"there is no run at .*; expected the folder of one"):
        measure(tmp_path / "out", tmp_path, training, made, held_out, volumes)


def test_an_evaluation_trains_on_samples_where_it_is_asked_to(tiny_runs, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SECTIONS", [])
    monkeypatch.setattr(usefulness, "measure", partial(measure, seeds=(0,)))
    words = ("--model", tiny_runs.diffusion, "--data", tiny_runs.data, "--segmenter", judge, "--out", tmp_path / "out")
    ended = run_here("evaluate", *words, "-n", "1", "--steps", "1", "--usefulness")
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sections"]["usefulness"]
    assert list(found["arms"]) == list(ARMS) and found["seeds"] == [0]
    assert "<h2>Usefulness</h2>" in (tmp_path / "out" / "evaluation.html").read_text()
    assert len(list((tmp_path / "out" / "training_samples").glob("*/*.json"))) == 4
