"""Which cases there are, and which patient is in which split."""

import pytest

from latdiff3d.datalist import read_cases, split_cases
from latdiff3d.errors import InputError
from latdiff3d.layouts import survey_cases


def named(*names, **more):
    return [{"case": name, "patient": name, "image": [f"{name}.nii.gz"], **more} for name in names]


def names_of(splits):
    return {split: [case["case"] for case in cases] for split, cases in splits.items()}


def test_the_first_of_several_problems_says_how_many_more(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1", without=["seg"])
    write_brats_case(tmp_path, "case_2", without=["t1"])
    (tmp_path / "case_3").mkdir()
    with pytest.raises(InputError, match=r"case_1 lacks case_1_seg.*\(and 2 more; `latdiff3d doctor DIR`"):
        read_cases(tmp_path)
    found = survey_cases(tmp_path)
    assert "case_3 is empty" in found[2].problems[0]
    assert len(found[1].case["image"]) == 3


def test_a_folder_of_lists_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist; expected the folder of train\.list and val\.list"):
        split_cases(named("a", "b"), tmp_path / "nowhere")


def test_adding_cases_moves_no_other(tmp_path):
    few = named(*(f"case_{i:03d}" for i in range(0, 60, 2)))
    many = named(*(f"case_{i:03d}" for i in range(60)))
    before, after = (names_of(split_cases(cases, tmp_path, 0.3, 0.2)) for cases in (few, many))
    for split in ("train", "val", "test"):
        assert before[split] and set(before[split]) <= set(after[split])


def test_the_hash_split_is_fixed_and_its_seed_matters(tmp_path):
    cases = named(*(f"case_{i:03d}" for i in range(20)))
    splits = names_of(split_cases(cases, tmp_path))
    # sha256 of "0:case_…", first 64 bits below 0.2: computed apart.
    assert splits["val"] == ["case_000", "case_011", "case_012"]
    assert names_of(split_cases(cases, tmp_path, seed=1)) != splits


def test_scans_of_one_patient_stay_together(tmp_path):
    cases = [{"case": f"p{i // 3}_{i % 3}", "patient": f"p{i // 3}", "image": []} for i in range(60)]
    splits = split_cases(cases, tmp_path, 0.3, 0.3)
    patients = [{case["patient"] for case in splits[split]} for split in ("train", "val", "test")]
    assert sum(map(len, patients)) == 20 == len(set.union(*patients))


def test_lists_decide_and_leave_the_rest_out(tmp_path):
    (tmp_path / "train.list").write_text("# ours\na\n\nb  # the second\n")
    (tmp_path / "val.list").write_text("c\n")
    splits = names_of(split_cases(named("a", "b", "c", "d"), tmp_path))
    assert splits == {"train": ["a", "b"], "val": ["c"], "test": []}


def test_a_listed_case_that_is_missing_is_named_with_the_nearest(tmp_path):
    (tmp_path / "train.list").write_text("case_1\ncase_22\n")
    with pytest.raises(InputError, match=r"train.list, line 2 names case_22, .* 2 cases there are; the nearest is"):
        split_cases(named("case_1", "case_2"), tmp_path)


def test_a_case_in_two_lists_is_refused(tmp_path):
    (tmp_path / "train.list").write_text("a\nb\n")
    (tmp_path / "val.list").write_text("b\n")
    with pytest.raises(InputError, match=r"b is in train.list and in .*val.list"):
        split_cases(named("a", "b"), tmp_path)


def test_a_patient_in_two_lists_is_refused(tmp_path):
    (tmp_path / "train.list").write_text("a\n")
    (tmp_path / "val.list").write_text("b\n")
    cases = [dict(case, patient="p") for case in named("a", "b")]
    with pytest.raises(InputError, match="patient p is in two splits: a in train, b in val"):
        split_cases(cases, tmp_path)


def test_a_datalists_own_sections_decide(tmp_path):
    cases = named("a", section="train") + named("b", section="val") + named("c", section="test")
    splits = split_cases(cases, tmp_path)
    assert names_of(splits) == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert "section" not in splits["train"][0]


def test_a_datalists_own_test_section_is_never_trained_on(tmp_path):
    cases = named(*(f"case_{i}" for i in range(30)), section="train") + named("held_out", section="test")
    splits = names_of(split_cases(cases, tmp_path))
    assert splits["test"] == ["held_out"] and splits["val"]


def test_an_empty_split_says_how_many_cases_there_are(tmp_path):
    with pytest.raises(InputError, match=r"1 case\(s\) of 1 patient\(s\) gave .*Name cases in"):
        split_cases(named("a"), tmp_path)
    with pytest.raises(InputError, match=r"2 case\(s\) of 2 patient\(s\) gave 2 to train and 0 to val") as error:
        split_cases(named("a", "b"), tmp_path, val_fraction=0.05)
    seed = int(str(error.value).split("The split seed ")[1].split()[0])
    assert len(split_cases(named("a", "b"), tmp_path, val_fraction=0.05, seed=seed)["val"]) == 1


def test_fractions_that_leave_no_training_set_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"val_fraction 0.6 and test_fraction 0.5 leave no split"):
        split_cases(named("a", "b"), tmp_path, 0.6, 0.5)


# Real volumes


def test_the_real_hippocampus_set_is_complete(real_data):
    cases = read_cases(real_data / "Task04_Hippocampus")
    assert len(cases) == 191
    assert cases[0]["case"] == "hippocampus_001"
    splits = split_cases(cases, real_data / "Task04_Hippocampus")
    assert len(splits["train"]) + len(splits["val"]) == 191 and len(splits["val"]) > 20
