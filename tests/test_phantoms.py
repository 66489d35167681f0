"""Phantoms: what a case holds, that it depends on its seed alone, and that a folder is written whole or not at all."""

import nibabel as nib
import numpy as np
import pytest

from latdiff3d import phantoms
from latdiff3d.errors import InputError
from latdiff3d.phantoms import MODALITIES, phantom_case, write_phantoms

SMALL = (16, 24, 16)


@pytest.fixture(scope="module")
def case():
    return phantom_case((40, 48, 40), seed=(0, 3), spacing_mm=3.0)


def test_a_case_has_four_modalities_and_all_labels(case):
    image, mask, affine = case
    assert image.shape == (4, 40, 48, 40) and image.dtype == np.float32
    assert mask.shape == (40, 48, 40) and mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2, 4}
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    assert np.allclose(nib.affines.voxel_sizes(affine), 3.0)


@pytest.mark.parametrize("shape", [SMALL, (16, 16, 16), (32, 32, 32)])
@pytest.mark.parametrize("index", range(4))
def test_small_cases_keep_every_label(shape, index):
    _, mask, _ = phantom_case(shape, seed=(0, index))
    assert set(np.unique(mask)) == {0, 1, 2, 4}


def test_background_is_exactly_zero_and_the_brain_is_not(case):
    image, mask, _ = case
    brain = image[0] > 0
    for channel in image:
        assert np.array_equal(channel > 0, brain)
        assert np.array_equal(channel, np.rint(channel))
    assert 0.2 < brain.mean() < 0.5
    assert not brain[0].any() and not brain[:, 0].any() and not brain[:, :, 0].any()
    assert brain[mask > 0].all()


def test_a_tumour_is_bright_in_flair_and_t2_and_dark_in_t1(case):
    image, mask, _ = case
    brain, lesion = image[0] > 0, mask > 0
    outside = brain & ~lesion
    contrast = {
        name: (channel[lesion].mean() - channel[outside].mean()) / channel[outside].std()
        for name, channel in zip(MODALITIES, image, strict=True)
    }
    assert contrast["flair"] > 1 and contrast["t2"] > 1 and contrast["t1"] < -1


def test_the_rim_alone_enhances(case):
    image, mask, _ = case
    t1ce = image[MODALITIES.index("t1ce")]
    assert t1ce[mask == 4].mean() > 1.4 * t1ce[(mask == 0) & (t1ce > 0)].mean()
    assert t1ce[mask == 1].mean() < t1ce[(mask == 0) & (t1ce > 0)].mean()


def test_a_core_lies_within_its_rim_within_its_oedema(case):
    _, mask, _ = case
    far_from_core = np.argwhere(mask == 4) - np.argwhere(mask == 1).mean(0)
    farther = np.argwhere(mask == 2) - np.argwhere(mask == 1).mean(0)
    core = np.argwhere(mask == 1) - np.argwhere(mask == 1).mean(0)
    radii = [np.linalg.norm(offsets, axis=1).mean() for offsets in (core, far_from_core, farther)]
    assert radii == sorted(radii)


def test_the_same_seed_draws_the_same_case_and_another_seed_another():
    first, again, other = (phantom_case(SMALL, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])


def test_a_case_is_the_same_whatever_the_number_of_cases(tmp_path):
    few = write_phantoms(tmp_path / "few", num_train=1, num_val=1, shape=SMALL)
    more = write_phantoms(tmp_path / "more", num_train=3, num_val=0, shape=SMALL)
    for suffix in (*MODALITIES, "seg"):
        name = f"phantom_0001/phantom_0001_{suffix}.nii.gz"
        a, b = nib.load(few / name), nib.load(more / name)
        assert np.array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
        assert np.array_equal(a.affine, b.affine)


def test_files_hold_the_drawn_case(tmp_path):
    folder = write_phantoms(tmp_path / "data", num_train=2, num_val=1, shape=SMALL, spacing_mm=2.0, seed=9)
    image, mask, affine = phantom_case(SMALL, seed=(9, 2), spacing_mm=2.0)
    for suffix, volume in (*zip(MODALITIES, image, strict=True), ("seg", mask)):
        nifti = nib.load(folder / f"phantom_0002/phantom_0002_{suffix}.nii.gz")
        assert np.array_equal(np.asarray(nifti.dataobj), volume)
        assert np.allclose(nifti.affine, affine, atol=1e-4)
        assert nifti.get_data_dtype() == (np.uint8 if suffix == "seg" else np.int16)


def test_lists_name_each_case_once(tmp_path):
    folder = write_phantoms(tmp_path / "data", num_train=2, num_val=1, shape=SMALL)
    assert (folder / "train.list").read_text().split() == ["phantom_0000", "phantom_0001"]
    assert (folder / "val.list").read_text().split() == ["phantom_0002"]
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"phantom_0000", "phantom_0001", "phantom_0002"}
    assert "synthetic" in (folder / "README.txt").read_text().lower()


def test_an_occupied_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        write_phantoms(tmp_path, num_train=1, num_val=0, shape=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    assert (write_phantoms(tmp_path / "data", num_train=1, num_val=0, shape=SMALL) / "train.list").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def interrupted(*args):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(args)
        return phantom_case(*args)

    monkeypatch.setattr(phantoms, "phantom_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "data", num_train=2, num_val=0, shape=SMALL)
    assert drawn and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [{"shape": (8, 24, 16)}, {"spacing_mm": 0.0}, {"seed": -1}, {"num_train": 0}, {"num_val": -1}]
)
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(InputError):
        write_phantoms(tmp_path / "data", **{"num_train": 1, "num_val": 0, "shape": SMALL, **wrong})
    assert not list(tmp_path.iterdir())
