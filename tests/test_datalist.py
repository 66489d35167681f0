"""Which files belong together, and which patient is in which split."""

import json
from pathlib import Path

import pytest

from latdiff3d.datalist import find_layout, read_cases, split_cases, survey_cases, volume_stem
from latdiff3d.errors import InputError


def named(*names, **more):
    return [{"case": name, "patient": name, "image": [f"{name}.nii.gz"], **more} for name in names]


def names_of(splits):
    return {split: [case["case"] for case in cases] for split, cases in splits.items()}


# BraTS


def test_brats_modalities_come_in_the_order_asked_for(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_2")
    write_brats_case(tmp_path, "case_1")
    cases = read_cases(tmp_path, modalities=("t2", "flair"))
    assert [case["case"] for case in cases] == ["case_1", "case_2"]
    folder = tmp_path / "case_1"
    assert cases[0] == {
        "case": "case_1",
        "patient": "case_1",
        "image": [str(folder / "case_1_t2.nii.gz"), str(folder / "case_1_flair.nii.gz")],
        "mask": str(folder / "case_1_seg.nii.gz"),
    }


def test_brats_reads_uncompressed_and_2023_names(tmp_path, write_volume):
    for part in ("t1n", "seg"):
        write_volume(tmp_path / "BraTS-GLI-0-000" / f"BraTS-GLI-0-000-{part}.nii")
    [case] = read_cases(tmp_path, modalities=["t1n"], patient_pattern=r"^(.*)-\d+$")
    assert case["patient"] == "BraTS-GLI-0"
    assert case["mask"].endswith("BraTS-GLI-0-000-seg.nii")


def test_a_missing_modality_is_named_beside_what_is_there(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1", without=["t1ce"])
    with pytest.raises(InputError) as error:
        read_cases(tmp_path)
    assert "case_1 lacks case_1_t1ce.nii.gz" in str(error.value)
    assert "holds case_1_flair.nii.gz, case_1_seg.nii.gz, case_1_t1.nii.gz, case_1_t2.nii.gz" in str(error.value)


def test_the_first_of_several_problems_says_how_many_more(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1", without=["seg"])
    write_brats_case(tmp_path, "case_2", without=["t1"])
    (tmp_path / "case_3").mkdir()
    with pytest.raises(InputError, match=r"case_1 lacks case_1_seg.*\(and 2 more; `latdiff3d doctor DIR`"):
        read_cases(tmp_path)
    found = survey_cases(tmp_path)
    assert "case_3 is empty" in found[2].problems[0]
    assert len(found[1].case["image"]) == 3


def test_a_mask_may_be_absent_where_none_is_required(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1", without=["seg"])
    [case] = read_cases(tmp_path, mask_required=False)
    assert "mask" not in case and len(case["image"]) == 4


def test_a_compressed_and_a_plain_copy_of_one_file_are_refused(tmp_path, write_brats_case, write_volume):
    folder = write_brats_case(tmp_path, "case_1")
    write_volume(folder / "case_1_t1.nii")
    with pytest.raises(InputError, match=r"has both case_1_t1\.nii and case_1_t1\.nii\.gz; expected one"):
        read_cases(tmp_path)


# Folders


def test_pairs_are_matched_by_name_and_not_by_order(tmp_path, write_volume):
    for name in ("a", "b", "c"):
        write_volume(tmp_path / "images" / f"{name}.nii.gz")
        write_volume(tmp_path / "labels" / f"{name}.nii")
    write_volume(tmp_path / "images" / "._a.nii.gz")
    cases = read_cases(tmp_path)
    assert [(Path(c["image"][0]).name, Path(c["mask"]).name) for c in cases] == [
        ("a.nii.gz", "a.nii"),
        ("b.nii.gz", "b.nii"),
        ("c.nii.gz", "c.nii"),
    ]


def test_every_unmatched_name_is_a_problem_that_names_it(tmp_path, write_volume):
    for name in ("case_a", "case_b"):
        write_volume(tmp_path / "images" / f"{name}.nii.gz")
    for name in ("case_b", "case_c"):
        write_volume(tmp_path / "masks" / f"{name}.nii.gz")
    with pytest.raises(InputError, match=r"images/case_a.nii.gz has no file of the same name in .*masks"):
        read_cases(tmp_path)
    problems = [problem for found in survey_cases(tmp_path) for problem in found.problems]
    assert len(problems) == 2
    assert "masks/case_c.nii.gz has no file of the same name" in problems[1]


def test_masks_and_labels_together_are_ambiguous(tmp_path, write_volume):
    for folder in ("images", "masks", "labels"):
        write_volume(tmp_path / folder / "a.nii.gz")
    with pytest.raises(InputError, match="both masks/ and labels/"):
        read_cases(tmp_path)


# JSON


def write_datalist(root, listed, name="datalist.json"):
    (root / name).write_text(json.dumps(listed))
    return root / name


def test_decathlon_needs_only_the_training_section(tmp_path, write_volume):
    image = write_volume(tmp_path / "imagesTr" / "x_1.nii.gz")
    mask = write_volume(tmp_path / "labelsTr" / "x_1.nii.gz")
    write_datalist(
        tmp_path,
        {"training": [{"image": "./imagesTr/x_1.nii.gz", "label": "./labelsTr/x_1.nii.gz"}]},
        "dataset.json",
    )
    [case] = read_cases(tmp_path)
    assert case == {"case": "x_1", "patient": "x_1", "section": "train", "image": [image], "mask": mask}


def test_decathlons_test_images_without_masks_are_left_out(tmp_path, write_volume):
    write_volume(tmp_path / "a.nii.gz")
    listed = {"training": [{"image": "a.nii.gz", "label": "a.nii.gz"}], "test": ["./b.nii.gz"]}
    write_datalist(tmp_path, listed, "dataset.json")
    assert [case["case"] for case in read_cases(tmp_path)] == ["a"]


def test_a_listed_file_that_is_absent_is_named(tmp_path, write_volume):
    write_volume(tmp_path / "a.nii.gz")
    write_datalist(tmp_path, [{"image": "a.nii.gz", "label": "a_seg.nii.gz"}])
    with pytest.raises(InputError, match=r"a \(datalist.json, training entry 0\) lists .*a_seg.nii.gz, which is not"):
        read_cases(tmp_path)


def test_a_datalist_keeps_its_names_patients_and_paths(tmp_path, write_volume):
    for name in ("t1", "t2", "seg"):
        write_volume(tmp_path / "data" / f"{name}.nii.gz")
    absolute = str(tmp_path / "data" / "t2.nii.gz")
    entry = {"image": ["data/t1.nii.gz", absolute], "mask": "data/seg.nii.gz", "case": "one", "patient": "p"}
    file = write_datalist(tmp_path, [entry], "mine.json")
    [case] = read_cases(file)
    assert (case["case"], case["patient"]) == ("one", "p")
    assert case["image"] == [str(tmp_path / "data" / "t1.nii.gz"), absolute]


def test_two_cases_of_one_name_are_refused(tmp_path, write_volume):
    for patient in ("p1", "p2"):
        write_volume(tmp_path / patient / "image.nii.gz")
    write_datalist(tmp_path, [{"image": f"{p}/image.nii.gz", "mask": f"{p}/image.nii.gz"} for p in ("p1", "p2")])
    with pytest.raises(InputError, match=r'more than once, image first.*give each entry a "case"'):
        read_cases(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON: .*line 1"),
        ('{"labels": {}}', "has the keys labels; expected one of training, validation, test, or a list"),
        ('{"training": {"image": "a"}}', "training is a dict; expected a list"),
        ('[{"label": "a.nii.gz"}]', 'training entry 0: found {"label": "a.nii.gz"}; expected {"image"'),
    ],
)
def test_a_broken_datalist_says_where(tmp_path, text, message):
    (tmp_path / "datalist.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path)


# Layouts and folders


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    for layout in ("auto", "brats", "folders", "json"):
        with pytest.raises(InputError, match="nowhere does not exist; expected a data set's folder"):
            read_cases(tmp_path / "nowhere", layout)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError) as error:
        read_cases(tmp_path)
    for expected in ("is empty", "dataset.json", "datalist.json", "images/ beside masks/", "<case>_seg.nii.gz"):
        assert expected in str(error.value)
    with pytest.raises(InputError, match="holds no case in the layout brats"):
        read_cases(tmp_path, "brats")


def test_two_layouts_in_one_folder_are_ambiguous(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1")
    write_datalist(tmp_path, [])
    with pytest.raises(InputError, match=r"more than one layout: brats .*; json .*Say which with layout"):
        find_layout(tmp_path)
    assert len(read_cases(tmp_path, "brats")) == 1


def test_an_unknown_layout_names_the_known(tmp_path):
    with pytest.raises(InputError, match="layout 'bids' is unknown; expected auto, brats, decathlon, json, folders"):
        read_cases(tmp_path, "bids")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), ("case", "has no group"), (r"^sub-(\d+)", "does not match the case case_1")],
)
def test_a_patient_pattern_that_cannot_serve_is_refused(tmp_path, write_brats_case, pattern, message):
    write_brats_case(tmp_path, "case_1")
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path, patient_pattern=pattern)


def test_a_stem_drops_the_whole_suffix_and_nothing_else():
    assert volume_stem("a/case.v2_1.nii.gz") == "case.v2_1"
    assert volume_stem("scan.NRRD") == "scan"


# Splits


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


def test_the_real_brats_folders_have_four_modalities(real_data):
    cases = read_cases(real_data / "open_ms_brats_layout")
    assert [case["case"] for case in cases] == ["patient07", "patient19"]
    assert [volume_stem(path) for path in cases[0]["image"]] == [
        f"patient07_{m}" for m in ("flair", "t1", "t1ce", "t2")
    ]


def test_loose_volumes_are_no_layout(real_data):
    with pytest.raises(InputError, match=r"odd holds fernando_t2_aniso.nii.gz.*none of the known layouts"):
        read_cases(real_data / "odd")
