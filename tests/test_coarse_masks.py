"""Coarse masks among fine ones: which cases they are of, what becomes of them, and who sees them."""

import pytest
import torch
from conftest import refused, train_here
from monai.data import MetaTensor

from latdiff3d import latent_cache
from latdiff3d.coarse_masks import CoarseCased, check_num_fine_cases, coarse_label, fine_cases, num_classes, num_labels
from latdiff3d.conditioning import MaskCondition, ScalarCondition
from latdiff3d.datalist import split_cases
from latdiff3d.errors import InputError
from latdiff3d.synthesis import Model
from latdiff3d.transforms import CoarseMaskd

LABELS = [0, 1, 2, 4]
MASK = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 4).expand(1, 4, 4, 4)  # 0 to 3 along the last axis


def cases(*names):
    return [{"case": name, "patient": name, "image": [f"{name}.nii"], "mask": f"{name}_seg.nii"} for name in names]


# Which cases


def coarse_in(splits):
    return {split: [case["case"] for case in found if case["coarse"]] for split, found in splits.items()}


def test_the_first_cases_of_train_list_are_fine(tmp_path):
    (tmp_path / "train.list").write_text("d\nb\na\n")
    (tmp_path / "val.list").write_text("c\n")
    splits = split_cases(cases("a", "b", "c", "d"), tmp_path, num_fine_cases=2)
    assert coarse_in(splits) == {"train": ["a"], "val": [], "test": []}
    assert [case["case"] for case in splits["train"]] == ["a", "b", "d"]  # in the order they have without it
    assert [case["case"] for case in fine_cases(splits["train"])] == ["b", "d"]


def test_without_lists_the_first_by_name_are(tmp_path):
    every = cases(*"abcdefgh")
    plain, splits = split_cases(every, tmp_path), split_cases(every, tmp_path, num_fine_cases=2)
    names = [case["case"] for case in plain["train"]]
    assert coarse_in(splits) == {"train": names[2:], "val": [], "test": []}
    assert all("coarse" not in case for case in plain["train"]) and fine_cases(plain["train"]) == plain["train"]


# What becomes of the masks


@pytest.mark.parametrize(("flag", "expected"), [({"coarse": True}, [0, 4, 4, 4]), ({"coarse": False}, [0, 1, 2, 3]),
                                                ({}, [0, 1, 2, 3])])  # fmt: skip
def test_the_mask_of_a_coarse_case_becomes_one_label_more(flag, expected):
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    case = {"mask": MetaTensor(MASK, affine=affine), **flag}
    found = CoarseCased("mask", label=coarse_label(LABELS, 2))(case)["mask"]
    assert found[0, 0, 0].tolist() == expected and found.dtype == MASK.dtype
    assert torch.equal(found.affine, affine.double())


def test_mask_mode_coarse_gives_that_label_too_and_1_where_all_are_coarse():
    for num_fine_cases, expected in ((2, [0, 4]), (None, [0, 1])):
        coarse = CoarseMaskd("mask", "coarse", label=coarse_label(LABELS, num_fine_cases))
        assert coarse({"mask": MASK})["mask"].unique().tolist() == expected


@pytest.mark.parametrize(
    ("mask_mode", "num_fine_cases", "labels", "classes"),
    [("fine", None, 4, 4), ("coarse", None, 2, 2), ("fine", 2, 4, 5), ("coarse", 2, 4, 5)],
)
def test_a_model_of_both_has_one_class_more(mask_mode, num_fine_cases, labels, classes):
    assert num_labels(LABELS, mask_mode, num_fine_cases) == labels
    assert num_classes(LABELS, mask_mode, num_fine_cases) == classes


def test_the_condition_tells_the_coarse_class_from_every_label():
    coarse = (MASK > 0)[None].float() * 4
    assert MaskCondition(5, 4)(coarse)[0, :, 0, 0, 0].tolist() == [0.25, 0, 0, 0, 0.75]
    assert MaskCondition(5, 4)(MASK[None])[0, :, 0, 0, 0].tolist() == [0.25, 0.25, 0.25, 0.25, 0]
    assert ScalarCondition(5, 1)(coarse)[0, 0, 0, 0].tolist() == [0, 1, 1, 1]
    assert ScalarCondition(5, 1)(MASK[None])[0, 0, 0, 0].tolist() == [0, 0.25, 0.5, 0.75]


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((2, "coarse", "concat"), "num_fine_cases is 2, but mask_mode coarse makes all masks coarse"),
        ((2, "fine", "none"), "num_fine_cases is 2, but conditioning none takes no mask"),
        ((4, "fine", "concat"), "num_fine_cases is 4, of 4 training cases; expected fewer"),
    ],
)
def test_a_number_without_effect_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        check_num_fine_cases(*settings, cases("a", "b", "c", "d"))
    check_num_fine_cases(None, settings[1], settings[2], [])


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_other_numbers_are_refused(phantoms, tmp_path, value):
    line = refused(train_here("segmenter", phantoms, tmp_path, "x", num_fine_cases=value))
    assert f"num_fine_cases is {value!r}; expected a whole number from 1 on, or null" in line


# Runs


def test_the_cache_has_another_entry_where_a_case_becomes_coarse():
    case, contents = cases("a")[0], {"a.nii": "1", "a_seg.nii": "2"}
    flags: list[dict[str, bool]] = [{}, {"coarse": False}, {"coarse": True}]
    keys = [latent_cache._key({**case, **flag}, (), ("3", "4"), contents) for flag in flags]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(("conditioning", "encode"), [("concat", "cached"), ("scalar", "on_the_fly")])
def test_a_model_trains_on_both_and_samples_for_either(
    phantoms, tiny_runs, tmp_path, monkeypatch, conditioning, encode
):
    seen = {}
    kind = MaskCondition if conditioning == "concat" else ScalarCondition
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, mask: (note(mask), original(self, mask))[1])

    def note(masks):
        for mask in masks:
            seen.setdefault(tuple(mask.unique().long().tolist()), []).append(1)

    first = str(tiny_runs.autoencoder)
    settings = {"conditioning": conditioning, "encode": encode, "num_fine_cases": 3, "max_epochs": 1}
    ended = train_here("diffusion", phantoms, tmp_path, "both", first_stage=first, **settings)
    assert ended.code == 0, ended.err
    assert len(seen[0, 4]) == 1  # one of four training cases, once an epoch
    assert all(max(labels) < 4 for labels in seen if labels != (0, 4))
    model, coarse = Model.load(tmp_path / "both"), Model.load(tmp_path / "both", settings={"mask_mode": "coarse"})
    path = phantoms / "phantom_0004" / "phantom_0004_seg.nii.gz"
    fine_mask, coarse_mask = model.grid_of(path).mask.as_tensor(), coarse.grid_of(path).mask.as_tensor()
    assert fine_mask.max() == 3 and torch.equal(coarse_mask, (fine_mask > 0) * 4.0)
    assert not torch.equal(model.sample(path, 0).volume, coarse.sample(path, 0).volume)


def test_a_model_of_fine_masks_takes_no_coarse_ones(tiny_runs):
    with pytest.raises(InputError, match=r"mask_mode is 'coarse', and .* was trained on fine masks alone"):
        Model.load(tiny_runs.diffusion, settings={"mask_mode": "coarse"})
    assert Model.load(tiny_runs.diffusion, settings={"mask_mode": "fine"}).is_conditional


def test_the_segmenter_learns_from_the_fine_cases_alone(phantoms, tmp_path):
    ended = train_here("segmenter", phantoms, tmp_path, "seg", num_fine_cases=2, max_epochs=1)
    assert ended.code == 0, ended.err
    assert "1 epochs, 1 steps" in ended.out  # of two cases a batch
