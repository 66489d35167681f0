"""A bundle leaves as one zip, with or without its weights, and reaches Hugging Face's client as MONAI sends it."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import refused, run_here

from latdiff3d import bundle_files, checkpoints, sharing
from latdiff3d.config import read_yaml
from latdiff3d.synthesis import Model


def test_a_zip_holds_the_bundle_in_a_folder_of_its_name(exported_bundle, tmp_path):
    ended = run_here("pack", exported_bundle, "--to", tmp_path / "a.zip")
    assert ended.code == 0, ended.err
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / exported_bundle.name
    assert not any(bundle_files.problems(unpacked).values())
    assert Model.load(unpacked).crop_to == [16, 16, 16]


def test_the_same_bundle_gives_the_same_zip(exported_bundle, tmp_path):
    for name in ("a.zip", "b.zip"):
        sharing.pack(exported_bundle, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_without_weights_a_list_says_where_they_are(exported_bundle, tmp_path):
    left_out = sharing.pack(exported_bundle, tmp_path / "a.zip", "https://example.org/weights/")
    assert left_out == ["models/model.pt", "models/model_autoencoder.pt"]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / exported_bundle.name
    first, second = read_yaml(unpacked / "large_files.yml")["large_files"]
    assert first["url"] == "https://example.org/weights/model.pt"
    assert first["hash_val"] == checkpoints.sha256(exported_bundle / "models" / "model.pt")
    assert second["path"] == "models/model_autoencoder.pt"
    assert not (unpacked / "models" / "model.pt").exists()
    problems = bundle_files.problems(unpacked)
    assert problems["hashes"] == [f"{file} is in SHA256SUMS, and not there" for file in left_out]
    assert not problems["sizes"]


class Hub:
    """Hugging Face's client up to where the network begins."""

    calls: list

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, **given):
        self.calls.append(("create_repo", given))

    def upload_folder(self, repo_id, folder_path):
        files = {path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()}
        assert bundle_files.problems(Path(folder_path))["hashes"] == []
        self.calls.append(("upload_folder", repo_id, files))
        return f"https://hub.example/{repo_id}"

    def create_tag(self, **given):
        self.calls.append(("create_tag", given))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(sharing, "find_spec", lambda name: name)
    monkeypatch.setattr("monai.bundle.scripts.huggingface_hub", SimpleNamespace(HfApi=Hub))
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    return Hub


def test_a_bundle_is_pushed_privately_with_its_version_and_a_card(exported_bundle, hub):
    ended = run_here("push", exported_bundle, "--repo", "ann/tiny")
    assert ended.out.strip() == "https://hub.example/ann/tiny", ended.err
    assert ("create_repo", {"repo_id": "ann/tiny", "private": True, "exist_ok": True}) in hub.calls
    version = json.loads((exported_bundle / "configs" / "metadata.json").read_text())["version"]
    assert ("create_tag", {"repo_id": "ann/tiny", "tag": version, "exist_ok": True}) in hub.calls
    [(_, _, files)] = [call for call in hub.calls if call[0] == "upload_folder"]
    assert {"models/model.pt", "README.md", "configs/common.yaml"} <= files
    assert {"sample.png", "docs/sample.png"} <= files  # the card is at both places, and shows it by ./sample.png
    assert not (exported_bundle / "README.md").exists()  # which MONAI writes


HfHubHTTPError = type("HfHubHTTPError", (Exception,), {"__module__": "huggingface_hub.errors"})
ConnectError = type("ConnectError", (Exception,), {"__module__": "httpx2"})  # what the client meets without a network


@pytest.mark.parametrize("error", [ConnectionError, ConnectError, type("Forbidden", (HfHubHTTPError,), {})])
def test_what_the_hub_says_is_one_line(exported_bundle, hub, monkeypatch, error):
    def refuse(self, **given):
        raise error("no route\nto the hub")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    line = refused(run_here("push", exported_bundle, "--repo", "ann/tiny"))
    assert line.endswith("as ann/tiny: no route to the hub")


def test_a_mistake_in_code_is_not_taken_for_the_hubs(exported_bundle, hub, monkeypatch):
    monkeypatch.setattr(Hub, "create_repo", lambda self: None)  # which takes no such arguments
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        sharing.push(exported_bundle, "ann/tiny")


@pytest.mark.parametrize(
    "words, said",
    [
        (["push", "BUNDLE", "--repo", "tiny"], "--repo is 'tiny'; expected user/name"),
        (["push", "BUNDLE", "--repo", "ann/tiny"], "huggingface_hub is not installed"),
        (["pack", "BUNDLE", "--to", "x.tar"], "x.tar does not end in .zip"),
        (["pack", "bundles/brats_mask_ldm", "--to", "x.zip"], "is no bundle with weights"),
    ],
)
def test_a_mistake_is_one_line(exported_bundle, monkeypatch, words, said):
    monkeypatch.setattr(sharing, "find_spec", lambda name: None)
    assert said in refused(run_here(*(exported_bundle if word == "BUNDLE" else word for word in words)))
