"""What a file says of where it comes from, and what is left of it when the sidecar or the header is lost."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import refused, run_here

from latdiff3d import __version__, provenance
from latdiff3d.errors import InputError
from latdiff3d.volumes import write_synthetic

MADE = {
    "Checkpoint": {"Path": "runs/of_dr_no/best.pt", "SHA256": "ab" * 32},
    "Seed": 3,
    "Sampler": "ddim",
    "Mask": {"Name": "patient_7_seg.nii.gz", "SHA256": "cd" * 32},
    "Units": "normalised intensity, 0 to 1",
}


@pytest.fixture
def case(tmp_path):
    """A folder as sampling writes it: two volumes, their mask and the sidecar."""
    volume = np.random.default_rng(0).random((2, 5, 6, 7))
    write_synthetic(tmp_path, "case", volume, np.eye(4), ["t1", "t2"], MADE, np.ones((5, 6, 7), np.uint8))
    return tmp_path / "case"


def rewritten(path, keep_description, keep_extension):
    """Save a file again as other software would, and return it."""
    image = nib.load(path)
    plain = nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine)
    if keep_description:
        plain.header["descrip"] = image.header["descrip"]
    if keep_extension:
        plain.header.extensions.extend(image.header.extensions)
    nib.save(plain, path)
    return path


def test_a_file_as_it_was_written_tells_all(case):
    found = provenance.inspect(case / "case_t1.nii.gz")
    assert found.is_synthetic and found.found_in == ("description", "extension", "sidecar")
    assert found.version == __version__ and found.unchanged is True
    assert found.sidecar == case / "case.json" and found.said["Seed"] == 3
    report = found.report()
    assert f"case_t1.nii.gz is SYNTHETIC, made by latdiff3d {__version__}" in report
    for words in ("best.pt, SHA-256 abab", "seed     3", "patient_7_seg.nii.gz, SHA-256 cdcd", "as it was written"):
        assert words in report


def test_without_the_sidecar_the_header_names_model_seed_and_mask_by_hash_alone(case):
    (case / "case.json").unlink()
    found = provenance.inspect(case / "case_t1.nii.gz")
    assert found.found_in == ("description", "extension") and found.unchanged is None
    assert found.said["Checkpoint"] == {"SHA256": "ab" * 32} and found.said["Mask"] == {"SHA256": "cd" * 32}
    assert found.said["Seed"] == 3 and found.version == __version__
    raw = bytes(nib.load(case / "case_t1.nii.gz").header.extensions[0].get_content())
    assert b"patient_7" not in raw and b"dr_no" not in raw


def test_every_description_says_synthetic_and_fits_a_header():
    for kind, text in provenance.DESCRIPTIONS.items():
        assert len(text.encode()) <= 79
        assert text.startswith("SYNTHETIC") == (kind != "mask") and "SYNTHETIC" in text


@pytest.mark.parametrize("kept", ["description", "extension"])
def test_either_mark_in_the_header_is_enough(case, kept, tmp_path):
    path = rewritten(case / "case_t1.nii.gz", kept == "description", kept == "extension")
    alone = shutil.move(path, tmp_path / "anonymous.nii.gz")
    found = provenance.inspect(alone)
    assert found.found_in == (kept,) and found.version == __version__
    assert "sidecar  none beside it" in found.report()


def test_a_file_that_was_changed_is_told_from_its_hash(case):
    found = provenance.inspect(rewritten(case / "case_t2.nii.gz", True, True))
    assert found.unchanged is False and "CHANGED since it was written" in found.report()


def test_the_sidecar_alone_tells_of_the_files_that_it_lists_and_no_other(case):
    assert provenance.inspect(rewritten(case / "case_t1.nii.gz", False, False)).found_in == ("sidecar",)
    shutil.copy(case / "case_t1.nii.gz", case / "case_scan.nii.gz")
    found = provenance.inspect(case / "case_scan.nii.gz")
    assert not found.is_synthetic and found.sidecar is None
    assert "no mark of latdiff3d, which does not say that it is a real scan" in found.report()


def test_the_mask_beside_is_not_called_synthetic(case):
    found = provenance.inspect(case / "case_seg.nii.gz")
    assert not found.is_synthetic and found.unchanged is True
    assert "the mask these SYNTHETIC volumes were made for, not itself synthetic" in found.report()


def test_a_sidecar_of_an_earlier_version_lists_no_files(case):
    said = json.loads((case / "case.json").read_text())
    del said["Files"]
    (case / "case.json").write_text(json.dumps(said))
    found = provenance.inspect(case / "case_t1.nii.gz")
    assert found.sidecar == case / "case.json" and found.unchanged is None


def test_a_sidecar_of_a_real_scan_is_none_of_ours(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "sub-01.json").write_text('{"EchoTime": 0.02}')
    assert not provenance.inspect(tmp_path / "sub-01_T1w.nii.gz").is_synthetic


def test_a_damaged_sidecar_is_said(case):
    (case / "case.json").write_text('{"Seed": 3,')
    with pytest.raises(InputError, match=r"case\.json, beside the file, is no JSON \(.*\); restore it or move it away"):
        provenance.inspect(case / "case_t1.nii.gz")


def test_the_command_has_three_exit_codes(case, tmp_path):
    assert run_here("inspect", case / "case_t1.nii.gz").code == 0
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    real = run_here("inspect", tmp_path / "scan.nii.gz")
    assert real.code == 1 and "no mark of latdiff3d" in real.out
    assert "absent.nii.gz does not exist" in refused(run_here("inspect", tmp_path / "absent.nii.gz"))
    (tmp_path / "scan.nrrd").write_bytes((tmp_path / "scan.nii.gz").read_bytes())
    refused(run_here("inspect", tmp_path / "scan.nrrd"))
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "scan.nii.gz").read_bytes()[:30])
    assert re.search(r"cut\.nii\.gz is truncated or damaged", refused(run_here("inspect", tmp_path / "cut.nii.gz")))


def test_what_a_volumes_last_bits_depend_on_is_noted():
    said = provenance.computed_on(torch.device("cpu"), "fp32")
    assert said["Device"].startswith("cpu (") and said["Precision"] == "fp32"
    assert said["NumThreads"] == torch.get_num_threads() and said["Libraries"]["torch"] == torch.__version__


def test_the_code_is_named_by_its_version_and_its_sources(case):
    generated = json.loads((case / "case.json").read_text())["GeneratedBy"]
    assert generated["Name"] == "latdiff3d" and generated["Version"] == __version__
    assert re.fullmatch("[0-9a-f]{64}", generated["SourceSHA256"])
    assert generated["SourceSHA256"] == provenance.source_sha256.__wrapped__()
