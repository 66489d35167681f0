"""What is known of a case: read from datalist, table and header, checked, and turned into numbers and back."""

import json
import math

import numpy as np
import pytest
import torch

from latdiff3d.covariates import Covariates, described, parse_covariates
from latdiff3d.datalist import read_cases, split_cases
from latdiff3d.errors import InputError

AGE, SEX = {"name": "age", "mean": 60, "std": 15}, {"name": "sex", "classes": ["F", "M"]}
SPACING = {"name": "spacing", "mean": 1, "std": 0.5}


@pytest.fixture
def folder(tmp_path, write_brats_case):
    for name in ("a", "b", "c"):
        write_brats_case(tmp_path, name)
    return tmp_path


def known_of(folder, settings=(AGE, SEX), **more):
    covariates = Covariates(settings)
    return [covariates.values(case["covariates"]) for case in described(read_cases(folder), covariates, folder, **more)]


def test_values_come_from_a_table_beside_the_data(folder):
    (folder / "covariates.csv").write_text("case,sex,age,note\nb, M ,61.5,x\na,F,,\nelsewhere,X,1,\n\n")
    assert known_of(folder) == [{"age": None, "sex": "F"}, {"age": 61.5, "sex": "M"}, {"age": None, "sex": None}]


def test_values_come_from_a_datalists_entries_and_the_table_adds_to_them(folder):
    entries = [
        {"case": name, "image": [f"{name}/{name}_t1.nii.gz"], "mask": f"{name}/{name}_seg.nii.gz", **said}
        for name, said in (("a", {"age": 40, "fold": 2}), ("b", {"sex": "M", "age": None}), ("c", {}))
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "covariates.csv").write_text("case,sex,age\na,F,40\nb,,50\n")
    expected = [{"age": 40.0, "sex": "F"}, {"age": 50.0, "sex": "M"}, {"age": None, "sex": None}]
    assert known_of(folder / "list.json") == expected
    (folder / "covariates.csv").write_text("case,age\na,41\n")
    with pytest.raises(InputError, match=r"a: age is 40 in the datalist and '41' in covariates\.csv; correct one"):
        known_of(folder / "list.json")


def test_spacing_is_the_headers_in_ras_order_or_the_setting(tmp_path, write_volume):
    affine = np.zeros((4, 4))
    affine[1, 0], affine[0, 1], affine[2, 2], affine[3, 3] = -2, 1, 3, 1  # the file's first axis is P, 2 mm
    write_volume(tmp_path / "images" / "a.nii", None, affine)
    write_volume(tmp_path / "masks" / "a.nii", np.ones((4, 5, 6), np.uint8), affine)
    assert known_of(tmp_path, [SPACING]) == [{"spacing": [1.0, 2.0, 3.0]}]
    assert known_of(tmp_path, [SPACING], spacing=[1, 1, 2]) == [{"spacing": [1.0, 1.0, 2.0]}]


def test_without_covariates_cases_are_as_they_were(folder):
    (folder / "covariates.csv").write_text("not a table")
    cases = read_cases(folder)
    assert described([{**case, "covariates": {"age": 3}} for case in cases], Covariates(), folder) == cases
    assert all("covariates" not in case for case in split_cases(cases, folder, 0.5, seed=1)["train"])


def test_numbers_and_values_are_each_others_inverse():
    covariates = Covariates([AGE, SEX, SPACING])
    numbers = covariates.numbers({"age": "63.7", "sex": "M", "spacing": "0.9,0.9,3"}, "here")
    assert numbers.shape == (5,) == (covariates.num_columns,)
    assert covariates.values(numbers) == {"age": 63.7, "sex": "M", "spacing": [0.9, 0.9, 3.0]}
    nothing = covariates.numbers({"age": ""}, "here")
    assert nothing.isnan().all() and covariates.values(nothing) == {"age": None, "sex": None, "spacing": None}


def test_classes_may_be_numbers():
    assert Covariates([{"name": "grade", "classes": [2, 3, 4]}]).numbers({"grade": 4}, "here").tolist() == [2.0]


def test_how_many_cases_have_a_value_is_said(capsys):
    covariates = Covariates([AGE, SEX])
    cases = [{"covariates": torch.tensor([age, sex])} for age, sex in ((60.0, 0.0), (math.nan, 1.0))]
    covariates.require_values(cases)
    assert "covariates, known of 2 training cases: age of 1, sex of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the 1 training cases says its age; expected a column age"):
        covariates.require_values(cases[1:])
    Covariates().require_values([{}])


def test_words_become_values_by_name():
    assert parse_covariates(["age=60", "sex=F", "note=a=b", "grade="]) == {
        "age": "60", "sex": "F", "note": "a=b", "grade": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("age", r"covariates is 'age'; expected a list, such as"),
        ({"age": {}}, r"covariates is \{'age': \{\}\}; expected a list, such as"),
        (["age"], r"covariates\[0\] is 'age'; expected \{name: age, mean: 60, std: 15\} or"),
        ([{"name": "age", "mean": 60}], r"covariates\[0\] is .*; expected \{name: age"),
        ([{"name": "age", "mean": 60, "sd": 1}], r"covariates\[0\] is .*; expected \{name: age"),
        ([{**AGE, "std": 0}], "age has mean 60 and std 0; expected numbers, std above 0"),
        ([{**AGE, "mean": "x"}], "age has mean 'x' and std 15; expected numbers"),
        ([{"name": "sex", "classes": "FM"}], "sex has the classes 'FM'; expected a list of names"),
        ([{"name": "sex", "classes": []}], r"sex has the classes \[\]; expected a list of names"),
        ([{"name": "sex", "classes": [True, "M"]}], r"sex has the classes \[True, 'M'\]; expected a list of names"),
        ([{"name": "sex", "classes": ["F", "F"]}], "expected each of them once"),
        ([{"name": "spacing", "classes": ["1"]}], "spacing has the classes .*; expected mean and std"),
        ([AGE, AGE], "covariates names age, age; expected each name once"),
    ],
)
def test_what_is_no_covariate_is_refused(settings, line):
    with pytest.raises(InputError, match=line):
        Covariates(settings)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("case,sex\nb,X\n", "b: sex is 'X'; known are F, M. Correct it, leave it out"),
        ("case,age\nb,old\n", "b: age is 'old'; expected a number, or nothing where unknown"),
        ("case,age\nb,nan\n", "b: age is 'nan'; expected a number"),
        ("case,age\nb,1\nb,2\n", "covariates.csv, line 3 names the case b again"),
        ("case,age\nb\n", "covariates.csv, line 2 has 1 cells; expected 2"),
        ("name,age\nb,1\n", "covariates.csv has the columns name, age; expected case first"),
        ("case,age,age\nb,1,1\n", "covariates.csv has the columns case, age, age; expected case first, and each"),
        ("", "covariates.csv has the columns ; expected case first"),
    ],
)
def test_what_is_wrong_with_the_table_is_one_line(folder, text, line):
    (folder / "covariates.csv").write_text(text)
    with pytest.raises(InputError, match=line):
        known_of(folder)


@pytest.mark.parametrize("value", ["1,1", "1,1,x", "0,1,1", [1, 2]])
def test_a_spacing_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="expected three sizes in mm, such as 1,1,3"):
        Covariates([SPACING]).numbers({"spacing": value}, "here")
