"""The doctor: all that is wrong with a data set at once, and a table of what it holds."""

import io

import numpy as np
from conftest import truncate
from rich.console import Console

from latdiff3d.doctor import examine, print_report

RAMP = np.arange(120, dtype=np.float32).reshape(4, 5, 6)


def test_the_doctor_lists_everything_at_once(tmp_path, write_brats_case, write_volume):
    nan = RAMP.copy()
    nan[0, 0, 0] = np.nan
    seven = np.full((4, 5, 6), 7, np.uint8)
    write_brats_case(tmp_path, "case_1")
    write_brats_case(tmp_path, "case_2", without=["t1"], t2=nan)
    write_brats_case(tmp_path, "case_3", seg=seven, flair=RAMP[..., :5])
    write_brats_case(tmp_path, "case_4", t1ce=np.random.default_rng(0).normal(size=(4, 5, 6)))
    truncate(tmp_path / "case_4" / "case_4_t1ce.nii.gz")
    (tmp_path / "train.list").write_text("case_9\n")
    rows, problems = examine(tmp_path, labels=[0, 1])
    assert [row.case for row in rows] == ["case_1", "case_2", "case_3", "case_4"]
    said = [
        "case_2 lacks case_2_t1.nii.gz",
        "case_2/case_2_t2.nii.gz has 1 NaN of 120 voxels",
        "case_3/case_3_t1.nii.gz (4×5×6) and case_3/case_3_flair.nii.gz (4×5×5) have different shapes",
        "case_3/case_3_t1ce.nii.gz (4×5×6) and",
        "case_3/case_3_t2.nii.gz (4×5×6) and",
        "case_3/case_3_seg.nii.gz (4×5×6) and",
        "case_3/case_3_seg.nii.gz has labels {7}; this configuration knows {0, 1}",
        "case_4/case_4_t1ce.nii.gz is truncated or damaged",
        "names case_9, which is none of the 4 cases",
    ]
    assert len(problems) == len(said)
    for problem, expected in zip(problems, said, strict=True):
        assert expected in problem


def test_the_report_shows_the_table_and_every_problem(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1")
    rows, problems = examine(tmp_path)
    assert rows[0].labels == {0: 112, 1: 8} and rows[0].intensities[1] == (1, 120)
    console = Console(record=True, width=120, file=io.StringIO())
    assert print_report(rows, problems, console)
    text = console.export_text()
    for shown in ("case_1", "4×5×6", "1×1×1", "RAS", "1: 8", "0 … 119", "1 case(s), no problem found"):
        assert shown in text
    assert not print_report(rows, ["[x] is wrong"], console)
    assert "✗ [x] is wrong" in console.export_text()


def test_the_doctor_tells_a_folder_that_is_no_data_set(tmp_path):
    rows, [problem] = examine(tmp_path / "nowhere")
    assert rows == [] and "does not exist" in problem


def test_the_doctor_tells_the_4d_file_among_3d_ones(tmp_path, write_volume):
    for name in ("a", "b", "c"):
        write_volume(tmp_path / "images" / f"{name}.nii.gz", np.stack([RAMP, RAMP + 1], -1) if name == "b" else RAMP)
    _, problems = examine(tmp_path, "folders", mask_required=False)
    assert len(problems) == 1 and "images/b.nii.gz is 4D (4×5×6×2): axis 3 holds 2 volumes" in problems[0]
