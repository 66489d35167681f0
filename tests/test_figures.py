"""Pictures: orientation, that planes pass through the lesion, and that files come out without touching the backend."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from latdiff3d.figures import (
    SMALLEST_WIDTH,
    ContactRow,
    _aspect,
    _lesion_centre,
    contact_sheet,
    cut_plane,
    overlay,
    slices_preview,
)


def _row(shape=(10, 12, 8), name="case_1", lesion=True, spacing_mm=(1.0, 1.0, 2.0)) -> ContactRow:
    volume = np.random.default_rng(0).random(shape)
    mask = np.zeros(shape, np.uint8)
    if lesion:
        mask[2:5, 3:6, 2:5] = 2
        mask[3, 4, 3] = 1
    return ContactRow(name, volume, volume, mask, volume, spacing_mm, "flair")


def test_planes_are_shown_as_radiologists_see_them():
    """Axis 0 grows to the right, 1 to the front, 2 up: mark one end of each."""
    volume = np.zeros((5, 6, 7))
    volume[-1, :, :] = 1  # the patient's right
    assert cut_plane(volume, 0, 3)[:, 0].all() and cut_plane(volume, 1, 3)[:, 0].all()
    volume = np.zeros((5, 6, 7))
    volume[:, -1, :] = 1  # the front
    assert cut_plane(volume, 0, 3)[0].all() and cut_plane(volume, 2, 3)[:, 0].all()
    volume = np.zeros((5, 6, 7))
    volume[:, :, -1] = 1  # up
    assert cut_plane(volume, 1, 3)[0].all() and cut_plane(volume, 2, 3)[0].all()


def test_pixels_have_the_voxels_aspect():
    assert [_aspect((1.0, 2.0, 6.0), plane) for plane in range(3)] == [2.0, 6.0, 3.0]


def test_planes_pass_through_the_largest_lesion():
    mask = np.zeros((20, 20, 20), int)
    mask[2:7, 3:8, 10:15] = 4
    mask[18, 18, 18] = 4
    assert _lesion_centre(mask) == (4, 5, 12)
    assert _lesion_centre(0 * mask) == (10, 10, 10)


def test_a_contact_sheet_is_written_and_the_backend_left_alone(tmp_path):
    backend = matplotlib.rcParams._get("backend")
    path = contact_sheet(tmp_path / "sheet.png", [_row(), _row((9, 9, 9), "case_2", lesion=False)], dpi=40)
    assert matplotlib.rcParams._get("backend") == backend
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] > picture.shape[0] > 80
    coloured = np.ptp(picture, axis=2) > 60
    half = picture.shape[1] // 2
    body = slice(int(0.2 * picture.shape[0]), int(0.8 * picture.shape[0]))
    assert not coloured[body, :half].any()  # real and reconstruction are grey
    assert coloured[body, half:].any()


def test_an_overlay_shows_each_channel_plain_and_with_the_outline(tmp_path):
    row, volume = _row(), np.full((2, 10, 12, 8), 0.5)
    path = overlay(tmp_path / "o.png", volume, row.mask, ["t1", "t2"], (1.0, 1.0, 2.0), "SYNTHETIC")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    body = picture[int(0.2 * len(picture)) : int(0.8 * len(picture))]
    coloured, half = np.ptp(body, axis=2) > 60, picture.shape[1] // 2
    assert not coloured[:, :half].any() and coloured[:, half:].any()
    grey = (np.abs(body - 128) < 3).all(2)
    assert grey[:, :half].mean() > 0.4 and grey[:, half:].mean() > 0.4
    alone = overlay(tmp_path / "n.png", volume[:1], None, ["t1"], (1.0, 1.0, 2.0), "SYNTHETIC")
    smaller = np.asarray(Image.open(alone).convert("RGB")).astype(int)
    assert smaller.shape[1] == 100 * SMALLEST_WIDTH < picture.shape[1] and not (np.ptp(smaller, axis=2) > 60).any()


def test_an_overlay_passes_through_the_mask(tmp_path):
    """The mask's plane alone is bright, far from the middle."""
    mask, volume = np.zeros((20, 20, 20), np.uint8), np.zeros((1, 20, 20, 20))
    mask[3, 4, 16] = 1
    volume[0, :, :, 16] = 1
    shown = []
    for at, labels in enumerate((mask, 0 * mask)):
        path = overlay(tmp_path / f"{at}.png", volume, labels, ["t1"], (1.0, 1.0, 1.0), "")
        shown.append((np.asarray(Image.open(path).convert("L")) == 255).mean())
    assert shown[0] > 0.15 and shown[1] < 0.05


def test_an_overlay_refuses_a_mask_of_another_grid(tmp_path):
    with pytest.raises(ValueError, match="a mask of"):
        overlay(tmp_path / "o.png", np.zeros((1, 4, 4, 4)), np.zeros((4, 4, 5)), ["t1"], (1.0, 1.0, 1.0), "")
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_shows_the_window(tmp_path):
    grey_volume = np.full((8, 8, 8), 0.5)
    flat = ContactRow("flat", grey_volume, grey_volume, np.zeros((8, 8, 8), int), grey_volume)
    for window, grey in (((0.0, 1.0), 128), ((0.0, 0.5), 255), ((0.5, 1.0), 0)):
        picture = np.asarray(Image.open(contact_sheet(tmp_path / "w.png", [flat], window=window, dpi=40)).convert("L"))
        counts = np.bincount(picture.ravel(), minlength=256)
        assert counts[max(grey - 1, 0) : grey + 2].sum() > 0.4 * picture.size


def test_a_contact_sheet_refuses_arrays_of_different_shapes(tmp_path):
    good = _row()
    wrong = ContactRow("case_9", good.real, good.real, good.mask[:-1], good.real)
    with pytest.raises(ValueError, match="case_9"):
        contact_sheet(tmp_path / "sheet.png", [wrong])
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet(tmp_path / "sheet.png", [])
    assert not list(tmp_path.iterdir())


def test_a_preview_puts_real_above_reconstruction(tmp_path):
    real, reconstruction = np.ones((2, 40, 40, 40)), np.full((2, 40, 40, 40), -3.0)
    path = slices_preview(tmp_path / "preview.png", [real, reconstruction], ["real", "reconstruction"])
    picture = np.asarray(Image.open(path))
    middle = picture.shape[0] // 2
    assert picture[:middle].mean() > 150 and picture[middle:].max() <= 232  # white above; text alone is bright below
    assert (picture[middle:] == 0).mean() > 0.5
    assert picture.shape[1] > 2 * 3 * 40 * 3


def test_a_preview_takes_images_of_different_sizes(tmp_path):
    images = [np.zeros((1, 10, 12, 14)), np.zeros((4, 6, 6, 6))]
    assert slices_preview(tmp_path / "preview.png", images, ["a", "b"]).exists()
    with pytest.raises(ValueError, match="2 images and 1 names"):
        slices_preview(tmp_path / "preview.png", images, ["a"])
