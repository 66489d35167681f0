"""The latent cache: what it holds, what it is keyed by, how it is built, gone on with and refused."""

import json
import os
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from encoding import CPU, CROP, FACTOR, LATENTS, built, make_codec, preprocessing, write_splits
from monai.transforms import Compose, RandGaussianNoised
from ranks import on_two_ranks

from latdiff3d import latent_cache, latent_entries
from latdiff3d.codec import LatentCodec
from latdiff3d.errors import InputError
from latdiff3d.latent_cache import build, estimated_bytes
from latdiff3d.latent_entries import all_flips, is_whole


@pytest.fixture
def codec():
    return make_codec()


@pytest.fixture
def splits(tmp_path, write_volume):
    """Three cases to train on and one to validate on."""
    return write_splits(tmp_path, write_volume)


def whole(entry):
    return entry.crop((0, 0, 0), entry.cells)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entries_in(folder):
    return sorted(path for path in folder.glob("*/*") if not path.name.startswith("."))


# What an entry holds


def test_an_entry_is_the_whole_volumes_posterior_with_its_mask_on_the_same_footprint(tmp_path, splits, codec):
    entries = built(tmp_path / "cache", splits, codec)
    assert list(entries) == [(f"case_{number}", ()) for number in range(4)]
    for case in splits["train"] + splits["val"]:
        volume = preprocessing()({key: case[key] for key in ("image", "mask")})
        mean, std = codec.encode(volume["image"].as_tensor()[None])
        found = whole(entries[case["case"], ()])
        assert mean.shape[2:] == (5, 5, 4)
        assert torch.equal(found["mean"], mean[0]) and torch.equal(found["std"], std[0]) and (std > 0).all()
        assert found["mask"].shape == (1, 10, 10, 8) and found["mask"].dtype == torch.uint8
        assert torch.equal(found["mask"][:, :9], volume["mask"].as_tensor().to(torch.uint8))
        assert not found["mask"][:, 9:].any()
        first, end = entries[case["case"], ()].box
        assert first.tolist() == [2, 3, 2] and end.tolist() == [7, 9, 6]  # one voxel of padding before the last axis


def test_a_crop_of_an_entry_is_mean_std_and_mask_of_one_place(tmp_path, splits, codec):
    entry = built(tmp_path / "cache", splits, codec)["case_0", ()]
    crop, everything = entry.crop((1, 0, 2), (3, 4, 2)), whole(entry)
    assert torch.equal(crop["mean"], everything["mean"][:, 1:4, 0:4, 2:4])
    assert torch.equal(crop["std"], everything["std"][:, 1:4, 0:4, 2:4])
    assert torch.equal(crop["mask"], everything["mask"][:, 2:8, 0:8, 4:8])


def test_a_case_without_a_mask_has_an_entry_without_one(tmp_path, splits, codec):
    bare = {name: [{k: v for k, v in case.items() if k != "mask"} for case in cases] for name, cases in splits.items()}
    entries = built(tmp_path / "cache", bare, codec)
    assert set(whole(entries["case_0", ()])) == {"mean", "std"}
    with_mask = built(tmp_path / "cache", splits, codec)["case_0", ()]
    assert torch.equal(whole(with_mask)["mean"], whole(entries["case_0", ()])["mean"])


def test_a_large_volume_is_encoded_within_its_memory(tmp_path, splits, codec, monkeypatch):
    budgets = []
    encode = LatentCodec.encode
    monkeypatch.setattr(LatentCodec, "encode", lambda self, x, gb=None: budgets.append(gb) or encode(self, x))
    built(tmp_path / "cache", splits, codec, memory_gb=3)  # 9 × 10 × 8 voxels, a crop has 8 × 8 × 8
    build(tmp_path / "other", splits, codec, preprocessing(), CPU, crop_to=(10, 10, 8), memory_gb=3)
    assert budgets == [3] * 4 + [None] * 4


# Flips


def test_flips_are_all_combinations():
    assert all_flips([]) == [()]
    assert all_flips([2, 0]) == [(), (0,), (2,), (0, 2)]


def test_a_flip_is_encoded_and_its_mask_and_box_are_flipped_with_it(tmp_path, splits, codec):
    entries = built(tmp_path / "cache", splits, codec, flips=[0, 2])
    assert len(entries) == 3 * 4 + 1 and ("case_3", (0,)) not in entries
    case = splits["train"][0]
    volume = preprocessing()({key: case[key] for key in ("image", "mask")})
    flipped = torch.flip(volume["image"].as_tensor(), [1, 3])
    honest = whole(entries["case_0", (0, 2)])
    assert torch.equal(honest["mean"], codec.encode(flipped[None])[0][0])
    assert torch.equal(honest["mask"][:, :9], torch.flip(volume["mask"].as_tensor(), [1, 3]).to(torch.uint8))
    assert entries["case_0", (0, 2)].box[0].tolist() == [9 - 7, 3, 8 - 6]


def test_the_flip_of_the_latents_is_not_the_latents_of_the_flip(tmp_path, splits, codec):
    entries = built(tmp_path / "cache", splits, codec, flips=[2])
    plain, honest = whole(entries["case_0", ()])["mean"], whole(entries["case_0", (2,)])["mean"]
    assert (torch.flip(plain, [3]) - honest).std() > 0.1 * honest.std()


# What it is keyed by


def encodings(monkeypatch):
    """Return a list that grows by one with every volume that is encoded."""
    calls, encode = [], LatentCodec.encode
    monkeypatch.setattr(LatentCodec, "encode", lambda *args: calls.append(1) or encode(*args))
    return calls


def test_nothing_is_encoded_twice(tmp_path, splits, codec, monkeypatch):
    calls = encodings(monkeypatch)
    built(tmp_path / "cache", splits, codec)
    before = files_of(tmp_path / "cache")
    assert len(calls) == 4
    built(tmp_path / "cache", {"train": splits["val"], "val": splits["train"]}, make_codec())
    assert len(calls) == 4 and files_of(tmp_path / "cache") == before
    built(tmp_path / "cache", splits, codec, flips=[1])
    assert len(calls) == 4 + 3


@pytest.mark.parametrize("what", ["weights", "statistics", "transforms", "image", "mask", "channels"])
def test_a_stale_entry_is_not_used_and_not_deleted(tmp_path, splits, codec, monkeypatch, what, write_volume):
    old = built(tmp_path / "cache", splits, codec)["case_0", ()].folder
    calls, kept = encodings(monkeypatch), files_of(tmp_path / "cache")
    transforms, case = preprocessing(), splits["train"][0]
    if what == "weights":
        codec = make_codec(seed=1)
    elif what == "statistics":
        codec.latent_std[0] = 2
    elif what == "transforms":
        transforms = preprocessing(upper=90)
    elif what == "channels":
        splits["train"][0] = {**case, "image": splits["train"][1]["image"]}
    else:
        path = case["mask"] if what == "mask" else case["image"][0]
        stat = os.stat(path)
        with open(path, "rb+") as file:  # the last voxel: same name, size and time
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01" if what == "mask" else b"\x3f")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    new = built(tmp_path / "cache", splits, codec, transforms)["case_0", ()].folder
    assert new != old
    assert len(calls) == (1 if what in ("image", "mask", "channels") else 4)
    assert {name: content for name, content in files_of(tmp_path / "cache").items() if name in kept} == kept


# Building


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, splits, codec, monkeypatch):
    complete = tmp_path / "complete"
    built(complete, splits, codec)
    calls, encode = [], LatentCodec.encode

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(LatentCodec, "encode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "cache", splits, codec)
    assert len(entries_in(tmp_path / "cache")) == 2
    built(tmp_path / "cache", splits, codec)
    assert len(calls) == 3 + 2
    assert files_of(tmp_path / "cache") == files_of(complete)


@pytest.mark.parametrize("tear", ["cut short", "zeroed", "file lost", "no manifest", "manifest cut short"])
def test_a_torn_entry_is_made_again(tmp_path, splits, codec, monkeypatch, tear):
    torn = built(tmp_path / "cache", splits, codec)["case_1", ()].folder
    sound, calls = files_of(tmp_path / "cache"), encodings(monkeypatch)
    path = torn / ("entry.json" if "manifest" in tear else "std.npy")
    content = path.read_bytes()
    if tear in ("file lost", "no manifest"):
        path.unlink()
    else:
        path.write_bytes(content[:-64] + (bytes(64) if tear == "zeroed" else b""))
    assert not is_whole(torn)
    built(tmp_path / "cache", splits, codec)
    assert len(calls) == 1 and files_of(tmp_path / "cache") == sound


def test_what_a_killed_build_left_half_written_is_swept_and_what_is_being_written_is_not(tmp_path, splits, codec):
    place = built(tmp_path / "cache", splits, codec)["case_0", ()].folder.parent
    old, new = place / ".a.tmp", place / ".b.tmp"
    for folder in (old, new):
        folder.mkdir()
        (folder / "mean.npy").write_bytes(b"half")
    long_ago = time.time() - 2 * latent_entries.TORN_AFTER_S
    os.utime(old, (long_ago, long_ago))
    built(tmp_path / "cache", splits, codec, flips=[0])
    assert not old.exists() and new.exists()


def test_whoever_comes_second_with_an_entry_leaves_the_first_ones(tmp_path):
    arrays, box = {"mean": np.zeros((1, 1, 1, 1))}, (np.zeros(3, int), np.ones(3, int))
    latent_entries.write(tmp_path / "entry", arrays, box, {"case": "first"})
    latent_entries.write(tmp_path / "entry", arrays, box, {"case": "second"})
    assert json.loads((tmp_path / "entry" / "entry.json").read_text())["case"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_build_leaves_the_random_numbers_after_it_as_they_were(tmp_path, splits, codec):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    built(tmp_path / "cache", splits, codec)
    assert torch.equal(torch.rand(2), expected)


def test_workers_that_preprocess_change_nothing(tmp_path, splits, codec):
    built(tmp_path / "one", splits, codec)
    built(tmp_path / "other", splits, codec, num_workers=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


# Several ranks


def _build(folder, splits, refused):
    """Build on this rank; then let a file be lost; return how many volumes this rank encoded, and the refusal."""
    calls, encode = [], LatentCodec.encode
    LatentCodec.encode = lambda *args: calls.append(1) or encode(*args)
    built(folder, splits, make_codec(), flips=[0])
    try:
        built(folder, refused, make_codec())
    except InputError as error:
        return {"calls": len(calls), "told": str(error)}


def test_two_ranks_build_what_one_builds_and_hear_each_others_refusals(tmp_path, splits, codec):
    lost = {**splits, "val": [{**splits["val"][0], "image": [str(tmp_path / "lost.nii")]}]}
    found = on_two_ranks(_build, tmp_path, tmp_path / "two", splits, lost)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    built(tmp_path / "one", splits, codec, flips=[0])
    torch.set_num_threads(num_threads)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert [rank["calls"] for rank in found] == [4, 3]
    assert all("lost.nii cannot be read" in rank["told"] for rank in found)


# What it says, and refuses


def test_the_size_is_said_beforehand_and_is_that_of_the_arrays(tmp_path, splits, codec, capsys):
    entries = built(tmp_path / "cache", splits, codec)
    said = capsys.readouterr().out
    assert "0 of 4 entries are there, 4 to encode, about" in said and "GB free" in said
    arrays = sum(np.load(path).nbytes for path in entries["case_0", ()].folder.glob("*.npy"))
    assert estimated_bytes(splits["train"][0], LATENTS, FACTOR, CROP, None) == arrays
    built(tmp_path / "cache", splits, codec)
    assert "4 of 4 entries are there, 0 to encode" in capsys.readouterr().out


def test_the_estimate_knows_turned_axes_and_spacing(tmp_path, write_volume):
    turned = np.array([[0, 0, 2, 0], [1, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 1.0]])  # file axes: y, z, x
    case = {"image": [write_volume(tmp_path / "a.nii", np.zeros((16, 8, 32), np.int16), turned)]}
    # RAS (32, 16, 8) of 2 × 1 × 4 mm → 64 × 16 × 32 of 1 mm³
    assert estimated_bytes(case, 4, 4, (1, 1, 1), [1, 1, 1]) == (16 * 4 * 8) * 4 * 4 * 2
    assert estimated_bytes(case, 4, 4, (1, 20, 1), None) == (8 * 5 * 2) * 4 * 4 * 2


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, splits, codec, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "free")(5000))
    words = r"needs \S+ GB more, and its disk has 5e-06 GB free; expected room for it\. Set latent_cache to another"
    with pytest.raises(InputError, match=words):
        built(tmp_path / "deep" / "cache", splits, codec)
    assert not (tmp_path / "deep").exists()


def test_entries_that_are_not_needed_stay_and_it_is_said_how_to_delete_them(tmp_path, splits, codec, capsys):
    built(tmp_path / "cache", splits, codec)
    assert "more entries" not in capsys.readouterr().out
    built(tmp_path / "cache", splits, make_codec(seed=1))
    said = capsys.readouterr().out
    assert "4 more entries" in said and f"delete {tmp_path / 'cache'}" in said
    assert len(entries_in(tmp_path / "cache")) == 8


def test_random_preprocessing_is_refused(tmp_path, splits, codec):
    noisy = Compose([*preprocessing().transforms, RandGaussianNoised("image")])
    with pytest.raises(InputError, match=r"RandGaussianNoised is random.*encode=on_the_fly"):
        built(tmp_path / "cache", splits, codec, noisy)


def test_a_disk_that_ranks_do_not_share_is_told(tmp_path):
    with pytest.raises(InputError, match="expected a latent_cache on a disk that all ranks share"):
        latent_entries.read(tmp_path / "nowhere", FACTOR)


def test_its_own_format_is_part_of_the_key(tmp_path, splits, codec, monkeypatch):
    old = built(tmp_path / "cache", splits, codec)["case_0", ()].folder
    monkeypatch.setattr(latent_cache, "FORMAT", 99)
    assert built(tmp_path / "cache", splits, codec)["case_0", ()].folder != old
