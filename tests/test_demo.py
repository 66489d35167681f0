"""The quickstart, on data sets and with networks small enough for a test."""

import functools
import json
import math
import re

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import TINY, run_here
from monai.bundle import ConfigParser
from PIL import Image

from latdiff3d import config, demo, fidelity
from latdiff3d.demo import settings_for
from latdiff3d.errors import InputError
from latdiff3d.networks import check_discriminator
from latdiff3d.phantoms import write_phantoms
from latdiff3d.settings import check_settings


def write_decathlon(root, shape=(18, 20, 17), num_channels=1, affine=None):
    """Write six cases of so many channels in Decathlon's layout, labels 0 to 2, the last two held out."""
    names = [f"organ_{number:03d}" for number in range(6)]
    for number, name in enumerate(names):
        image = np.random.default_rng(number).uniform(100, 200, (*shape, num_channels)).astype(np.float32)
        mask = np.zeros(shape, np.uint8)
        mask[5:9, 5:9, 5:9], mask[6:8, 6:8, 6:8] = 1, 2
        image[mask == 1] += 100
        image[:2] = 0
        for folder, voxels in (("imagesTr", image[..., 0] if num_channels == 1 else image), ("labelsTr", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), root / folder / f"{name}.nii.gz")
    training = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names]
    (root / "dataset.json").write_text(json.dumps({"training": training}))
    (root / "train.list").write_text("\n".join(names[:4]))
    (root / "val.list").write_text("\n".join(names[4:]))
    return root


@pytest.mark.parametrize(("precision", "steps"), [("bf16", 1600), ("fp32", 600)])
def test_the_demo_trains_for_as_long_with_bfloat16_as_without(monkeypatch, precision, steps):
    monkeypatch.setattr(demo.devices, "fastest_precision", lambda device: precision)
    assert demo.num_steps("autoencoder") == steps


# What is found out about a data set


def test_a_brats_data_set_has_its_four_modalities(phantoms):
    settings = settings_for(phantoms)
    assert settings["layout"] == "brats" and settings["modalities"] == ["flair", "t1", "t1ce", "t2"]
    assert settings["labels"] == [0, 1, 2, 4]


@pytest.mark.parametrize(("num_channels", "modalities"), [(1, ["c0"]), (2, ["c0", "c1"])])
def test_a_decathlon_data_set_has_as_many_channels_as_its_files(tmp_path, num_channels, modalities):
    assert settings_for(write_decathlon(tmp_path, num_channels=num_channels)) == {
        "modalities": modalities,
        "labels": [0, 1, 2],
        "crop_to": [24, 24, 24],
        "layout": "decathlon",
    }


def test_what_is_found_out_is_what_the_configuration_takes(phantoms, tmp_path):
    for data in (phantoms, write_decathlon(tmp_path)):
        check_settings(settings_for(data))


def test_a_crop_is_no_larger_than_the_demo_can_train(tmp_path):
    assert settings_for(write_decathlon(tmp_path, (18, 70, 40)))["crop_to"] == [24, demo.LARGEST_CROP, 40]


def test_a_thin_volumes_crop_leaves_something_for_the_demos_discriminator(tmp_path):
    crop = settings_for(write_decathlon(tmp_path, (12, 20, 20)))["crop_to"]
    bundle = ConfigParser(config.merged(config.bundle_files(config.DEFAULT_BUNDLE, "autoencoder")))
    bundle["num_channels"] = 1
    check_discriminator(crop, bundle.get_parsed_content("discriminator_def"), 1)


def test_a_crop_is_in_the_order_of_the_axes_that_the_networks_see(tmp_path):
    stored_as_pil = np.array([[0, 0, -1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    assert nib.aff2axcodes(stored_as_pil) == ("P", "I", "L")
    crop = settings_for(write_decathlon(tmp_path, (18, 30, 40), affine=stored_as_pil))["crop_to"]
    assert crop == [40, 24, 32]  # right, anterior, superior


def test_a_data_set_with_anything_wrong_is_refused(tmp_path):
    (write_decathlon(tmp_path) / "labelsTr" / "organ_002.nii.gz").unlink()
    with pytest.raises(InputError, match=r"organ_002 .* lists .*labelsTr/organ_002\.nii\.gz, which is not there"):
        settings_for(tmp_path)


# From end to end

OWN_SHAPE = (18, 20, 17)


def run_tiny_demo(folder, *words):
    """Run the demo with phantoms of 16³, tiny networks and two steps a stage; return how it ended."""
    shared = {key: value for key, value in TINY["diffusion"].items() if key not in ("max_epochs", "val_interval")}
    # The discriminator's three layers leave nothing of 16³.
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**shared, "crop_to": [24, 24, 24]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "num_steps", lambda stage: 2)
        patch.setattr(demo, "PHANTOM_SHAPE", (16, 16, 16))
        patch.setattr(demo, "write_phantoms", functools.partial(write_phantoms, num_train=4, num_val=2))
        ended = run_here("demo", "--out", folder / "demo", "--config", folder / "tiny.yaml", *words)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def of_phantoms(tmp_path_factory):
    """The folder of a tiny demo, and what it printed; not to be written to."""
    folder = tmp_path_factory.mktemp("phantoms_demo")
    return folder / "demo", run_tiny_demo(folder).out


def assert_shown(out, printed, cases, modalities):
    """Assert that the demo made all it says it makes."""
    assert sorted(path.name for path in (out / "synthetic").iterdir()) == cases
    for case in cases:
        for modality in modalities:
            volume = nib.load(out / "synthetic" / case / f"{case}_{modality}.nii.gz")
            assert np.isfinite(volume.get_fdata()).all()
            assert "SYNTHETIC" in bytes(volume.header["descrip"]).decode()
        assert (out / "synthetic" / case / f"{case}.json").is_file()
    assert min(Image.open(out / "contact_sheet.png").size) > 100
    text = (out / "summary.md").read_text()
    assert text in printed
    assert f"{len(cases)} held-out masks, one SYNTHETIC volume each" in text
    assert re.search(r"PSNR \d+\.\d dB", text) and "latdiff3d sample --model" in text
    assert re.findall(r"^- (\d)/5 .*: \d+\.\d min$", text, re.MULTILINE) == ["1", "2", "3", "4"]


def test_the_demo_makes_a_volume_for_each_held_out_mask_and_shows_them(of_phantoms):
    out, printed = of_phantoms
    cases = ["phantom_0004", "phantom_0005"]
    assert_shown(out, printed, cases, ["flair", "t1", "t1ce", "t2"])
    for case in cases:
        volume, mask = (nib.load(out / "synthetic" / case / f"{case}_{part}.nii.gz") for part in ("t1", "seg"))
        assert volume.shape == mask.shape == (16, 16, 16) and np.array_equal(volume.affine, mask.affine)


def test_a_demo_that_is_there_already_is_gone_on_with(tmp_path):
    run_tiny_demo(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".pt", ".gz")}
    assert len([path for path in before if path.suffix == ".pt"]) == 5
    again = run_tiny_demo(tmp_path)
    assert "1/5" not in again.out and "phantom 1 of" not in again.err
    assert {path: path.read_bytes() for path in before} == before


@pytest.fixture(scope="module")
def of_ones_own(tmp_path_factory):
    """The folder of a tiny demo on a data set of one's own, what it printed, and the voxels each PSNR was over."""
    folder, measured_on = tmp_path_factory.mktemp("own_demo"), []
    write_decathlon(folder / "data", OWN_SHAPE)

    def psnr(image, reconstruction, valid):
        measured_on.append(int(np.sum(valid > 0)))
        return fidelity.psnr(image, reconstruction, valid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "psnr", psnr)
        ended = run_tiny_demo(folder, "--data", folder / "data")
    return folder / "demo", ended.out, measured_on


def test_the_demo_runs_on_a_data_set_of_ones_own(of_ones_own):
    out, printed, _ = of_ones_own
    assert_shown(out, printed, ["organ_004", "organ_005"], ["c0"])
    assert not (out / "data").exists()


def test_the_demos_psnr_is_over_a_volumes_own_voxels(of_ones_own):
    # Padding is reconstructed for nothing: it adds several dB to anything.
    assert of_ones_own[2] == [math.prod(OWN_SHAPE)] * 2
