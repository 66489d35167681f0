"""A sample's pictures: the same whatever way the file is stored, and a sweep through all slices."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageColor

from latdiff3d.figures import LABEL_COLOURS
from latdiff3d.pictures import CAPTION_PIXELS, sweep, write_pictures


@pytest.fixture
def sample():
    """A volume of two channels, its mask and their affine, RAS."""
    volume = np.random.default_rng(0).random((2, 12, 14, 10)).astype(np.float32)
    mask = np.zeros((12, 14, 10), np.uint8)
    mask[2:6, 3:8, 6:9] = 4
    return volume, mask, np.diag([1.0, 1.0, 2.0, 1.0])


def reoriented(volume, affine, axes):
    there = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    images = [nib.Nifti1Image(channel, affine).as_reoriented(there) for channel in volume]
    return np.stack([np.asarray(image.dataobj) for image in images]), images[0].affine


@pytest.mark.parametrize("axes", ["LPS", "PIL"])
def test_pictures_are_the_same_whatever_way_the_file_is_stored(sample, axes, tmp_path):
    volume, mask, affine = sample
    turned, turned_affine = reoriented([*volume, mask], affine, axes)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = write_pictures(tmp_path / "a", "case", volume, affine, mask, ["t1", "t2"], gif=True)
    other = write_pictures(
        tmp_path / "b", "case", turned[:2], turned_affine, turned[2].astype(int), ["t1", "t2"], gif=True
    )
    assert [path.name for path in one] == ["case.png", "case.gif"]
    for path, same in zip(one, other, strict=True):
        assert path.read_bytes() == same.read_bytes()


def test_each_picture_can_be_left_out(sample, tmp_path):
    volume, mask, affine = sample
    assert write_pictures(tmp_path, "case", volume, affine, mask, ["t1", "t2"], picture=False) == []
    assert not list(tmp_path.iterdir())


def test_a_sweep_shows_every_slice_in_turn_and_the_mask_where_it_is(sample, tmp_path):
    _, mask, _ = sample
    volume = np.broadcast_to(np.linspace(0, 1, 10), (2, 12, 14, 10))
    gif = Image.open(sweep(tmp_path / "s.gif", volume, mask, (1.0, 1.0, 2.0)))
    assert gif.n_frames == 10
    colour = np.array(ImageColor.getrgb(LABEL_COLOURS[0]))
    for index in range(10):
        gif.seek(index)
        frame = np.asarray(gif.convert("RGB")).astype(int)[CAPTION_PIXELS:]  # without the caption
        assert frame.shape == (14 * 13, 2 * 12 * 13, 3)
        assert abs(frame[2, 2, 0] - 255 * index / 9) < 2
        outlined = (np.abs(frame - colour) < 3).all(2)
        assert outlined.any() == (6 <= index < 9)
        if outlined.any():  # rows from the front, columns from the patient's right
            rows, columns = np.nonzero(outlined[:, : 12 * 13])
            assert (rows.min(), rows.max() + 1) == (6 * 13, 11 * 13)
            assert (columns.min(), columns.max() + 1) == (6 * 13, 10 * 13)


def test_a_sweeps_pixels_are_square_whatever_the_voxels_are(tmp_path):
    volume = np.random.default_rng(0).random((1, 10, 10, 3))
    gif = Image.open(sweep(tmp_path / "s.gif", volume, None, (1.0, 2.5, 9.0)))
    assert gif.size[1] - CAPTION_PIXELS == pytest.approx(2.5 * gif.size[0], abs=2)
