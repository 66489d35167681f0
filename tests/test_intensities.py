"""Intensities: the inverse of the scaling that models see, and int16 that is exact to half a step."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
from conftest import NUM_TRAIN, refused, run_here
from monai.transforms import Compose

from latdiff3d import checkpoints, training_intensities
from latdiff3d.errors import InputError
from latdiff3d.intensities import IntensityRange, Reference, as_int16, reference
from latdiff3d.layouts import scan_files
from latdiff3d.provenance import inspect
from latdiff3d.training_intensities import summary, training_reference
from latdiff3d.transforms import LoadVolumed, ScaleForegroundd
from latdiff3d.volumes import write_synthetic


def scan(background=0.0):
    """A scan of one background and a foreground of −20 to 180 in its middle."""
    voxels = np.full((10, 10, 10), background, np.float32)
    voxels[2:8, 2:8, 2:8] = np.linspace(-20, 180, 216, dtype=np.float32).reshape(6, 6, 6)
    return voxels


def preprocessing(lower=0.0, upper=100.0):
    return Compose([LoadVolumed(["image"]), ScaleForegroundd(["image"], lower, upper)])


def test_known_numbers_come_back():
    channel = np.array([0, 0.25, 0.5, 1], np.float32)
    assert IntensityRange(100, 300, -7).unscaled(channel).tolist() == [-7, 150, 200, 300]
    assert IntensityRange(100, 300, None).unscaled(channel).tolist() == [100, 150, 200, 300]


@pytest.mark.parametrize("background", [0.0, -1000.0])
def test_what_was_scaled_comes_back_as_it_was(tmp_path, write_volume, background):
    path = write_volume(tmp_path / "scan.nii.gz", scan(background))
    like = reference([path], preprocessing())
    [found] = like.ranges
    assert (found.low, found.high, found.background) == (-20, 180, background)
    scaled = np.asarray(preprocessing()({"image": path})["image"])
    back, there = like.unscaled(scaled)[0], scan(background)
    lowest = there == -20  # is scaled to 0, as the background is
    assert lowest.sum() == 1 and np.allclose(back[~lowest], there[~lowest], atol=1e-4)


def test_the_range_is_that_of_the_models_own_percentiles(tmp_path, write_volume):
    path = write_volume(tmp_path / "scan.nii.gz", scan())
    [found] = reference([path], preprocessing(10, 90)).ranges
    assert found.low == pytest.approx(0, abs=0.01) and found.high == pytest.approx(160, abs=0.01)


def test_a_model_that_does_not_scale_by_percentiles_has_no_inverse():
    with pytest.raises(InputError, match="no ScaleForegroundd, which --like inverts"):
        reference(["scan.nii.gz"], Compose([LoadVolumed(["image"])]))


def test_a_scan_without_contrast_is_refused(tmp_path, write_volume):
    with pytest.raises(Exception, match="are both 0") as error:
        reference([write_volume(tmp_path / "flat.nii.gz", np.zeros((4, 4, 4), np.float32))], preprocessing())
    assert "flat.nii.gz" in str(error.value.__cause__ or error.value)


@pytest.mark.parametrize("low_high", [(0, 1), (-20, 180), (-5, -3), (1.7e6 - 100, 1.7e6), (0, 0), (42.5, 42.5)])
def test_int16_is_exact_to_half_a_step(low_high):
    low, high = low_high
    channel = np.random.default_rng(0).uniform(low, high, (20, 20, 20)).astype(np.float32)
    channel.flat[0], channel.flat[1] = low, high
    stored, slope, inter = as_int16(channel)
    assert stored.dtype == np.int16 and slope > 0
    error = np.abs(stored * np.float64(slope) + inter - channel)
    assert error.max() <= 0.5 * slope * (1 + 1e-6)
    assert low == high or slope <= 1.0001 * (high - low) / 32767


def test_int16_keeps_0_at_exactly_0():
    channel = np.array([[[-0.37, 0, 0.91]]], np.float32)
    stored, _, inter = as_int16(channel)
    assert inter == 0 and stored[0, 0, 1] == 0


def test_a_file_in_int16_is_smaller_and_opens_to_half_a_step(tmp_path):
    volume = np.random.default_rng(0).random((1, 20, 20, 20)).astype(np.float32)
    volume[0, 0] = 0
    for name, int16 in (("whole", True), ("float", False)):
        write_synthetic(tmp_path, name, volume, np.eye(4), ["t1"], {}, np.ones((20, 20, 20), np.uint8), int16)
    small, large = (tmp_path / name / f"{name}_t1.nii.gz" for name in ("whole", "float"))
    assert small.stat().st_size < 0.6 * large.stat().st_size
    image = nib.load(small)
    assert image.get_data_dtype() == np.int16 and image.dataobj.slope == pytest.approx(volume.max() / 32767)
    assert np.abs(image.get_fdata() - volume[0]).max() <= 0.5 * image.dataobj.slope * (1 + 1e-6)
    assert nib.load(tmp_path / "whole" / "whole_seg.nii.gz").get_data_dtype() == np.uint8
    assert inspect(small).unchanged


# Which files are a scan


def test_a_scan_is_a_file_or_several_or_a_folder(write_brats_case, tmp_path):
    folder = write_brats_case(tmp_path, "case")
    names = [str(folder / f"case_{name}.nii.gz") for name in ("t1", "t1ce")]
    assert scan_files(folder, ["t1", "t1ce"]) == names
    assert scan_files(",".join(names), ["t1", "t1ce"]) == names
    assert scan_files(names[0], ["t1", "t1ce"]) == names[:1]  # which may be 4D


def test_a_scan_that_is_not_whole_is_refused(write_brats_case, tmp_path):
    folder = write_brats_case(tmp_path, "case", without=["t2"])
    with pytest.raises(InputError, match=r"has 0 files \*_t2; expected one for each modality"):
        scan_files(folder, ["t1", "t2"])
    with pytest.raises(InputError, match=r"no scan at .*absent\.nii; expected a file, files joined by commas"):
        scan_files(f"{folder}/case_t1.nii.gz,absent.nii", ["t1", "t2"])
    with pytest.raises(InputError, match="are 2 files; expected one with all channels, or one each of flair, t1, t2"):
        scan_files(f"{folder}/case_t1.nii.gz,{folder}/case_flair.nii.gz", ["flair", "t1", "t2"])


# The training set's range


def test_the_training_sets_range_is_the_median_of_each_modality(tmp_path, write_volume):
    cases = []
    for number, (scale, background) in enumerate([(1, -7), (2, -5), (30, None)]):
        channels = [scan(0 if background is None else background) * scale + k for k in range(2)]
        if background is None:
            channels = [np.random.default_rng(k).uniform(0, 1000, (10, 10, 10)).astype("f4") for k in range(2)]
        files = [write_volume(tmp_path / f"{number}_{k}.nii.gz", channel) for k, channel in enumerate(channels)]
        cases.append({"case": str(number), "image": files})
    said = summary(cases, preprocessing().transforms)
    assert said["num_scans"] == 3
    first, second = (IntensityRange(**each) for each in said["ranges"])
    assert (first.low, first.high, first.background) == (-20, 360, -8.5)  # of −20, −40, 0.…; 180, 360, 1000; −7, −10
    assert (second.low, second.high) == (-19, 361)
    reference = training_reference(said, "best.pt")
    assert reference.unscaled(np.array([0, 0.5, 1]).reshape(1, 3).repeat(2, 0))[0].tolist() == [-8.5, 170, 360]


def test_of_many_scans_some_are_read_evenly(monkeypatch):
    read = []

    def reference(files, preprocessing):
        read.append(int(files[0]))
        return Reference(files, [IntensityRange(0, int(files[0]), 0)])

    monkeypatch.setattr(training_intensities, "reference", reference)
    said = summary([{"image": [str(number)]} for number in range(1001)], preprocessing().transforms)
    assert len(read) == said["num_scans"] == 32 and {0, 1000} <= set(read)
    assert said["ranges"] == [{"low": 0, "high": 500, "background": 0}]


def test_a_preprocessing_without_percentiles_has_no_range():
    assert summary([{"image": ["x"]}], [LoadVolumed(["image"])]) is None


# Through the command


def test_samples_take_the_training_sets_range(tiny_runs, model, tmp_path):
    case = tiny_runs.data / "phantom_0004"
    command = ["sample", "-r", tiny_runs.diffusion, "--mask", case / "phantom_0004_seg.nii.gz", "--no-pictures"]
    assert run_here(*command, "--out", tmp_path / "scaled").code == 0
    ended = run_here(*command, "--out", tmp_path / "like", "--like", "training")
    assert ended.code == 0, ended.err
    said = json.loads((tmp_path / "like" / "phantom_0004" / "phantom_0004.json").read_text())
    assert said["Units"] == "those of the training scans, by their median range"
    assert said["Like"] == "the median of 4 training scans" == f"the median of {NUM_TRAIN} training scans"
    scans = [scan_files(tiny_runs.data / f"phantom_000{k}", model.modalities) for k in range(NUM_TRAIN)]
    highs = [reference(files, model.preprocessing).ranges[1].high for files in scans]
    found = said["IntensityRange"]["t1"]
    assert found["High"] == pytest.approx(np.median(highs)) and found["Background"] == 0
    name = "phantom_0004/phantom_0004_t1.nii.gz"
    scaled, mapped = (nib.load(tmp_path / out / name).get_fdata() for out in ("scaled", "like"))
    expected = IntensityRange(found["Low"], found["High"], found["Background"]).unscaled(scaled)
    assert np.allclose(mapped, expected, rtol=1e-5)


def test_a_checkpoint_of_an_earlier_version_does_not_know_the_training_sets_range(tiny_runs, mask, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt", "diffusion")
    del content["notes"]["intensities"]
    checkpoints.save(tmp_path / "earlier.pt", content)
    command = ["sample", "-r", tmp_path / "earlier.pt", "--mask", mask, "--like", "training", "--out", tmp_path / "out"]
    line = refused(run_here(*command))
    assert "earlier.pt does not say what its training scans' intensities were" in line and "give --like SCAN" in line


def test_samples_take_a_scans_range_and_say_so(tiny_runs, tmp_path):
    case = tiny_runs.data / "phantom_0004"
    command = ["sample", "-r", tiny_runs.diffusion, "--mask", case / "phantom_0004_seg.nii.gz", "--no-pictures"]
    ended = run_here(*command, "--out", tmp_path / "scaled")
    assert ended.code == 0, ended.err
    ended = run_here(*command, "--out", tmp_path / "like", "--like", tiny_runs.data / "phantom_0001", "--int16")
    assert ended.code == 0, ended.err
    said = json.loads((tmp_path / "like" / "phantom_0004" / "phantom_0004.json").read_text())
    assert said["Units"] == "those of the scan in Like" and said["DataType"] == "int16"
    assert [file["Name"] for file in said["Like"]] == [
        f"phantom_0001_{modality}.nii.gz" for modality in ("flair", "t1", "t1ce", "t2")
    ]
    for modality, found in said["IntensityRange"].items():
        name = f"phantom_0004/phantom_0004_{modality}.nii.gz"
        image, scaled = nib.load(tmp_path / "like" / name), nib.load(tmp_path / "scaled" / name).get_fdata()
        expected = IntensityRange(found["Low"], found["High"], found["Background"]).unscaled(scaled)
        assert np.abs(image.get_fdata() - expected).max() <= 0.5001 * image.dataobj.slope
        assert found["High"] > 1 and not (tmp_path / "like" / "phantom_0004" / "phantom_0004.png").exists()
    assert re.search("has 0 files", refused(run_here(*command, "--out", tmp_path / "x", "--like", tmp_path / "like")))
    assert not (tmp_path / "x").exists()
