"""Checkpoints: whole or not at all, no pickled code, and what is said of those that do not fit."""

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latdiff3d import checkpoints
from latdiff3d.errors import InputError

CONTENT = {"stage": "autoencoder", "epoch": 3, "objects": {"codec": {"weight": torch.arange(6.0).view(2, 3)}}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoints.save(path, CONTENT)
    return path


def test_what_is_saved_is_loaded(saved):
    content = checkpoints.load(saved, "autoencoder")
    assert content["epoch"] == 3
    assert torch.equal(content["objects"]["codec"]["weight"], CONTENT["objects"]["codec"]["weight"])


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved):
    before = saved.read_bytes()

    class Unsaveable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        checkpoints.save(saved, {**CONTENT, "epoch": 4, "objects": Unsaveable()})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["last.pt"]


def test_the_old_file_is_replaced_and_never_written_into(saved):
    before = saved.read_bytes()
    with saved.open("rb") as reader:  # has the old file, as a crash would leave it
        checkpoints.save(saved, {**CONTENT, "epoch": 4})
        assert reader.read() == before
    assert checkpoints.load(saved)["epoch"] == 4


def test_a_save_that_is_cut_short_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def save_half(content, file):
        file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(InputError, match=r"last\.pt cannot be written: .* has no space left; make room"):
        checkpoints.save(saved, CONTENT)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["last.pt"]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_a_damaged_file_is_told(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(
        InputError, match=r"last\.pt is not a readable checkpoint .*copy it again or use another"
    ) as error:
        checkpoints.load(saved)
    assert "\n" not in str(error.value)


def test_a_text_file_is_told(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint\n")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoints.load(path)


def test_the_wrong_stage_is_told(saved):
    with pytest.raises(InputError, match="of stage 'autoencoder'; expected one of stage 'diffusion'"):
        checkpoints.load(saved, "diffusion")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"format": 99}])
def test_a_foreign_pt_is_told(tmp_path, content):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="not a latdiff3d checkpoint of format 1"):
        checkpoints.load(tmp_path / "foreign.pt")


def test_a_pickle_is_not_run(tmp_path):
    marker = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"format": 1, "stage": "autoencoder", "objects": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(InputError, match="not a readable checkpoint"):
            checkpoints.load(tmp_path / name)
    assert not marker.exists()


# Finding


def test_a_folder_or_a_file_names_a_checkpoint(saved):
    assert checkpoints.find(saved) == saved
    assert checkpoints.find(str(saved.parent.parent), "last") == saved


@pytest.mark.parametrize("place", ["", "nowhere", "nowhere.pt", "."])
def test_a_place_without_one_is_told(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint at .*expected a \.pt file or the folder of a run"):
        checkpoints.find(place)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        checkpoints.load(tmp_path / "x.pt")


def test_the_hash_is_the_files(saved):
    before = checkpoints.sha256(saved)
    assert len(before) == 64 and before == checkpoints.sha256(saved)
    checkpoints.save(saved, {**CONTENT, "epoch": 4})
    assert checkpoints.sha256(saved) != before


# Weights


def test_weights_of_the_same_shapes_are_loaded():
    there, here = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoints.load_weights(here, there.state_dict(), "x.pt")
    assert torch.equal(here.weight, there.weight)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (nn.Linear(3, 4).state_dict(), r"weight is \(4, 3\) there, \(2, 3\) here"),
        (nn.Linear(3, 2, bias=False).state_dict(), r"bias is absent there, \(2,\) here"),
        ({**nn.Linear(3, 2).state_dict(), "more": torch.zeros(5)}, r"more is \(5,\) there, absent here"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(weights, words):
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    with pytest.raises(InputError, match=rf"x\.pt does not fit this configuration: {words}.*config\.yaml"):
        checkpoints.load_weights(network, weights, "x.pt")
    assert torch.equal(network.weight, before)


def flip_a_byte(path):
    """Change one byte in the middle of a file, where its tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_single_wrong_byte_is_told(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"stage": "autoencoder", "weights": torch.ones(10000)})
    flip_a_byte(path)
    with pytest.raises(InputError, match=r"is not a readable checkpoint \(the checksum of .* is wrong\)"):
        checkpoints.load(path)


def test_as_many_earlier_checkpoints_are_kept_as_asked(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    for step in range(5):
        checkpoints.save(path, {"stage": "autoencoder", "step": step}, num_before=2)
    assert sorted(os.listdir(path.parent)) == ["last-1.pt", "last-2.pt", "last.pt"]
    assert [checkpoints.load(checkpoints.earlier(path, number))["step"] for number in range(3)] == [4, 3, 2]


def test_without_hard_links_they_are_copied(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_as_many_earlier_checkpoints_are_kept_as_asked(tmp_path)


def test_a_damaged_last_one_is_named_and_the_one_before_it_used(tmp_path, capsys):
    path = tmp_path / "checkpoints" / "last.pt"
    assert checkpoints.load_last(tmp_path, "autoencoder") is None
    for step in range(3):
        checkpoints.save(path, {"stage": "autoencoder", "step": step, "weights": torch.ones(10000)}, num_before=2)
    flip_a_byte(path)
    assert checkpoints.load_last(tmp_path, "autoencoder")["step"] == 1
    [line] = capsys.readouterr().out.strip().split("\n")
    assert line.startswith(f"warning: {path} is not a readable checkpoint")
    assert line.endswith(f"Going on from {path.with_name('last-1.pt')}, the one before it.")
    for number in (1, 2):
        flip_a_byte(checkpoints.earlier(path, number))
    with pytest.raises(InputError, match=r"last\.pt is not a readable checkpoint"):
        checkpoints.load_last(tmp_path, "autoencoder")


def test_too_little_space_for_the_next_checkpoint_is_told_before_it_is_due(saved, monkeypatch):
    size = saved.stat().st_size
    checkpoints.require_space(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    with pytest.raises(InputError, match=r"MB free, the next checkpoint takes .*; make room, and the same command"):
        checkpoints.require_space(saved)
    checkpoints.require_space(saved.parent / "none yet.pt")


def test_a_save_over_a_damaged_checkpoint_keeps_a_whole_one_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.pt"
    for step in range(2):
        checkpoints.save(path, {"stage": "autoencoder", "step": step, "weights": torch.ones(10000)}, num_before=1)
    flip_a_byte(path)
    replace, moments = Path.replace, []

    def replace_and_look(self, target):
        replace(self, target)
        moments.append(checkpoints.load_last(tmp_path, "autoencoder")["step"])

    monkeypatch.setattr(Path, "replace", replace_and_look)
    checkpoints.save(path, {"stage": "autoencoder", "step": 2, "weights": torch.ones(10000)}, num_before=1)
    assert moments[0] == 0 and moments[-1] == 2 and set(moments) == {0, 2}


def test_the_tenth_before_comes_after_the_second(tmp_path, capsys):
    path = tmp_path / "checkpoints" / "last.pt"
    for step in range(12):
        checkpoints.save(path, {"stage": "autoencoder", "step": step, "weights": torch.ones(10000)}, num_before=11)
    for number in (0, 1):
        flip_a_byte(checkpoints.earlier(path, number))
    assert checkpoints.load_last(tmp_path, "autoencoder")["step"] == 9
