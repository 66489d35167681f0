"""Masks in, folders out: which masks there are, and what is written for each."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import run_here, truncate
from test_dicom_masks import two_segments, write_segmentation

from latdiff3d import checkpoints, provenance
from latdiff3d.errors import InputError, root_input_error
from latdiff3d.sample_folders import Writing, is_made, jobs_for, make, masks_at, sample_to_folder
from latdiff3d.synthesis import Model
from latdiff3d.volumes import read_mask


def test_each_case_is_yielded_when_it_is_written(model, mask, tmp_path):
    shutil.copy(mask, tmp_path / "a_seg.nii.gz")
    made = sample_to_folder(model, [tmp_path / "a_seg.nii.gz", mask], tmp_path / "out", seed=3)
    name, sample, files = next(made)
    assert name == "a" and [file.name for file in files] == [f"a_{m}.nii.gz" for m in model.modalities]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]  # the second is yet to be made
    written = np.stack([nib.load(file).get_fdata(dtype=np.float32) for file in files])
    assert np.array_equal(written, sample.on_mask_grid()[0])
    assert [name for name, _, _ in made] == ["phantom_0004"]


def test_every_mask_is_looked_at_before_the_first_volume_is_made(model, mask, tmp_path, monkeypatch):
    bad = nib.load(mask)
    voxels = np.asarray(bad.dataobj).copy()
    voxels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(voxels, bad.affine), tmp_path / "bad_seg.nii.gz")
    monkeypatch.setattr(Model, "sample", lambda *_: pytest.fail("a volume was made"))
    with pytest.raises(Exception) as error:
        list(sample_to_folder(model, [mask, tmp_path / "bad_seg.nii.gz"], tmp_path / "out"))
    assert "bad_seg.nii.gz has labels {7}" in str(root_input_error(error.value))
    assert not (tmp_path / "out").exists()


def test_a_file_or_a_folder_names_masks(mask, tmp_path):
    assert masks_at(mask) == [mask]
    for name in ("b.nii", "a_seg.nii.gz", "notes.txt", "c.MHA", "d.nrrd", "e.dcm", "._b.nii"):
        (tmp_path / name).touch()
    assert [path.name for path in masks_at(tmp_path)] == ["a_seg.nii.gz", "b.nii", "c.MHA", "d.nrrd", "e.dcm"]
    with pytest.raises(InputError, match="there is no mask at"):
        masks_at(tmp_path / "nowhere")


# A folder with bad masks, and one that was interrupted


NUM_MASKS = 50
BAD = ("m04", "m11", "m23", "m38", "m49")


@pytest.fixture(scope="module")
def fifty(mask, tmp_path_factory):
    """50 masks, each with a lesion at a place of its own, the five of BAD bad in five ways."""
    folder = tmp_path_factory.mktemp("fifty")
    image = nib.load(mask)
    labels = np.asarray(image.dataobj)
    for number in range(NUM_MASKS):
        shifted = np.roll(labels, (number % 3, number // 3 % 3, number // 9 % 3), axis=(0, 1, 2))
        nib.save(nib.Nifti1Image(shifted, image.affine), folder / f"m{number:02d}_seg.nii.gz")
    wrong = [np.where(labels == 4, 7, labels), labels * 0, labels / 2.0, np.stack([labels] * 2, -1)]
    for name, voxels in zip(BAD, wrong, strict=False):
        nib.save(nib.Nifti1Image(voxels, image.affine), folder / f"{name}_seg.nii.gz")
    truncate(folder / f"{BAD[4]}_seg.nii.gz")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(fifty, tiny_runs, tmp_path_factory):
    """What sampling all of them said and made."""
    out = tmp_path_factory.mktemp("done") / "out"
    return run_here("sample", "-r", tiny_runs.diffusion, "--mask", fifty, "--out", out, "--seed", 3), out


def test_of_50_masks_with_5_bad_ones_45_are_done_and_5_named(done, fifty):
    ended, out = done
    assert ended.code == 3, ended
    assert len(list(out.iterdir())) == 45 and not [name for name in BAD if (out / name).exists()]
    assert "45 synthetic cases are in" in ended.out
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    for name, words in zip(
        BAD, ("has labels {7}", "is empty", "labels are no integers", "is 4D", "truncated or damaged"), strict=True
    ):
        assert [line for line in errors if f"{name}_seg.nii.gz" in line and words in line], ended.err
    assert "5 of 50 masks are left out; each is named above." in ended.err


def test_a_folder_goes_on_where_it_was_stopped(done, fifty, tiny_runs, tmp_path, monkeypatch):
    whole = done[1]
    out = tmp_path / "out"
    model = Model.load(tiny_runs.diffusion)
    jobs, refused = jobs_for(model, masks_at(fifty), seed=3)
    assert len(jobs) == 45 and len(refused) == 5
    shutil.copytree(whole, out)
    for job in jobs[20:]:
        shutil.rmtree(out / job.name)
    # killed within a case: its sidecar is written last
    (out / jobs[19].name / f"{jobs[19].name}.json").unlink()
    truncate(out / jobs[19].name / f"{jobs[19].name}_t1.nii.gz")
    (out / jobs[19].name / f".tmp_{jobs[19].name}_t2.nii.gz").write_bytes(b"half")
    asked = []
    original = Model.sample
    monkeypatch.setattr(Model, "sample", lambda self, mask, *rest: (asked.append(mask), original(self, mask, *rest))[1])
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", fifty, "--out", out, "--seed", 3)
    assert ended.code == 3 and "45 synthetic cases are in" in ended.out and "19 of them were there" in ended.out
    assert asked == [job.mask for job in jobs[19:]]
    assert contents(out) == contents(whole)


@pytest.fixture
def job(model, mask, tmp_path):
    [job], _ = jobs_for(model, [mask], seed=3)
    list(make(model, [job], tmp_path / "out"))
    return job


def test_a_volume_is_made_once(job, tmp_path):
    assert is_made(job, tmp_path / "out") and not is_made(job, tmp_path / "elsewhere")


@pytest.mark.parametrize("settings", [{"sampling_steps": 4}, {"guidance": 2.0}, {"sampler": "ddpm"}, {}])
def test_with_other_settings_it_is_made_again(job, tiny_runs, mask, tmp_path, settings):
    other = Model.load(tiny_runs.diffusion, settings=settings)
    [again], _ = jobs_for(other, [mask], seed=3)
    assert is_made(again, tmp_path / "out") == (not settings)


@pytest.mark.parametrize(("seed", "on_grid", "label_map"), [(4, True, {}), (3, False, {}), (3, True, {2: 1})])
def test_with_another_seed_grid_or_label_map_it_is_made_again(job, model, mask, tmp_path, seed, on_grid, label_map):
    other = model.with_label_map(label_map) if label_map else model
    [again], _ = jobs_for(other, [mask], seed=seed, on_mask_grid=on_grid)
    assert not is_made(again, tmp_path / "out")


def test_in_another_type_or_with_a_picture_that_is_missing_it_is_made_again(job, model, mask, tmp_path):
    [int16], _ = jobs_for(model, [mask], seed=3, writing=Writing(int16=True))
    assert not is_made(int16, tmp_path / "out")
    [plain], _ = jobs_for(model, [mask], seed=3, writing=Writing(picture=False))
    [moving], _ = jobs_for(model, [mask], seed=3, writing=Writing(gif=True))
    assert is_made(plain, tmp_path / "out") and not is_made(moving, tmp_path / "out")
    (tmp_path / "out" / job.name / f"{job.name}.png").unlink()
    assert is_made(plain, tmp_path / "out") and not is_made(job, tmp_path / "out")


def test_what_is_stopped_between_picture_and_sidecar_is_not_taken_for_made(job, model, mask, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("latdiff3d.sample_folders.write_synthetic", stop)
    with pytest.raises(KeyboardInterrupt):
        list(make(model, [job], tmp_path / "out"))
    assert not is_made(job, tmp_path / "out")


def test_for_another_mask_of_that_name_or_of_another_model_it_is_made_again(job, model, mask, tmp_path):
    image = nib.load(mask)
    other_mask = tmp_path / mask.name
    nib.save(nib.Nifti1Image(np.flip(np.asarray(image.dataobj), 0).copy(), image.affine), other_mask)
    [again], _ = jobs_for(model, [other_mask], seed=3)
    assert again.name == job.name and not is_made(again, tmp_path / "out")
    checkpoints.save(tmp_path / "x.pt", {**checkpoints.load(model.path), "epoch": 99})
    [again], _ = jobs_for(Model.load(tmp_path / "x.pt"), [mask], seed=3)
    assert not is_made(again, tmp_path / "out")
    shutil.copy(model.path, tmp_path / "moved.pt")
    [again], _ = jobs_for(Model.load(tmp_path / "moved.pt"), [mask], seed=3)
    assert is_made(again, tmp_path / "out")  # wherever the same checkpoint lies


def test_the_voxels_beside_an_mhd_header_count(model, mask, tmp_path):
    image = sitk.ReadImage(str(mask))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    [job], _ = jobs_for(model, [tmp_path / "a.mhd"])
    list(make(model, [job], tmp_path / "out"))
    assert is_made(job, tmp_path / "out")
    sitk.WriteImage(sitk.Flip(image, (True, False, False)), str(tmp_path / "b.mhd"))
    (tmp_path / "b.raw").replace(tmp_path / "a.raw")
    [job], _ = jobs_for(model, [tmp_path / "a.mhd"])
    assert not is_made(job, tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), truncate, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("suffix", ["_t1.nii.gz", "_seg.nii.gz", ".json"])
def test_a_file_that_is_gone_or_damaged_is_made_again(job, tmp_path, suffix, damage):
    damage(tmp_path / "out" / job.name / f"{job.name}{suffix}")
    assert not is_made(job, tmp_path / "out")


def test_several_bad_masks_and_no_good_one_are_refused(fifty, tiny_runs, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in BAD:
        shutil.copy(fifty / f"{name}_seg.nii.gz", tmp_path / "bad")
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", tmp_path / "bad", "--out", tmp_path / "out")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 6
    assert ended.err.strip().endswith("error: none of the 5 masks can be used; each is named above.")
    assert not (tmp_path / "out").exists()


def test_a_label_map_that_changes_nothing_is_a_warning(model, mask, capsys):
    jobs_for(model.with_label_map({2: 1, 9: 1}), [mask])
    assert "warning: --label-map names 9, which none of the masks holds." in capsys.readouterr().err
    jobs_for(model.with_label_map({2: 1}), [mask])
    assert "--label-map" not in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_a_mask_of_another_format_makes_the_same_volume_in_the_same_place(model, mask, tmp_path, suffix):
    sitk.WriteImage(sitk.ReadImage(str(mask)), str(tmp_path / f"a{suffix}"))
    [(_, _, files)] = sample_to_folder(model, [tmp_path / f"a{suffix}"], tmp_path / "out", seed=3)
    [(_, _, others)] = sample_to_folder(model, [mask], tmp_path / "out", seed=3)
    for file, other in zip(files, others, strict=True):
        assert np.array_equal(nib.load(file).get_fdata(), nib.load(other).get_fdata())
        assert np.allclose(nib.load(file).affine, nib.load(other).affine, atol=1e-4)
    seg = nib.load(tmp_path / "out" / "a" / "a_seg.nii.gz")
    assert np.array_equal(np.asarray(seg.dataobj), np.asarray(nib.load(mask).dataobj))


def test_a_dicom_segmentation_makes_a_volume_where_it_lies(model, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    path = write_segmentation(highdicom, tmp_path / "a_seg.dcm", two_segments())
    [(name, _, files)] = sample_to_folder(model, [path], tmp_path / "out", seed=3)
    labels, affine = read_mask(path)
    assert name == "a" and len(files) == 4
    for file in files:
        image = nib.load(file)
        assert image.shape == labels.shape and np.allclose(image.affine, affine, atol=1e-4)
    assert np.array_equal(np.asarray(nib.load(files[0].parent / "a_seg.nii.gz").dataobj), labels)


def test_the_sidecar_says_what_made_a_sample_and_on_what(model, mask, tmp_path):
    [(name, _, files)] = sample_to_folder(model, [mask], tmp_path, seed=3)
    said = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert said["Seed"] == 3 and said["Sampler"] == "ddim" and said["Steps"] == 3
    assert said["Device"].startswith("cpu") and said["Precision"] == model.synthesizer.precision
    assert said["NumThreads"] == torch.get_num_threads()
    assert list(said["Files"]) == [*(file.name for file in files), f"{name}_seg.nii.gz"]
    found = provenance.inspect(files[0])
    assert found.unchanged and found.said["Checkpoint"]["SHA256"] == checkpoints.sha256(model.path)


def test_a_picture_lies_beside_each_case_unless_it_is_left_out(model, mask, tmp_path):
    list(sample_to_folder(model, [mask], tmp_path / "a", seed=3, writing=Writing(gif=True)))
    list(sample_to_folder(model, [mask], tmp_path / "b", seed=3, writing=Writing(gif=True)))
    list(sample_to_folder(model, [mask], tmp_path / "none", seed=3, writing=Writing(picture=False)))
    for ending in ("png", "gif"):
        [one], [other] = (list((tmp_path / out).rglob(f"*.{ending}")) for out in "ab")
        assert one.name == f"phantom_0004.{ending}" and one.read_bytes() == other.read_bytes()
    assert not [*(tmp_path / "none").rglob("*.png"), *(tmp_path / "none").rglob("*.gif")]
    assert len(list((tmp_path / "none").rglob("*.nii.gz"))) == 5
