"""Plans for machines that are not here, through the command line."""

import pytest
from conftest import TINY, as_words, run_here

from latdiff3d import planning
from latdiff3d.errors import InputError
from latdiff3d.simulated_memory import Need

SIZES = {key: value for key, value in {**TINY["autoencoder"], **TINY["diffusion"]}.items() if "epochs" not in key}
CARD = planning.Machine("cuda", 1.7e9, True)
HOUSE = planning.Machine("cpu", 1.6e9, False)


def needs(monkeypatch, need_of):
    """Let a configuration need what `need_of(stage, settings)` says, in GB of a step."""
    asked = []

    def simulate(stage, overlays, settings, on_gpu):
        asked.append((stage, dict(settings), on_gpu))
        return Need(0, round(1e9 * need_of(stage, settings)))

    monkeypatch.setattr(planning, "simulate", simulate)
    return asked


def test_what_fits_is_left_as_it_is():
    ended = run_here("plan", "--device", "cpu", "--memory", "4GB", *as_words(SIZES))
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "Memory of one process in training, in GB, on a CPU with 4.0"
    assert [line.split("  ")[0] for line in lines[2:4]] == ["stage 1, autoencoder", "stage 2, diffusion"]
    assert all(line.endswith("fits") for line in lines[2:4])
    assert lines[4].startswith("To encode whole volumes by tiles in what is left: encode_memory_gb=3")
    assert "use_checkpoint" not in ended.out


def test_what_does_not_fit_is_changed_until_it_does_what_costs_least_first(monkeypatch):
    def need(stage, settings):
        size = settings.get("batch_size", 1 if stage == "autoencoder" else 4)
        return (1 if stage == "autoencoder" else 0.9) * size * (0.6 if settings.get("use_checkpoint") else 1)

    asked = needs(monkeypatch, need)
    found = list(planning.plans([], {"batch_size": 4}, CARD))
    assert [(plan.stage, plan.changes, plan.fits) for plan in found] == [
        ("autoencoder", {}, False),
        ("autoencoder", {"use_checkpoint": True}, False),
        ("autoencoder", {"use_checkpoint": True, "batch_size": 2, "accumulate_grad_batches": 2}, False),
        ("autoencoder", {"use_checkpoint": True, "batch_size": 1, "accumulate_grad_batches": 4}, True),
        ("diffusion", {}, False),
        ("diffusion", {"use_checkpoint": True}, False),
        ("diffusion", {"use_checkpoint": True, "batch_size": 2, "accumulate_grad_batches": 2}, False),
        ("diffusion", {"use_checkpoint": True, "batch_size": 1, "accumulate_grad_batches": 4}, True),
    ]
    assert all(settings["precision"] == "bf16" and on_gpu for _, settings, on_gpu in asked)


def test_bf16_is_proposed_where_the_machine_has_it_and_fp32_was_asked_for(monkeypatch):
    needs(monkeypatch, lambda stage, settings: 0.9 if settings["precision"] == "bf16" else 1.8)
    found = [plan.changes for plan in planning.plans([], {"precision": "fp32"}, CARD)]
    assert found == [{}, {"precision": "bf16"}] * 2


def test_a_change_that_saves_nothing_is_not_proposed(monkeypatch):
    needs(monkeypatch, lambda stage, settings: min(settings.get("crop_to", [64])) / 20)
    found = [plan.changes for plan in planning.plans([], {"crop_to": [64, 64, 32]}, HOUSE)]
    assert found == [{}, {"crop_to": [32, 32, 16]}] * 2


def test_networks_that_are_too_large_by_themselves_are_said_to_be(monkeypatch):
    monkeypatch.setattr(planning, "simulate", lambda *_: Need(10**10, 1))
    found = list(planning.plans([], {}, CARD))
    assert [plan.changes for plan in found] == [{}, {}]
    assert "No setting tried lets stage 2, diffusion fit; its networks must be smaller." in planning.report(found, CARD)


def test_an_overlay_of_one_stage_counts_for_that_one(monkeypatch):
    asked = needs(monkeypatch, lambda stage, settings: 0.1)
    list(planning.plans(["configs/autoencoder_vq.yaml", "configs/flow.yaml"], {"loss::disc_weight": 0}, HOUSE))
    assert [(stage, "loss::disc_weight" in settings) for stage, settings, _ in asked] == [
        ("autoencoder", True),
        ("diffusion", False),
    ]


def test_too_little_memory_ends_with_code_1():
    ended = run_here("plan", "--device", "cpu", "--memory", "0.601", *as_words(SIZES))
    assert ended.code == 1
    assert "too much" in ended.out and "use_checkpoint=true" in ended.out and ended.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device is 'tpu'; expected cpu, cuda or a GPU by its number, such as cuda:1."),
        (["--device", "cpu:0"], "--device is 'cpu:0'; expected cpu"),
        (["--memory", "-1"], "memory is '-1'; expected GB above 0, such as 6 or 6GB."),
        (["--device", "cuda:99"], "there is no cuda:99 here; give the card's memory in GB"),
        (["--device", "cpu", "batch_sise=2"], "unknown key batch_sise; did you mean batch_size?"),
        (["--device", "cpu", "batch_size=0"], "batch_size is 0; expected a whole number from 1 on."),
    ],
)
def test_a_mistake_is_one_line(words, message):
    ended = run_here("plan", *words)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1


def test_a_card_is_named_by_its_memory():
    assert planning.machine("cuda", 24) == planning.Machine("cuda", 24e9, True)
    with pytest.raises(InputError):
        planning.machine("cuda", 0)
