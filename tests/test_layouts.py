"""Which files belong together, in every layout."""

import json
from pathlib import Path

import pytest

from latdiff3d.datalist import read_cases
from latdiff3d.errors import InputError
from latdiff3d.layouts import find_layout, survey_cases, volume_stem

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


# Real volumes


def test_the_real_brats_folders_have_four_modalities(real_data):
    cases = read_cases(real_data / "open_ms_brats_layout")
    assert [case["case"] for case in cases] == ["patient07", "patient19"]
    assert [volume_stem(path) for path in cases[0]["image"]] == [
        f"patient07_{m}" for m in ("flair", "t1", "t1ce", "t2")
    ]


def test_loose_volumes_are_no_layout(real_data):
    with pytest.raises(InputError, match=r"odd holds fernando_t2_aniso.nii.gz.*none of the known layouts"):
        read_cases(real_data / "odd")
