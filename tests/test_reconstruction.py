"""The autoencoder's view of a scan: where it lies, what the error map says, and that it is marked as no scan."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import refused, run_here
from monai.bundle import ConfigParser
from monai.transforms import Compose
from scipy import ndimage

from latdiff3d import config
from latdiff3d.errors import InputError
from latdiff3d.layouts import scan_files
from latdiff3d.provenance import inspect
from latdiff3d.reconstruction import Reconstruction, Reconstructor, reconstruct_to_folder

MODALITIES = ["flair", "t1", "t1ce", "t2"]


@pytest.fixture(scope="module")
def reconstructor(tiny_runs):
    return Reconstructor.load(tiny_runs.autoencoder)


@pytest.fixture(scope="module")
def case(tiny_runs):
    return tiny_runs.data / "phantom_0004"


@pytest.fixture(scope="module")
def made(tiny_runs, case, tmp_path_factory):
    """What `latdiff3d reconstruct` writes of one case."""
    out = tmp_path_factory.mktemp("reconstructed")
    ended = run_here("reconstruct", "--model", tiny_runs.autoencoder, "--image", case, "--out", out)
    assert ended.code == 0, ended.err
    assert "phantom_0004: PSNR " in ended.out
    return out / "phantom_0004"


def test_it_is_the_volumes_their_errors_a_sidecar_and_a_picture(made):
    volumes = {f"phantom_0004_{name}{kind}.nii.gz" for name in MODALITIES for kind in ("", "_error")}
    assert {path.name for path in made.iterdir()} == volumes | {"phantom_0004.json", "phantom_0004.png"}


def test_the_error_is_reconstruction_minus_scan_on_the_scans_own_grid(made, case, reconstructor):
    found = reconstructor.reconstruct(scan_files(case, MODALITIES))
    for k, name in enumerate(MODALITIES):
        scan = nib.load(case / f"phantom_0004_{name}.nii.gz")
        volume, error = (nib.load(made / f"phantom_0004_{name}{kind}.nii.gz") for kind in ("", "_error"))
        assert volume.shape == error.shape == scan.shape
        assert np.allclose(volume.affine, scan.affine, atol=1e-5)
        scaled = nib.Nifti1Image(found.scan[k], np.eye(4))  # on the RAS grid
        assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
        assert np.allclose(volume.get_fdata() - error.get_fdata(), scaled.get_fdata(), atol=1e-5)
        assert volume.get_fdata().min() >= 0 and volume.get_fdata().max() <= 1


def test_the_figures_are_those_of_the_volume(made, case, reconstructor):
    said = json.loads((made / "phantom_0004.json").read_text())
    errors = np.stack([nib.load(made / f"phantom_0004_{name}_error.nii.gz").get_fdata() for name in MODALITIES])
    for name, error in zip(MODALITIES, errors, strict=True):
        assert said["PSNR"][name] == pytest.approx(-10 * np.log10((error**2).mean()), abs=1e-3)
        assert 0 < said["SSIM"][name] <= 1
    assert said["PSNR"]["All"] == pytest.approx(-10 * np.log10((errors**2).mean()), abs=1e-3)


def test_air_does_not_count_in_the_foregrounds_psnr():
    scan = np.zeros((1, 12, 12, 12), np.float32)
    scan[0, :6] = 0.5
    volume = scan + 0.1 * (scan > 0)
    found = Reconstruction(scan, volume, volume, volume - scan, np.eye(4)).figures(["t1"])
    assert found["PSNRForeground"]["t1"] == pytest.approx(20, abs=1e-4)
    assert found["PSNR"]["t1"] == pytest.approx(20 + 10 * np.log10(2), abs=1e-4) == found["PSNR"]["All"]
    same = Reconstruction(scan, scan, scan, 0 * scan, np.eye(4)).figures(["t1"])
    assert same["PSNR"]["All"] is None and same["SSIM"]["t1"] == pytest.approx(1)


def test_every_file_is_marked_as_no_scan(made, case):
    for path in made.glob("*.nii.gz"):
        found = inspect(path)
        assert found.is_synthetic and found.unchanged and "no scan" in found.description
        assert found.said["Image"][0]["Name"] == "phantom_0004_flair.nii.gz"
    (path,) = made.glob("*_t1.nii.gz")
    text = b"".join(bytes(extension.get_content()) for extension in nib.load(path).header.extensions)
    assert b'"Image": [{"SHA256": ' in text and b"phantom" not in text


def test_both_stages_hold_the_same_autoencoder(tiny_runs, case, made, tmp_path):
    ended = run_here("reconstruct", "--model", tiny_runs.diffusion, "--image", case, "--out", tmp_path)
    assert ended.code == 0, ended.err
    for path in made.glob("*.nii.gz"):
        other = nib.load(tmp_path / "phantom_0004" / path.name)
        assert np.array_equal(other.get_fdata(), nib.load(path).get_fdata())


def reoriented(case, axes, folder):
    """A copy of a case, stored along other axes."""
    folder.mkdir()
    for name in MODALITIES:
        image = nib.load(case / f"phantom_0004_{name}.nii.gz")
        there = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        nib.save(image.as_reoriented(there), folder / f"turned_{name}.nii.gz")
    return folder


def test_a_scan_stored_along_other_axes_has_the_same_view_in_the_world(reconstructor, case, made, tmp_path):
    turned = reoriented(case, "PIL", tmp_path / "turned")
    list(reconstruct_to_folder(reconstructor, [str(turned)], tmp_path / "out", picture=False))
    for path in sorted((tmp_path / "out" / "turned").glob("*.nii.gz")):
        image = nib.load(path)
        assert nib.aff2axcodes(image.affine) == tuple("PIL")
        back, plain = nib.as_closest_canonical(image), nib.load(made / path.name.replace("turned", "phantom_0004"))
        assert np.allclose(back.affine, plain.affine, atol=1e-5)
        assert np.allclose(back.get_fdata(), plain.get_fdata(), atol=1e-6)


class Identity:
    """An autoencoder that loses nothing."""

    precision = "fp32"

    def reconstruct(self, image, memory_gb=None):
        return image


@pytest.mark.parametrize("axes", ["RAS", "PIL"])
def test_a_resampled_scan_comes_back_to_its_own_grid(tmp_path, axes):
    parser = ConfigParser(config.merged([config.DEFAULT_BUNDLE / "configs" / config.COMMON]))
    parser["spacing"], parser["modalities"], parser["intensity_percentiles"] = [2.0, 2.0, 2.0], ["t1"], [0, 100]
    preprocessing = Compose(parser.get_parsed_content("preprocessing"))
    voxels = np.zeros((40, 30, 16), np.float32)
    voxels[24, 10, 9] = 1
    voxels = ndimage.gaussian_filter(voxels, (6, 4, 2))
    plain = nib.Nifti1Image(voxels, nib.affines.from_matvec(np.diag([1.0, 1.5, 3.0]), [-31.5, 17.25, 40]))
    there = nib.orientations.ornt_transform(nib.io_orientation(plain.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(plain.as_reoriented(there), tmp_path / "scan.nii.gz")
    reconstructor = Reconstructor(tmp_path, Identity(), preprocessing, ["t1"], torch.device("cpu"))
    found = reconstructor.reconstruct([str(tmp_path / "scan.nii.gz")])
    scan = nib.load(tmp_path / "scan.nii.gz")
    assert found.volume.shape == (1, 20, 23, 24)
    assert found.on_scan_grid.shape == (1, *scan.shape) and np.allclose(found.affine, scan.affine)
    assert np.unravel_index(found.on_scan_grid.argmax(), found.on_scan_grid.shape)[1:] == np.unravel_index(
        scan.get_fdata().argmax(), scan.shape
    )
    assert not found.error.any()


def test_a_volume_of_any_size_is_done_by_tiles_in_the_memory_there_is(reconstructor, tmp_path):
    """The least memory is named, and what is made in little more of it is what is made at once."""
    voxels = np.random.default_rng(0).random((66, 41, 38, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "scan.nii.gz")
    files = [str(tmp_path / "scan.nii.gz")]
    with pytest.raises(InputError, match=r"memory_gb is 1e-06; .* need [\d.]+\. Give at least that") as error:
        reconstructor.reconstruct(files, 1e-6)
    least = float(re.search(r"need ([\d.]+)\.", str(error.value))[1])
    whole, tiled = reconstructor.reconstruct(files), reconstructor.reconstruct(files, 1.3 * least)
    assert whole.on_scan_grid.shape == (4, 66, 41, 38)
    assert not np.array_equal(whole.volume, tiled.volume)  # it was done by tiles
    assert np.allclose(whole.volume, tiled.volume, atol=1e-4)


def test_two_scans_of_one_name_are_refused_before_any_is_read(reconstructor, case, tmp_path):
    shutil.copytree(case, tmp_path / "phantom_0004")
    with pytest.raises(InputError, match="2 scans have only 1 different names"):
        list(reconstruct_to_folder(reconstructor, [str(case), str(tmp_path / "phantom_0004")], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_in_one_line(tiny_runs, case, tmp_path):
    command = ["reconstruct", "--model", tiny_runs.autoencoder, "--out", tmp_path / "out", "--image"]
    assert "there is no scan at" in refused(run_here(*command, tmp_path / "absent.nii.gz"))
    one = refused(run_here(*command, case / "phantom_0004_t1.nii.gz"))
    assert "phantom_0004_t1.nii.gz is 3D (16×16×16): one volume; expected 4 channels" in one
    assert "memory is 'lots'; expected GB" in refused(run_here(*command, case, "--memory", "lots"))
    assert not (tmp_path / "out").exists()
