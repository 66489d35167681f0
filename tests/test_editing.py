"""Editing: what is outside the region stays in the file, the border shows no step, and what is wrong is said."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import MODALITIES, refused, run_here
from monai.bundle import ConfigParser
from monai.transforms import Compose, Spacingd

from latdiff3d.conditioning import NoCondition
from latdiff3d.editing import GUIDANCE
from latdiff3d.errors import InputError
from latdiff3d.phantoms import phantom_case
from latdiff3d.provenance import inspect

SHAPE = (20, 24, 22)  # larger than the tiny model's crop of 16³
HEAD = np.array([[2.9, 0.1, 0, -30], [-0.1, 2.9, 0, -25], [0, 0, 3.1, -28], [0, 0, 0, 1]])


def placed(voxels, axes, affine=HEAD):
    """Return voxels and affine of the same volume in the world with its axes in another order."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = nib.orientations.apply_orientation(voxels, turn)
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape)


def write(path, voxels, axes="RAS", slope=None, inter=None):
    turned, affine = placed(voxels, axes)
    image = nib.Nifti1Image(np.ascontiguousarray(turned), affine)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def roomiest(channel, mask):
    """Return where a cube of 7 voxels that no lesion touches begins, with as much tissue as there is."""
    places = {}
    for first in np.ndindex(*(size - 6 for size in SHAPE)):
        if not mask[tuple(slice(max(f - 1, 0), f + 8) for f in first)].any():
            places[first] = (channel[tuple(slice(f, f + 7) for f in first)] > 0).sum()
    return max(places, key=places.get)


class Drawn:
    """A phantom's scan in a folder, its mask with one more lesion, and a region around that."""

    def __init__(self, folder, axes="RAS", dtype=np.int16, slope=None, inter=None):
        image, mask, _ = phantom_case(SHAPE, 5)
        self.scan = folder / "case"
        self.scan.mkdir()
        for name, channel in zip(MODALITIES, image, strict=True):
            write(self.scan / f"case_{name}.nii.gz", channel.astype(dtype), axes, slope, inter)
        first = roomiest(image[0], mask)
        region, lesion = (tuple(slice(f + inset, f + 7 - inset) for f in first) for inset in (0, 2))
        self.region_voxels = np.zeros(SHAPE, np.uint8)
        self.region_voxels[region] = 1
        self.mask_voxels = mask.copy()
        self.mask_voxels[lesion] = 2
        self.middle = tuple(f + 3 for f in first)  # in the middle of what is drawn
        self.mask = write(folder / "drawn_seg.nii.gz", self.mask_voxels, axes)
        self.region = write(folder / "region.nii.gz", self.region_voxels, axes)
        self.words = ("--image", self.scan, "--mask", self.mask, "--region", self.region)

    def raw(self, name, folder=None):
        image = nib.load((folder or self.scan) / f"case_{name}.nii.gz")
        return image.dataobj.get_unscaled(), image


@pytest.fixture
def drawn(tmp_path):
    return Drawn(tmp_path)


@pytest.mark.parametrize(
    ("axes", "dtype", "slope", "inter"),
    [
        ("RAS", np.int16, None, None),
        ("LPS", np.float32, None, None),
        ("PIL", np.int16, 0.25, -40.0),
        ("ASR", np.uint16, None, None),
        ("SRA", np.float64, None, None),
    ],
)
def test_outside_the_region_every_stored_number_stays(tiny_runs, tmp_path, axes, dtype, slope, inter):
    drawn = Drawn(tmp_path, axes, dtype, slope, inter)
    ended = run_here("edit", "--model", tiny_runs.diffusion, *drawn.words, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    outside = placed(drawn.region_voxels, axes)[0] == 0
    for name in MODALITIES:
        old, scan = drawn.raw(name)
        new, edited = drawn.raw(name, tmp_path / "out" / "case")
        assert new.dtype == old.dtype and np.array_equal(new[outside], old[outside])
        assert np.mean(new[~outside] != old[~outside]) > 0.3
        assert (edited.dataobj.slope, edited.dataobj.inter) == (scan.dataobj.slope, scan.dataobj.inter)
        assert np.array_equal(edited.affine, scan.affine)
        assert old.min() <= new.min() and new.max() <= old.max()
    seg = nib.load(tmp_path / "out" / "case" / "case_seg.nii.gz")
    assert np.array_equal(np.asarray(seg.dataobj), nib.load(drawn.mask).dataobj)


def test_a_scan_in_another_orientation_is_edited_in_the_same_way_in_the_world(model, tmp_path):
    edits = []
    for axes in ("RAS", "PIL"):
        (tmp_path / axes).mkdir()
        drawn = Drawn(tmp_path / axes, axes)
        edit = model.edit(drawn.scan, drawn.mask, drawn.region, seed=3)
        image = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(edit.volume, 0, -1), edit.affine))
        edits.append(image.get_fdata())
    assert np.abs(edits[0] - edits[1]).max() <= 1  # a number may round the other way


def test_the_same_seed_gives_the_same_files_and_another_does_not(tiny_runs, drawn, tmp_path):
    command = ("edit", "--model", tiny_runs.diffusion, *drawn.words, "--no-pictures")
    for out, words in (("one", ()), ("two", ()), ("more", ("-n", "2", "--seed", "0"))):
        assert run_here(*command, "--out", tmp_path / out, *words).code == 0
    for name in MODALITIES:
        one, two = (tmp_path / out / "case" / f"case_{name}.nii.gz" for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        more = [tmp_path / "more" / f"case_seed000{k}" / f"case_seed000{k}_{name}.nii.gz" for k in range(2)]
        assert more[0].read_bytes() == one.read_bytes() != more[1].read_bytes()


def test_the_command_goes_on_where_it_was_stopped(tiny_runs, drawn, tmp_path):
    command = ("edit", "--model", tiny_runs.diffusion, *drawn.words, "--out", tmp_path / "out")
    first = run_here(*command)
    assert "1 edited scans are in" in first.out and "there" not in first.out
    assert "1 of them were there" in run_here(*command).out
    (tmp_path / "out" / "case" / "case.png").unlink()
    assert "there" not in run_here(*command).out


def test_what_is_written_says_that_it_is_edited_and_from_what(tiny_runs, drawn, tmp_path):
    ended = run_here("edit", "-r", tiny_runs.diffusion, *drawn.words, "--out", tmp_path / "out", "--seed", 7)
    assert ended.code == 0, ended.err
    names = {path.name for path in (tmp_path / "out" / "case").iterdir()}
    assert names == {*(f"case_{name}.nii.gz" for name in (*MODALITIES, "seg")), "case.json", "case.png"}
    path = tmp_path / "out" / "case" / "case_t1.nii.gz"
    found = inspect(path)
    assert found.is_synthetic and found.unchanged
    assert "SYNTHETIC in a part: an EDITED scan" in found.description
    said = json.loads((tmp_path / "out" / "case" / "case.json").read_text())
    assert said["Seed"] == 7 and said["Units"] == "those of the scan in Image"
    assert said["Region"]["Name"] == "region.nii.gz" and len(said["Region"]["SHA256"]) == 64
    assert [file["Name"] for file in said["Image"]] == [f"case_{name}.nii.gz" for name in MODALITIES]
    assert said["EditedMM3"] == pytest.approx(said["EditedVoxels"] * abs(np.linalg.det(HEAD[:3, :3])), rel=1e-5)
    changed = np.any([drawn.raw(n)[0] != drawn.raw(n, path.parent)[0] for n in MODALITIES], axis=0)
    assert changed.sum() <= said["EditedVoxels"] <= drawn.region_voxels.sum()
    text = b"".join(bytes(extension.get_content()) for extension in nib.load(path).header.extensions)
    assert b'"Region": {"SHA256": ' in text and b"region.nii" not in text
    shown = run_here("inspect", path)
    assert shown.code == 0 and "region.nii.gz, SHA-256" in shown.out


# The border


@pytest.fixture
def smooth(tmp_path):
    """A scan without noise, air or edges, in float32, with a mask and a region in its middle."""
    x, y, z = np.indices(SHAPE) / 10
    (tmp_path / "smooth").mkdir()
    for k, name in enumerate(MODALITIES):
        write(tmp_path / "smooth" / f"smooth_{name}.nii.gz", (300 + 40 * np.sin(x + k) + 25 * y - 10 * z).astype("f4"))
    region = np.zeros(SHAPE, np.uint8)
    region[6:13, 8:16, 7:14] = 1
    labels = np.zeros(SHAPE, np.uint8)
    labels[8:11, 10:13, 9:12] = 1
    return tmp_path / "smooth", write(tmp_path / "seg.nii.gz", labels), write(tmp_path / "region.nii.gz", region)


def across(volume, region):
    """Return the mean absolute difference of neighbours, of which one is in the region and the other is not."""
    steps = []
    for axis in range(3):
        pairs = np.moveaxis(region, axis, 0), np.moveaxis(volume, axis + 1, 1)
        between = pairs[0][1:] != pairs[0][:-1]
        steps.append(np.abs(np.diff(pairs[1], axis=1))[:, between].ravel())
    return np.concatenate(steps).mean()


def volume_of(channels):
    return np.stack([channel.intensities for channel in channels])


@pytest.mark.parametrize("offset", [0, 0.2, "ramp"])
def test_an_offset_or_a_ramp_of_the_codecs_leaves_nothing(model, smooth, offset):
    site = model.site_of(*smooth)
    ramp = torch.from_numpy(0.02 * np.indices(site.image.shape[1:]).sum(0) - 0.3) if offset == "ramp" else offset
    filled = volume_of(site.filled(site.image + ramp))
    scan = volume_of(site.channels)
    assert np.allclose(filled, scan, atol=0.02) and np.array_equal(filled[:, ~site.region], scan[:, ~site.region])
    assert across(filled, site.region) == pytest.approx(across(scan, site.region), rel=1e-3)


def test_what_was_drawn_stays_where_the_border_is_right(model, smooth):
    site = model.site_of(*smooth)
    drawn = site.grid.mask.as_tensor() > 0
    lesion = site.image - 0.3 * drawn
    filled, scan = volume_of(site.filled(lesion)), volume_of(site.channels)
    high, low = (np.array([getattr(each, end) for each in site.reference.ranges]) for end in ("high", "low"))
    inside = site.labels > 0
    expected = np.maximum(scan[:, inside] - 0.3 * (high - low)[:, None], scan.min(axis=(1, 2, 3))[:, None])
    assert np.allclose(filled[:, inside], expected, atol=0.02)
    assert np.allclose(filled[:, site.region & ~inside], scan[:, site.region & ~inside], atol=0.02)


@pytest.mark.parametrize("kind", ["wave", "nothing"])
def test_no_step_is_left_by_a_codec_that_errs(model, smooth, kind):
    site = model.site_of(*smooth)
    wave = torch.from_numpy(0.3 + 0.1 * np.sin(np.indices(site.image.shape[1:]).sum(0) / 4))
    decoded = site.image + wave if kind == "wave" else 0 * site.image
    scan, region = volume_of(site.channels), site.region
    high, low = (
        np.array([getattr(each, e) for each in site.reference.ranges]).reshape(4, 1, 1, 1) for e in ("high", "low")
    )
    pasted = np.where(region, low + site.grid.to_mask_grid(decoded) * (high - low), scan)
    assert across(volume_of(site.filled(decoded)), region) < 1.1 * across(scan, region) < 0.2 * across(pasted, region)


def test_noise_as_strong_as_the_scans_is_laid_over_what_is_smooth(model, smooth, tmp_path):
    sigmas = (3.0, 0.5, 8.0, 1.0)
    for name, sigma in zip(MODALITIES, sigmas, strict=True):
        path = smooth[0] / f"smooth_{name}.nii.gz"
        voxels = nib.load(path).get_fdata()
        write(path, (voxels + np.random.default_rng(0).normal(0, sigma, SHAPE)).astype("f4"))
    site = model.site_of(*smooth)
    plain, noisy = (volume_of(site.filled(0 * site.image + 0.4, seed)) for seed in (None, 4))
    strengths = (noisy - plain)[:, site.region].std(axis=1)
    assert np.allclose(strengths, sigmas, rtol=0.2)
    assert np.array_equal(noisy, volume_of(site.filled(0 * site.image + 0.4, 4)))
    itself = volume_of(site.filled(site.image, 4))  # which has its noise already
    assert ((itself - volume_of(site.channels))[:, site.region].std(axis=1) < 0.6 * np.array(sigmas)).all()


def test_air_stays_air_but_for_what_is_drawn_in_it(model, drawn):
    site = model.site_of(drawn.scan, drawn.mask, drawn.region)
    corner = np.zeros(SHAPE, np.uint8)
    corner[:8, 8:15, 9:16] = 1  # reaches out of the brain
    write(drawn.region, corner)
    other = model.site_of(drawn.scan, drawn.mask, drawn.region)
    assert site.air.any() and (other.air & (corner > 0)).any()
    assert not (other.region & other.air).any() and (other.region == ((corner > 0) & ~other.air)).all()
    filled = volume_of(other.filled(other.image + 0.3))
    assert (filled[:, other.air] == volume_of(other.channels)[:, other.air]).all()


# Another spacing than the scan's


@pytest.fixture
def resampling(model):
    """The model as if its configuration said `spacing`, coarser than the scan's."""
    spacing_mm = [4.0, 4.0, 4.0]
    spacing = Spacingd(("image", "mask"), spacing_mm, mode=("bilinear", "nearest"), allow_missing_keys=True)
    transforms = list(model.preprocessing.transforms)
    config = ConfigParser({**model.config.get(), "spacing": spacing_mm})
    return replace(model, config=config, preprocessing=Compose([*transforms[:3], spacing, *transforms[3:]]))


def centre_mm(weights, affine):
    """Return where in the world the middle of what weighs more than 0 is."""
    places, weights = np.argwhere(weights > 0), weights[weights > 0]
    return nib.affines.apply_affine(affine, np.average(places, axis=0, weights=weights))


def test_a_model_that_resamples_changes_the_region_alone(resampling, smooth):
    edit = resampling.edit(*smooth, seed=3)
    region, scan = nib.load(smooth[2]).get_fdata() > 0, volume_of(edit.site.channels)
    assert edit.decoded.shape == (4, 16, 16, 16) and edit.volume.shape == (4, *SHAPE)
    assert np.array_equal(edit.volume[:, ~region], scan[:, ~region])
    assert (edit.volume[:, region] != scan[:, region]).mean() > 0.9


def test_what_a_model_that_resamples_draws_lies_where_it_was_drawn(resampling, smooth):
    site = resampling.site_of(*smooth)
    affine = np.asarray(site.grid.mask.affine)
    assert np.allclose(nib.affines.voxel_sizes(affine), 4)
    scan, region = volume_of(site.channels), site.region
    high, low = (
        np.array([getattr(each, e) for each in site.reference.ranges]).reshape(4, 1, 1, 1) for e in ("high", "low")
    )
    plain = volume_of(site.filled(site.image))
    assert np.abs((plain - scan) / (high - low)).max() < 0.05  # what resampling there and back smooths
    bright = (site.image[:, site.grid.mask.as_tensor()[0] > 0].mean(1) > 0.5).numpy()  # room for a darker lesion
    lesion = volume_of(site.filled(site.image - 0.3 * (site.grid.mask.as_tensor() > 0)))
    darker = ((plain - lesion) / (high - low))[bright].mean(0)
    away_mm = np.linalg.norm(centre_mm(darker, site.affine) - centre_mm(site.labels, site.affine))
    assert away_mm < 2  # half a voxel of the model's
    assert darker[site.labels > 0].mean() > 0.15 and not darker[~region].any()


# What is drawn


class Shares:
    """A denoiser whose ε says how much of each cell the mask's label fills, and that counts what it is asked."""

    def __init__(self, model, monkeypatch):
        self.num_volumes = 0

        def predicted(_denoiser, noisy, _timesteps, condition):
            self.num_volumes += len(noisy)
            return 0 * noisy - condition.grid[:, 2:3]

        monkeypatch.setattr("latdiff3d.synthesizer.predicted", predicted)


def test_what_is_drawn_is_told_from_the_same_mask_without_it_in_the_region_alone(model, drawn, monkeypatch):
    asked = Shares(model, monkeypatch)
    edits = [model.edit(drawn.scan, drawn.mask, drawn.region, guidance=scale).decoded for scale in (1.0, 2.0, None)]
    steps = model.synthesizer.num_steps
    assert asked.num_volumes == (1 + 2 + 2) * steps
    assert torch.equal(edits[1], edits[2]) and not torch.equal(edits[0], edits[1])
    write(drawn.mask, np.where(drawn.region_voxels, 0, drawn.mask_voxels))  # the scan's own lesion is left
    empty = [model.edit(drawn.scan, drawn.mask, drawn.region, guidance=scale).decoded for scale in (1.0, 3.0)]
    assert torch.allclose(*empty, atol=1e-5)


def test_the_sidecar_says_how_hard_what_is_drawn_was_pushed(tiny_runs, drawn, tmp_path):
    command = ("edit", "-r", tiny_runs.diffusion, *drawn.words, "--no-pictures", "--out", tmp_path / "out")
    said = []
    for words in ((), ("--guidance", "1"), ("guidance=3",)):
        ended = run_here(*command, *words)
        assert ended.code == 0 and "there" not in ended.out, ended
        said.append(json.loads((tmp_path / "out" / "case" / "case.json").read_text())["Guidance"])
    assert said == [GUIDANCE, 1, 3]
    assert "guidance is -1.0; expected a number from 0 on" in refused(run_here(*command, "--guidance", "-1"))


# The region


def test_without_a_region_it_is_the_labels_and_a_latent_cell_around_them(model, smooth):
    scan, mask, _ = smooth
    site = model.site_of(scan, mask)
    assert model.synthesizer.codec.factor == 2
    labels = nib.load(mask).get_fdata() > 0
    spacing = nib.affines.voxel_sizes(HEAD)
    far = [np.linalg.norm((np.argwhere(labels) - place) * spacing, axis=1).min() for place in np.argwhere(site.region)]
    assert (site.region & labels).sum() == labels.sum() and 3 < max(far) <= 2 * spacing.max() + 1e-4


def test_the_latent_cells_that_the_region_touches_are_free_and_no_others(model, smooth):
    site = model.site_of(*smooth)
    known = site.known(model.synthesizer.codec)
    assert known.latents.shape[2:] == known.free.shape[2:] == (8, 8, 8)
    expected = site.free.reshape(8, 2, 8, 2, 8, 2).amax((1, 3, 5)) > 0
    assert (known.free[0, 0] == expected).all() and 0 < expected.sum() < expected.numel()
    assert site.free.sum() == site.region.sum()  # all of it is in the crop


def test_a_mask_of_two_lesions_needs_a_region(tiny_runs, drawn, tmp_path):
    command = ("edit", "-r", tiny_runs.diffusion, *drawn.words[:4], "--out", tmp_path / "out")
    assert "drawn_seg.nii.gz has 2 separate parts, and no --region says where" in refused(run_here(*command))
    write(drawn.mask, np.zeros(SHAPE, np.uint8))
    assert "drawn_seg.nii.gz is empty" in refused(run_here(*command))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("empty", r"region.nii.gz is empty; expected voxels above 0"),
        ("air", r"region.nii.gz holds the scan's background alone; expected a region of tissue"),
        ("large", "region.nii.gz spans 20×14×10 voxels on the model's grid (RAS); expected at most 12×12×12"),
        ("all", "region.nii.gz covers all of the scan; expected a part of it"),
        ("shifted", "lies off case/case_flair.nii.gz: their affines put a corner 5 mm apart; expected one grid"),
        ("cut", "have different shapes; expected one grid. Resample one onto the other"),
        ("4D", "axis 3 holds 2 volumes; expected one 3D volume"),
        ("absent", "region.nii.gz does not exist"),
    ],
)
def test_a_region_that_cannot_be_edited_is_refused_in_a_line(tiny_runs, drawn, change, line, tmp_path):
    region, affine = drawn.region_voxels, HEAD.copy()
    if change == "empty":
        region = 0 * region
    if change == "air":
        region = 0 * region
        region[:2, :2, :2] = 1
    if change == "large":
        region = 0 * region
        region[:, 3:17, 5:15] = 1
    if change == "all":
        region[:] = 1
        for name in MODALITIES:
            write(drawn.scan / f"case_{name}.nii.gz", np.random.default_rng(0).random(SHAPE).astype("f4"))
    if change == "shifted":
        affine[0, 3] += 5
    if change == "cut":
        region = region[1:]
    if change == "4D":
        region = np.stack([region, region], -1)
    nib.save(nib.Nifti1Image(region, affine), drawn.region)
    if change == "absent":
        drawn.region.unlink()
    ended = run_here("edit", "-r", tiny_runs.diffusion, *drawn.words, "--out", tmp_path / "out")
    assert line in refused(ended) and not (tmp_path / "out").exists()


def test_masks_and_numbers_are_checked_as_in_sampling(tiny_runs, drawn):
    command = ("edit", "--model", tiny_runs.diffusion, "--out", drawn.scan.parent / "out", *drawn.words)
    assert "0 volumes from seed 0; expected at least 1" in refused(run_here(*command, "-n", "0"))
    drawn.mask_voxels[drawn.middle] = 3
    write(drawn.mask, drawn.mask_voxels)
    assert "drawn_seg.nii.gz has labels {3}; this model knows {0, 1, 2, 4}" in refused(run_here(*command))
    assert run_here(*command, "--label-map", "3:4", "--out", drawn.scan.parent / "mapped").code == 0
    seg = np.asarray(nib.load(drawn.scan.parent / "mapped" / "case" / "case_seg.nii.gz").dataobj)
    assert seg[drawn.middle] == 4


def test_a_mask_that_the_region_cuts_or_misses_is_told(tiny_runs, drawn):
    command = ("edit", "--model", tiny_runs.diffusion, *drawn.words, "--out", drawn.scan.parent / "out")
    assert "crosses the region's border" not in run_here(*command).err
    x, y, z = drawn.middle
    drawn.mask_voxels[x : x + 5, y, z] = 2  # one voxel further than the region
    write(drawn.mask, drawn.mask_voxels)
    assert "drawn_seg.nii.gz: a label crosses the region's border; 26.1 mm³ of it lie outside" in run_here(*command).err
    write(drawn.mask, np.where(drawn.region_voxels, 0, drawn.mask_voxels))
    assert "drawn_seg.nii.gz holds no label in the region" in run_here(*command).err


def test_a_model_without_masks_is_refused(model, drawn):
    other = replace(model, synthesizer=replace(model.synthesizer, condition=NoCondition()))
    with pytest.raises(InputError, match="is an unconditional model"):
        other.edit(drawn.scan, drawn.mask, drawn.region)
