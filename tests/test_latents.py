"""What stage 2 trains on: where windows lie, what chooses them, and that cached and fresh batches are one."""

import numpy as np
import pytest
import torch
from encoding import CPU, CROP, FACTOR, built, make_codec, preprocessing, write_splits
from monai.data import CacheDataset, DataLoader
from monai.data.utils import set_rnd
from monai.transforms import Compose

from latdiff3d.batches import ImageCrops
from latdiff3d.conditioning import MaskCondition, NoCondition
from latdiff3d.latent_entries import Entry
from latdiff3d.latents import LatentCrops
from latdiff3d.training import latent_batch
from latdiff3d.transforms import ForegroundCropd, RandFlipsd, RandForegroundCropd

KEYS = ("image", "mask")


@pytest.fixture
def codec():
    return make_codec()


@pytest.fixture
def splits(tmp_path, write_volume):
    """Three cases to train on and one to validate on."""
    return write_splits(tmp_path, write_volume)


def numbered(folder, cells=(6, 5, 4), box=((2, 0, 0), (11, 10, 8)), name="case_0"):
    """An entry whose mean in each cell is the cell's number, and whose mask in each voxel is its own cell's."""
    (folder / name).mkdir()
    mean = np.arange(np.prod(cells), dtype=np.float32).reshape(1, *cells)
    np.save(folder / name / "mean.npy", mean)
    np.save(folder / name / "std.npy", mean + 0.5)
    np.save(folder / name / "mask.npy", mean.astype(np.uint8).repeat(2, 1).repeat(2, 2).repeat(2, 3))
    return Entry(folder / name, tuple(np.array(corner) for corner in box), cells, FACTOR)


def crops_of(entry, number=1, **settings):
    cases = [{"case": f"case_{k}", "mask": "m.nii", "image": ["i.nii"], "patient": "p"} for k in range(number)]
    return LatentCrops(cases, {(case["case"], ()): entry for case in cases}, (4, 4, 4), **settings)


def starts(data_set, count):
    """The windows' first cells over `count` epochs."""
    found = []
    for seed in range(count):
        set_rnd(data_set, seed)
        found.append(np.unravel_index(int(data_set[0]["mean"].min()), (6, 5, 4)))
    return np.array(found)


# Windows


def test_mean_std_and_mask_come_from_one_place(tmp_path):
    item = crops_of(numbered(tmp_path), random=True)[0]
    assert item["mean"].shape == (1, 2, 2, 2) and item["mask"].shape == (1, 4, 4, 4)
    assert item["mask"].dtype == torch.uint8 and torch.equal(item["std"], item["mean"] + 0.5)
    assert torch.equal(item["mask"].float()[:, ::2, ::2, ::2], item["mean"])


def test_random_windows_lie_inside_the_foreground_and_reach_both_its_ends(tmp_path):
    # the foreground is cells 1 to 5 (exclusive 6), 1 to 3 and 2: larger, larger and smaller than 2 cells
    entry = numbered(tmp_path, box=((2, 3, 4), (11, 8, 6)))
    found = starts(crops_of(entry, random=True), 200)
    assert [sorted(set(found[:, axis])) for axis in range(3)] == [[1, 2, 3, 4], [1, 2], [1, 2]]


def test_the_places_are_those_of_crops_of_voxels(tmp_path):
    box, size = ((2, 4, 4), (12, 8, 6)), (12, 10, 8)
    image = torch.zeros(1, *size)
    image[:, 2:12, 4:8, 4:6] = 1
    places = torch.arange(image.numel(), dtype=torch.float32).reshape(image.shape)

    def of_voxels(crop):
        return np.unravel_index(int(crop({"image": image, "places": places})["places"].min()), size)

    keys = ["image", "places"]
    centre, at_random = ForegroundCropd(keys, "image", (4, 4, 4)), RandForegroundCropd(keys, "image", (4, 4, 4))
    entry = numbered(tmp_path, box=box)
    [ours] = starts(crops_of(entry), 1)
    assert (ours == np.array(of_voxels(centre)) // 2).all()
    theirs = np.array([of_voxels(at_random.set_random_state(k)) for k in range(200)])
    found = starts(crops_of(entry, random=True), 200)
    for axis in range(3):
        assert set(found[:, axis]) == {start // 2 for start in theirs[:, axis]}


def test_a_validation_window_is_always_the_same_one(tmp_path):
    found = starts(crops_of(numbered(tmp_path, box=((0, 0, 0), (4, 4, 4)))), 5)
    assert (found == 0).all()
    assert (starts(crops_of(numbered(tmp_path, name="case_1")), 5) == [2, 1, 1]).all()  # (1 + 4) // 2, (0 + 3) // 2, …


def test_an_item_has_what_the_case_says_and_a_mask_only_if_all_cases_have_one(tmp_path):
    data_set = crops_of(numbered(tmp_path))
    data_set.cases[0]["age"] = 63.0
    assert set(data_set[0]) == {"case", "age", "mean", "std", "mask"}
    del data_set.cases[0]["mask"]
    entries = data_set.entries
    assert set(LatentCrops(data_set.cases, entries, (4, 4, 4))[0]) == {"case", "age", "mean", "std"}


# Randomness


def epoch(data_set, seed, num_workers, batch_size=2):
    loader = DataLoader(
        data_set, batch_size=batch_size, shuffle=True, num_workers=num_workers, generator=torch.Generator()
    )
    loader.generator.manual_seed(seed)
    set_rnd(data_set, seed)
    return list(loader)


def same(one, other):
    return all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in ("mean", "mask"))


@pytest.fixture
def cached(tmp_path, splits, codec):
    entries = built(tmp_path / "cache", splits, codec, flips=[0, 1])
    return LatentCrops(splits["train"], entries, CROP, flips=[0, 1], random=True)


def test_crops_depend_on_the_seed_and_on_no_worker(cached):
    one = epoch(cached, 1, num_workers=0)
    assert same(one, epoch(cached, 1, num_workers=2))
    assert not same(one, epoch(cached, 2, num_workers=0))
    assert same(one, epoch(cached, 1, num_workers=0))


def test_an_items_crop_does_not_depend_on_the_batch_it_is_in(cached):
    alone = {batch["case"][0]: batch["mean"][0] for batch in epoch(cached, 1, 0, batch_size=1)}
    for batch in epoch(cached, 1, num_workers=0, batch_size=3):
        assert all(torch.equal(alone[case], mean) for case, mean in zip(batch["case"], batch["mean"], strict=True))


def on_the_fly(cases, random=True, flips=()):
    crop = (RandForegroundCropd if random else ForegroundCropd)(KEYS, "image", CROP)
    transforms = Compose([*preprocessing().transforms, RandFlipsd(KEYS, flips), crop])
    return CacheDataset(cases, transforms, progress=False)


def test_crops_of_images_depend_on_the_seed_and_on_no_worker(splits):
    data_set = ImageCrops(on_the_fly(splits["train"], flips=[0, 1, 2]))
    one, other = ([batch["image"].as_tensor() for batch in epoch(data_set, 1, workers)] for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    another = [batch["image"].as_tensor() for batch in epoch(data_set, 2, 0)]
    assert not all(torch.equal(a, b) for a, b in zip(one, another, strict=True))


def test_every_flip_is_drawn_and_its_mask_with_it(cached):
    found = set()
    for seed in range(40):
        set_rnd(cached, seed)
        means = [cached.entries["case_0", flip] for flip in cached.flips]
        item = cached[0]
        for flip, entry in zip(cached.flips, means, strict=True):
            windows = [
                entry.crop((i, j, k), (4, 4, 4))
                for i in range(entry.cells[0] - 3)
                for j in range(entry.cells[1] - 3)
                for k in range(entry.cells[2] - 3)
            ]
            if any(torch.equal(w["mean"], item["mean"]) and torch.equal(w["mask"], item["mask"]) for w in windows):
                found.add(flip)
    assert found == {(), (0,), (1,), (0, 1)}


# Cached and fresh


@pytest.mark.parametrize("condition", [MaskCondition(3, FACTOR), NoCondition()], ids=["concat", "none"])
def test_a_cached_batch_is_the_batch_encoded_on_the_fly(tmp_path, splits, codec, condition):
    cases = [{**case, "covariates": torch.tensor([float(n)])} for n, case in enumerate(splits["train"])]
    images = DataLoader(on_the_fly(cases, random=False), batch_size=3)
    transforms = Compose([*preprocessing().transforms, ForegroundCropd(KEYS, "image", CROP)])
    # Volumes of one crop: there the windows are the volumes, and a window's surroundings are no part of its latents.
    entries = built(tmp_path / "cache", splits, codec, transforms)
    latents = DataLoader(LatentCrops(cases, entries, CROP), batch_size=3)
    fresh, cached = (latent_batch(next(iter(loader)), codec, condition, CPU) for loader in (images, latents))
    for one, other in zip(fresh[:2], cached[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    if isinstance(condition, MaskCondition):
        assert torch.equal(fresh[2].grid, cached[2].grid)
    assert torch.equal(fresh[2].covariates, torch.tensor([[0.0], [1.0], [2.0]]))
    assert torch.equal(cached[2].covariates, fresh[2].covariates)
