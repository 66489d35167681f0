"""Preprocessed volumes in memory, on disk or nowhere: one item in all of them, and no file that is out of date."""

import os
import time
from itertools import chain

import nibabel
import numpy as np
import pytest
import torch
from conftest import refused, train_here, truncate
from encoding import preprocessing
from monai.transforms import Compose, SpatialPadd
from ranks import on_two_ranks
from test_runs import assert_same, loaded, raising

from latdiff3d import image_cache, settings
from latdiff3d.batches import EveryNth, ImageCrops, ShuffledBatches
from latdiff3d.datalist import COARSE
from latdiff3d.errors import InputError
from latdiff3d.segmentation import SegmenterStep
from latdiff3d.transforms import ForegroundCropd, LoadVolumed, RandForegroundCropd

KEYS = ("image", "mask")
CROP = (4, 4, 4)


def transforms(crop=RandForegroundCropd, pad=12):
    return Compose([*preprocessing().transforms, SpatialPadd(KEYS, [pad] * 3), crop(KEYS, "image", CROP)])


@pytest.fixture
def cases(write_brats_case, tmp_path):
    """Four cases of one modality, noise in a frame of its own, each with a number and a name."""
    random, found = np.random.RandomState(0), []
    for number in range(4):
        folder = write_brats_case(tmp_path / "data", f"case_{number}", t1=random.rand(10, 11, 12).astype(np.float32))
        affine = np.diag([1.0, 2.0, 3.0 + number, 1.0])
        for part in ("t1", "seg"):
            path = folder / f"case_{number}_{part}.nii.gz"
            voxels = np.zeros((10, 11, 12), np.uint8) if part == "seg" else nibabel.load(path).get_fdata()
            voxels[2:5] += part == "seg"
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        files = {"image": [f"{folder}/case_{number}_t1.nii.gz"], "mask": f"{folder}/case_{number}_seg.nii.gz"}
        found.append({"case": f"case_{number}", **files, "covariates": torch.tensor([float(number)])})
    return found


def items(cases, cache, folder, crop=RandForegroundCropd, **settings):
    crops = ImageCrops(image_cache.images(cases, transforms(crop), cache, folder=str(folder), **settings))
    return [crops[number] for number in range(len(crops))]


def assert_alike(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert set(one) == set(other) == {"case", "image", "mask", "covariates"}
        assert one["case"] == other["case"] and torch.equal(one["covariates"], other["covariates"])
        for key in KEYS:
            assert torch.equal(one[key].as_tensor(), other[key].as_tensor())
            assert one[key].shape[1:] == CROP and torch.equal(one[key].affine, other[key].affine)


@pytest.mark.parametrize("crop", [RandForegroundCropd, ForegroundCropd])
def test_an_item_is_the_same_wherever_it_waited(cases, tmp_path, crop):
    folder = tmp_path / "cache"
    in_memory = items(cases, "memory", folder, crop)
    assert not folder.exists() and not torch.equal(in_memory[0]["image"], in_memory[1]["image"])
    assert_alike(in_memory, items(cases, "none", folder, crop))
    for _ in range(2):  # once as it is written, once as it is read
        assert_alike(in_memory, items(cases, "disk", folder, crop))
    assert len(list(folder.iterdir())) == 4
    size = 4 * (CROP[0] * CROP[1] * CROP[2] if crop is ForegroundCropd else 12**3)
    assert all(2 * size < path.stat().st_size < 2 * size + 5000 for path in folder.iterdir())  # no more than the crop


def test_a_file_is_read_in_place_of_its_sources(cases, tmp_path, monkeypatch):
    first = items(cases, "disk", tmp_path / "cache")
    monkeypatch.setattr(LoadVolumed, "__call__", lambda *_: pytest.fail("a source file was read"))
    assert_alike(first, items(cases, "disk", tmp_path / "cache"))


def place(cases, transform, folder):
    return image_cache.DiskCache(cases, transform, folder).place(cases[0])


def test_another_source_or_transform_has_another_file_and_another_crop_case_or_covariate_has_not(cases, tmp_path):
    first = place(cases, transforms(), tmp_path)
    assert place(cases, transforms(), tmp_path) == first
    assert place(cases, Compose(list(transforms().transforms[:-1])), tmp_path) == first  # the crop is drawn anew
    assert place([{**cases[0], "case": "x", "covariates": 3}], transforms(), tmp_path) == first
    others = [
        place(cases, transforms(pad=13), tmp_path),
        place([{**cases[0], COARSE: True}], transforms(), tmp_path),
        place([{key: value for key, value in cases[0].items() if key != "mask"}], transforms(), tmp_path),
        place([{**cases[0], "mask": cases[1]["image"][0]}], transforms(), tmp_path),
    ]
    changed = nibabel.load(cases[0]["image"][0])
    nibabel.save(nibabel.Nifti1Image(changed.get_fdata() + 1, changed.affine), cases[0]["image"][0])
    others.append(place(cases, transforms(), tmp_path))
    assert len({first, *others}) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_named_and_made_again(cases, tmp_path, capsys, damage):
    whole = items(cases, "disk", tmp_path)
    path = place(cases, transforms(), tmp_path)
    content = path.read_bytes()
    if damage == "changed":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    else:
        truncate(path, 0.5 if damage == "cut" else 0)
    assert_alike(whole, items(cases, "disk", tmp_path))
    assert f"warning: {path} is damaged (" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_what_a_killed_run_left_is_swept_and_what_is_being_written_is_not(cases, tmp_path):
    old, young = tmp_path / ".one.tmp", tmp_path / ".other.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * image_cache.TORN_AFTER_S,) * 2)
    place(cases, transforms(), tmp_path)
    assert not old.exists() and young.exists()


def test_a_full_disk_is_told_and_leaves_no_half_file(cases, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.torch, "save", full)
    with pytest.raises(InputError, match="has no space left; make room, set image_cache to another disk"):
        items(cases, "disk", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_setting_that_is_unknown_or_has_no_effect_is_refused(cases, tmp_path):
    with pytest.raises(InputError, match="cache is 'smart'; expected one of memory, disk, none"):
        items(cases, "smart", tmp_path)
    for cache in ("disk", "none"):
        with pytest.raises(InputError, match=f"cache_rate 0.5 is for cache=memory, and cache is {cache}; leave"):
            items(cases, cache, tmp_path, cache_rate=0.5)
    is_fine, _ = settings.EXPECTED["cache"]
    assert all(map(is_fine, image_cache.CACHES)) and not is_fine("smart")


def seen(cases, folder):
    """Return which cases this rank trains on in an epoch, and which it validates on."""
    crops = ImageCrops(image_cache.images(cases, transforms(), "disk", folder=folder))
    numbers = [list(chain(*ShuffledBatches(crops, 2, 0))), list(EveryNth(crops))]
    return [[crops[number]["case"] for number in part] for part in numbers]


def test_two_ranks_share_a_folder_and_take_each_case_once(cases, tmp_path):
    one, other = on_two_ranks(seen, tmp_path, cases, str(tmp_path / "cache"))
    for ours, theirs in zip(one, other, strict=True):
        assert sorted(ours + theirs) == [case["case"] for case in cases] and len(ours) == len(theirs) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 4


# In a run


def test_a_file_in_the_way_of_the_folder_is_told(phantoms, tmp_path):
    (tmp_path / "taken").write_text("a file")
    settings = {"cache": "disk", "image_cache": str(tmp_path / "taken")}
    line = refused(train_here("segmenter", phantoms, tmp_path / "runs", "seg", **settings))
    assert line == f"error: {tmp_path}/taken: File exists; expected a place that can be read and written."
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["autoencoder", "segmenter"])
def test_a_run_from_disk_is_bitwise_the_run_from_memory(phantoms, tmp_path, stage):
    small = {"crop_to": [8, 8, 8], "flips": [0]}
    for cache in ("memory", "disk", "none"):
        ended = train_here(stage, phantoms, tmp_path, cache, cache=cache, **small)
        assert ended.code == 0, ended.err
        assert_same(loaded(tmp_path / cache, "last")["objects"], loaded(tmp_path / "memory", "last")["objects"])
    assert len(list((tmp_path / "image_cache").iterdir())) == 6
    again = train_here(stage, phantoms, tmp_path, "again", cache="disk", num_workers=2, **small)
    assert again.code == 0 and "4 of 4 volumes are there" in again.out, again.err
    assert_same(loaded(tmp_path / "again", "last")["objects"], loaded(tmp_path / "memory", "last")["objects"])


def test_a_run_stopped_within_an_epoch_goes_on_from_disk_as_if_it_had_not(phantoms, tmp_path, monkeypatch):
    settings = {"crop_to": [8, 8, 8], "checkpoint_every": 1, "batch_size": 1}
    whole = train_here("segmenter", phantoms, tmp_path / "whole", "seg", **settings)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(SegmenterStep, "__call__", raising(7, SegmenterStep.__call__))
        with pytest.raises(RuntimeError):
            train_here("segmenter", phantoms, tmp_path / "stopped", "seg", cache="disk", **settings)
    assert loaded(tmp_path / "stopped" / "seg", "last")["iteration"] == 6
    again = train_here("segmenter", phantoms, tmp_path / "stopped", "seg", cache="disk", num_workers=2, **settings)
    assert again.code == 0, again.err
    assert_same(*(loaded(tmp_path / name / "seg", "last")["objects"] for name in ("whole", "stopped")))
