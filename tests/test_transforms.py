"""From files to what the networks see."""

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, SpatialPadd

from latdiff3d import config
from latdiff3d.crop_windows import check_divisible
from latdiff3d.datalist import read_cases
from latdiff3d.errors import InputError, root_input_error
from latdiff3d.transforms import (
    CheckVolumed,
    CoarseMaskd,
    ForegroundCropd,
    LoadVolumed,
    MarkValidd,
    RandForegroundCropd,
    ScaleForegroundd,
    foreground_range,
)

RAMP = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0, 3, -20], [0, 1, 0, 5], [0, 0, 0, 1]])


def scale(channel, **percentiles):
    return ScaleForegroundd("image", **percentiles)({"image": MetaTensor(torch.as_tensor(channel)[None])})["image"]


# LoadVolumed


def test_modalities_become_channels_in_their_order(tmp_path, write_brats_case):
    write_brats_case(tmp_path, "case_1")
    [case] = read_cases(tmp_path, modalities=("t2", "flair"))
    data = LoadVolumed()(case)
    assert data["image"].shape == (2, 4, 5, 6) and data["mask"].shape == (1, 4, 5, 6)
    assert torch.equal(data["image"].as_tensor()[:, 0, 0, 0], torch.tensor([3.0, 0.0]))
    assert data["image"].meta["channel_files"] == ["case_1/case_1_t2.nii.gz", "case_1/case_1_flair.nii.gz"]
    assert data["case"] == "case_1"


def test_monais_channel_first_after_it_changes_nothing(tmp_path, write_volume):
    voxels = np.arange(360, dtype=np.int16).reshape(4, 5, 6, 3)
    data = LoadVolumed("image")({"image": [write_volume(tmp_path / "a.nii.gz", voxels, AFFINE)]})
    again = EnsureChannelFirstd("image")(data)
    assert again["image"].shape == (3, 4, 5, 6)
    assert np.array_equal(again["image"].numpy(), voxels.transpose(3, 0, 1, 2))
    assert np.allclose(again["image"].affine, AFFINE)


def test_a_landmark_keeps_its_world_coordinates_through_monais_orientation(tmp_path, write_volume):
    voxels = np.zeros((4, 5, 6), np.float32)
    voxels[1, 2, 3] = 1
    data = LoadVolumed("image")({"image": write_volume(tmp_path / "a.nii.gz", voxels, AFFINE)})
    turned = Orientationd("image", axcodes="RAS", labels=None)(data)["image"]
    place = torch.tensor([*turned.as_tensor()[0].nonzero()[0].tolist(), 1], dtype=torch.float64)
    assert torch.allclose(turned.affine @ place, torch.from_numpy(AFFINE @ np.array([1.0, 2, 3, 1])))


def test_a_truncated_file_is_an_input_error_under_compose(tmp_path, write_volume):
    path = write_volume(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 16)))
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError) as error:
        Compose([LoadVolumed("image")])({"image": [path]})
    message = str(root_input_error(error.value))
    assert message.startswith(f"{path} is truncated or damaged: ") and message.endswith("Download or copy it again.")


def test_modalities_on_different_grids_are_not_stacked(tmp_path, write_volume):
    paths = [write_volume(tmp_path / "a.nii.gz"), write_volume(tmp_path / "b.nii.gz", RAMP[:3])]
    with pytest.raises(InputError, match=r"b.nii.gz \(3×5×6\) and .*a.nii.gz \(4×5×6\) have different shapes"):
        LoadVolumed("image")({"image": paths})
    paths[1] = write_volume(tmp_path / "b.nii.gz", affine=AFFINE)
    with pytest.raises(InputError, match=r"b.nii.gz lies off"):
        LoadVolumed("image")({"image": paths})


def test_a_case_without_an_image_loads_where_allowed(tmp_path, write_volume):
    data = {"mask": write_volume(tmp_path / "a.nii.gz")}
    assert LoadVolumed(allow_missing_keys=True)(data)["mask"].shape == (1, 4, 5, 6)
    with pytest.raises(KeyError, match="image"):
        LoadVolumed()(data)


def test_a_batch_of_loaded_cases_collates(tmp_path, write_brats_case):
    for name in ("case_1", "case_2"):
        write_brats_case(tmp_path, name)
    steps = Compose(
        [LoadVolumed(), CheckVolumed(labels=[0, 1], num_channels=4), ScaleForegroundd("image"), MarkValidd()]
    )
    [batch] = DataLoader(Dataset(read_cases(tmp_path), steps), batch_size=2)
    assert batch["image"].shape == (2, 4, 4, 5, 6) and batch["valid"].shape == (2, 1, 4, 5, 6)
    assert isinstance(batch["image"], MetaTensor) and batch["case"] == ["case_1", "case_2"]


# CheckVolumed


def loaded(image=RAMP[None], mask=None):
    mask = np.zeros((1, 4, 5, 6), np.float32) if mask is None else mask
    return {"image": MetaTensor(torch.from_numpy(image), meta={"filename_or_obj": "d/a.nii.gz"}), "mask": mask}


def test_a_sound_case_passes_unchanged():
    data = loaded()
    assert CheckVolumed(labels=[0])(data) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loaded(np.full((1, 4, 5, 6), np.nan, np.float32)), "d/a.nii.gz has 120 NaN of 120 voxels"),
        (loaded(np.zeros((1, 4, 5, 6), np.float32)), "d/a.nii.gz is 0 in every voxel"),
        (loaded(np.stack([RAMP, RAMP])), r"the image has 2 channel\(s\); expected 1"),
        (loaded(mask=np.full((1, 4, 5, 6), 2)), r"mask has labels \{2\}; this configuration knows \{0, 1\}"),
        (loaded(mask=np.zeros((2, 4, 5, 6))), "the mask has 2 channels; expected one label map"),
        (loaded(mask=np.zeros((1, 4, 5, 5))), r"mask has the shape \(4, 5, 5\), d/a.nii.gz \(4, 5, 6\)"),
    ],
)
def test_an_unsound_case_is_refused_with_one_line(data, message):
    with pytest.raises(InputError, match=message):
        CheckVolumed(labels=[0, 1])(data)


def test_a_mask_alone_is_checked_where_allowed():
    data = {"mask": np.full((1, 4, 5, 6), 2)}
    with pytest.raises(InputError, match=r"labels \{2\}"):
        CheckVolumed(labels=[0, 1], allow_missing_keys=True)(data)
    with pytest.raises(KeyError, match="image"):
        CheckVolumed(labels=[0, 2])(data)


# ScaleForegroundd


def brain(dtype=np.float32):
    """Return 10 × 10 × 10 voxels, 0 outside, and inside the values −10 … 90 of which 0 is one."""
    volume = np.zeros((10, 10, 10), dtype)
    volume[:1] = np.delete(np.arange(-10, 91), 10).reshape(1, 10, 10)
    return volume


def test_negative_values_in_a_brain_are_foreground_and_its_surroundings_are_zero():
    scaled = scale(brain(), upper=100)[0].numpy()
    assert scaled[0, 0, 0] == 0 and scaled[0, -1, -1] == 1
    assert np.all(scaled[1:] == 0)
    assert scaled[0, 0, 1] == pytest.approx(0.01)  # −9, far below the background's 0


def test_the_percentiles_are_of_the_foreground_and_clip():
    background, low, high = foreground_range(brain(), 5, 95)
    inside = np.delete(np.arange(-10, 91), 10)
    assert background == 0 and (low, high) == tuple(np.percentile(inside, (5, 95)))
    scaled = scale(brain(), lower=5, upper=95)
    assert scaled.min() == 0 and scaled.max() == 1
    assert (scaled == 1).sum() == 5


def test_a_background_below_or_above_zero_is_found():
    volume = brain() * 0 - 1024
    volume[0] = np.arange(100).reshape(10, 10)
    scaled = scale(volume, upper=100)[0]
    assert torch.all(scaled[1:] == 0) and scaled[0, 0, 0] == 0 and scaled[0, -1, -1] == 1
    assert foreground_range(brain() + 500, 0, 100)[0] == 500


def test_without_a_constant_background_every_voxel_counts():
    volume = np.arange(1000.0).reshape(10, 10, 10)
    volume[0, 0] = 5  # eleven in a thousand: no background
    assert foreground_range(volume, 0, 100) == (None, 5, 999)


def test_a_tenth_of_the_voxels_is_enough_for_a_background():
    volume = np.arange(1000.0).reshape(10, 10, 10)
    volume[0] = -1
    assert foreground_range(volume, 0, 100) == (-1, 100, 999)
    volume[0, 0, 0] = -2
    assert foreground_range(volume, 0, 100) == (None, -2, 999)


@pytest.mark.parametrize("maximum", [4, 1.7e6])
def test_the_scale_of_the_intensities_does_not_matter(maximum):
    volume = brain() / 90
    assert torch.allclose(scale(volume * maximum), scale(volume), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float64])
def test_integers_and_doubles_give_what_floats_give(dtype):
    scaled = scale(brain(dtype))
    assert scaled.dtype == torch.float32 and torch.equal(scaled, scale(brain()))


def test_channels_are_scaled_apart_and_keep_their_metadata():
    image = MetaTensor(torch.from_numpy(np.stack([brain(), 100 * brain() + 7])), affine=torch.from_numpy(AFFINE))
    scaled = ScaleForegroundd("image")({"image": image})["image"]
    assert torch.allclose(scaled[0], scaled[1], atol=1e-6)
    assert torch.equal(scaled.affine, image.affine)
    assert image.max() == 9007  # the input is left as it was


def test_an_image_without_contrast_is_refused_by_name():
    volume = np.zeros((4, 5, 6), np.float32)
    volume[0] = 3
    image = MetaTensor(torch.from_numpy(volume)[None], meta={"filename_or_obj": "d/a.nii.gz"})
    with pytest.raises(InputError, match=r"d/a.nii.gz: the percentiles 0 and 99.5 of its foreground are both 3"):
        ScaleForegroundd("image")({"image": image})
    with pytest.raises(InputError, match="are both 0"):
        scale(volume * 0)


def test_percentiles_out_of_order_are_refused():
    with pytest.raises(InputError, match="lower 99 and upper 1 are no percentiles"):
        ScaleForegroundd("image", lower=99, upper=1)


# ForegroundCropd, RandForegroundCropd

SIZE = (20, 22, 24)
KEYS = ("image", "mask", "valid")
BOTH_CROPS = pytest.mark.parametrize("kind", [ForegroundCropd, RandForegroundCropd])


def box(*sides, size=SIZE):
    """Return an image of two channels, above 0 inside the box only, a mask that numbers the voxels, and `valid`."""
    image = torch.zeros((2, *size))
    image[0][tuple(slice(*side) for side in sides)] = 0.5
    # One corner of the box is above 0 in the other channel only: foreground is what is above 0 in any.
    corner = tuple(side[1] - 1 for side in sides)
    image[0][corner], image[1][corner] = 0, 0.5
    places = torch.arange(image[0].numel(), dtype=torch.float32).reshape(1, *size)
    affine = torch.from_numpy(AFFINE)
    return {key: MetaTensor(value, affine=affine) for key, value in zip(KEYS, (image, places, places + 1), strict=True)}


def start_of(data, size=SIZE):
    """Return where the window began, by the number of its first voxel."""
    return tuple(int(place) for place in np.unravel_index(int(data["mask"][0, 0, 0, 0]), size))


def draws(data, roi, seed=0, count=20, kind=RandForegroundCropd):
    crop = kind(KEYS, "image", roi)
    if kind is RandForegroundCropd:
        crop.set_random_state(seed)
    return [crop(data) for _ in range(count)]


@BOTH_CROPS
def test_the_window_holds_all_of_a_foreground_smaller_than_it(kind):
    data = box((5, 9), (8, 14), (10, 13))
    for cut in draws(data, (12, 12, 12), kind=kind):
        assert cut["image"].shape == (2, 12, 12, 12)
        assert (cut["image"] > 0).sum() == 4 * 6 * 3


@BOTH_CROPS
def test_the_window_lies_inside_a_foreground_larger_than_it(kind):
    data = box((1, 19), (2, 22), (0, 23))
    for cut in draws(data, (8, 8, 16), kind=kind):
        assert (cut["image"] > 0).any(0).all()


@BOTH_CROPS
def test_each_axis_is_held_or_filled_by_itself(kind):
    data = box((2, 18), (9, 12), (4, 12))  # larger than, smaller than and as large as the window
    for cut in draws(data, (8, 8, 8), kind=kind):
        foreground = (cut["image"] > 0).any(0)
        assert foreground.any(2).any(1).all() and foreground.sum() == 8 * 3 * 8
        assert start_of(cut)[2] == 4


def test_random_windows_differ_between_draws_and_are_the_same_from_the_same_seed():
    data = box((5, 9), (1, 21), (10, 13))
    one, again, other = ([start_of(cut) for cut in draws(data, (8, 8, 8), seed)] for seed in (3, 3, 4))
    assert one == again != other
    assert all(len({start[axis] for start in one}) > 2 for axis in range(3))


def test_random_windows_reach_both_ends_of_their_range():
    starts = np.array([start_of(cut) for cut in draws(box((6, 10), (2, 20), (8, 16)), (8, 8, 8), count=200)])
    assert starts.min(0).tolist() == [2, 2, 8] and starts.max(0).tolist() == [6, 12, 8]


@BOTH_CROPS
def test_image_mask_and_valid_are_cut_alike(kind):
    data = box((5, 9), (1, 21), (10, 13))
    for cut in draws(data, (8, 8, 8), kind=kind, count=5):
        assert torch.equal(cut["mask"] + 1, cut["valid"])
        where = tuple(slice(first, first + 8) for first in start_of(cut))
        for key in KEYS:
            assert torch.equal(cut[key].as_tensor(), data[key].as_tensor()[(slice(None), *where)])
            assert torch.equal(cut[key].affine, cut["image"].affine)
        moved = cut["image"].affine[:3, 3]
        assert np.allclose(moved, (AFFINE @ np.array([*start_of(cut), 1]))[:3])


@BOTH_CROPS
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_foreground_in_a_corner_is_cut_inside_the_volume(kind, at_the_end):
    sides = [(size - 3, size) if at_the_end else (0, 3) for size in SIZE]
    for cut in draws(box(*sides), (12, 12, 12), kind=kind):
        assert (cut["image"] > 0).sum() == 27
        assert start_of(cut) == (tuple(size - 12 for size in SIZE) if at_the_end else (0, 0, 0))


@pytest.mark.parametrize(
    ("side", "length", "start"),
    [((8, 12), 8, 6), ((2, 18), 8, 6), ((0, 4), 16, 0), ((3, 7), 16, 0), ((13, 17), 16, 4), ((7, 11), 16, 1)],
)
def test_the_middle_window_is_moved_from_the_foregrounds_middle_by_the_volumes_end_alone(side, length, start):
    data = box(side, (8, 12), (8, 12), size=(20, 20, 20))
    cut = ForegroundCropd(KEYS, "image", (length, 8, 8))(data)
    assert start_of(cut, (20, 20, 20)) == (start, 6, 6)


@BOTH_CROPS
def test_a_window_as_large_as_the_volume_is_the_volume(kind):
    data = box((5, 9), (1, 21), (10, 13))
    assert torch.equal(draws(data, SIZE, count=1, kind=kind)[0]["image"], data["image"])


@BOTH_CROPS
def test_a_volume_smaller_than_the_window_must_be_padded_first(kind):
    with pytest.raises(ValueError, match=r"the volume is \[20, 22, 24\]; pad it to at least \[16, 23, 24\] first"):
        kind(KEYS, "image", (16, 23, 24))(box((5, 9), (1, 21), (10, 13)))


@BOTH_CROPS
def test_a_case_without_a_mask_is_cut_where_allowed(kind):
    data = {"image": box((5, 9), (1, 21), (10, 13))["image"]}
    assert kind(KEYS, "image", (8, 8, 8), allow_missing_keys=True)(data)["image"].shape == (2, 8, 8, 8)
    with pytest.raises(KeyError, match="mask"):
        kind(KEYS, "image", (8, 8, 8))(data)


# The bundle's own chain


def chain(stage, split, **settings):
    """Return the transforms of the bundle's training or validation set."""
    parser = ConfigParser(config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage)))
    for key, value in settings.items():
        parser[key] = value
    return parser.get_parsed_content(f"{split}::preprocessing")


EVERY_SET = pytest.mark.parametrize(
    ("stage", "split"), [(stage, split) for stage in config.STAGE_FILES for split in ("train", "validate")]
)


@EVERY_SET
def test_a_brain_smaller_than_the_crop_keeps_its_real_surroundings(tmp_path, write_brats_case, stage, split):
    # The brain fills its bounding box: cropped to it first, padding by the edge would smear it over the crop.
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[6:14, 5:15, 6:14] = np.random.default_rng(0).uniform(100, 200, (8, 10, 8))
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[8:12, 8:12, 8:12] = 1
    write_brats_case(tmp_path, "case_1", flair=voxels, t1=voxels, t1ce=voxels, t2=voxels, seg=mask)
    transform = chain(stage, split, crop_to=[16, 16, 16])
    [case] = read_cases(tmp_path)
    for _ in range(5):
        data = transform(case)
        assert all(data[key].shape[1:] == (16, 16, 16) for key in KEYS)
        assert (data["image"] > 0).any(0).sum() == pytest.approx(8 * 10 * 8, abs=1)  # its darkest voxel is mapped to 0
        assert (data["mask"] > 0).sum() == 64
        assert data["valid"].all()


@EVERY_SET
def test_where_a_volume_ends_its_edge_is_repeated_and_not_valid(tmp_path, write_brats_case, stage, split):
    voxels = np.random.default_rng(0).uniform(100, 200, (12, 16, 16)).astype(np.float32)
    mask = np.ones((12, 16, 16), np.uint8)
    write_brats_case(tmp_path, "case_1", flair=voxels, t1=voxels, t1ce=voxels, t2=voxels, seg=mask)
    [case] = read_cases(tmp_path)
    data = chain(stage, split, crop_to=[16, 16, 16])(case)
    assert data["valid"].sum() == (data["mask"] > 0).sum() == 12 * 16 * 16
    assert data["valid"][0, 2:14].all() and data["mask"][0, 2:14].all()
    image = data["image"].as_tensor()
    for place, edge in ((0, 2), (1, 2), (14, 13), (15, 13)):
        assert torch.equal(image[:, place], image[:, edge])


# MarkValidd, CoarseMaskd, check_divisible


def test_padding_is_not_valid():
    image = MetaTensor(torch.from_numpy(RAMP)[None].repeat(2, 1, 1, 1), affine=torch.from_numpy(AFFINE))
    data = Compose([MarkValidd(), SpatialPadd(["image", "valid"], (8, 8, 8))])({"image": image})
    assert data["valid"].shape == (1, 8, 8, 8) and data["valid"].dtype == torch.float32
    assert data["valid"].sum() == 120
    assert torch.equal(data["valid"].affine, data["image"].affine)
    assert data["image"][0, 2, 1, 1] == 0 == RAMP[0, 0, 0] and data["valid"][0, 2, 1, 1] == 1  # valid, though 0


def test_coarse_merges_labels_and_fine_keeps_them():
    mask = MetaTensor(torch.tensor([[[[0.0, 1.0, 4.0]]]]), affine=torch.from_numpy(AFFINE))
    coarse = CoarseMaskd("mask", "coarse")({"mask": mask})["mask"]
    assert coarse.flatten().tolist() == [0, 1, 1] and coarse.dtype == torch.float32
    assert torch.equal(coarse.affine, mask.affine)
    assert torch.equal(CoarseMaskd("mask", "fine")({"mask": mask})["mask"], mask)
    with pytest.raises(InputError, match="mask mode 'rough' is unknown; expected fine or coarse"):
        CoarseMaskd("mask", "rough")


def test_an_indivisible_crop_names_the_nearest_that_is():
    check_divisible([64, 32, 16], 16, "")
    with pytest.raises(InputError) as error:
        check_divisible([60, 64, 64], 16, "the autoencoder's 4 × the U-Net's 4")
    assert str(error.value) == (
        "crop_to [60, 64, 64] is not divisible by 16 (the autoencoder's 4 × the U-Net's 4); "
        "the nearest that is: [64, 64, 64]."
    )
    with pytest.raises(InputError, match=r"nearest that is: \[16, 32, 16\]"):
        check_divisible([0, 39, 23], 16, "")


# Real volumes


def test_a_real_hippocampus_is_ready_for_the_networks(real_data):
    cases = read_cases(real_data / "Task04_Hippocampus")
    steps = Compose([LoadVolumed(), CheckVolumed(labels=[0, 1, 2]), ScaleForegroundd("image"), MarkValidd()])
    for case in (cases[0], cases[1], cases[-1]):
        data = steps(case)
        assert data["image"].min() == 0 and data["image"].max() == 1
        assert data["image"].shape == data["valid"].shape == data["mask"].shape


def test_a_real_brain_keeps_its_negative_voxels_apart_from_its_surroundings(real_data):
    [case, _] = read_cases(real_data / "open_ms_brats_layout", modalities=["t2"])
    image = LoadVolumed("image")(case)["image"]
    scaled = ScaleForegroundd("image")({"image": image})["image"]
    assert torch.all(scaled[image == 0] == 0)
    assert scaled[(image < 0) & (image > image.min())].min() > 0
