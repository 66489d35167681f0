"""DICOM segmentations, written by highdicom: labels at their places in the world, and one line where there are none."""

import sys

import nibabel as nib
import numpy as np
import pytest

from latdiff3d.errors import InputError
from latdiff3d.readers import read_header, read_volume
from latdiff3d.volumes import case_name, read_mask

SPACING_MM = (2.0, 0.5, 0.75)  # between slices, rows, columns
SHAPE = (6, 8, 10)
ORIGIN_LPS = (-20.0, 35.0, 12.5)


@pytest.fixture
def highdicom():
    return pytest.importorskip("highdicom")


def series():
    """A CT of SHAPE, whose rows run along x and whose columns along y, first slice at ORIGIN_LPS."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study, serie, frame = generate_uid(), generate_uid(), generate_uid()
    slices = []
    for number in range(SHAPE[0]):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID, image.SOPInstanceUID, image.Modality = CTImageStorage, generate_uid(), "CT"
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, serie, frame
        image.SeriesNumber, image.InstanceNumber = 1, number + 1
        for keyword in (
            "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
            "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator",
        ):  # fmt: skip
            setattr(image, keyword, "")
        image.Rows, image.Columns = SHAPE[1:]
        image.PixelSpacing, image.SliceThickness = list(SPACING_MM[1:]), SPACING_MM[0]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [*ORIGIN_LPS[:2], ORIGIN_LPS[2] + number * SPACING_MM[0]]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.PixelData = np.zeros(SHAPE[1:], np.uint16).tobytes()
        slices.append(image)
    return slices


def write_segmentation(highdicom, path, segments, kind="BINARY"):
    """Write boolean or fractional `segments` (D, H, W, N) as segments 1 … N."""
    from pydicom.sr.codedict import codes

    described = [
        highdicom.seg.SegmentDescription(
            number + 1, f"part {number + 1}", codes.SCT.Tissue, codes.SCT.Tissue,
            highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in range(segments.shape[-1])
    ]  # fmt: skip
    highdicom.seg.Segmentation(
        series(), segments, kind, described, highdicom.UID(), 2, highdicom.UID(), 1, "maker", "model", "1", "0"
    ).save_as(path)
    return str(path)


def two_segments():
    segments = np.zeros((*SHAPE, 2), np.uint8)
    segments[1:3, 2:5, 3:7, 0] = 1
    segments[4, 6, 8, 1] = 1
    return segments


def test_a_segmentation_is_a_label_map_where_its_frames_lie(highdicom, tmp_path):
    path = write_segmentation(highdicom, tmp_path / "a.dcm", two_segments())
    mask = read_volume(path)
    labels = mask[0].numpy()
    assert np.unique(labels).tolist() == [0, 1, 2]
    assert [(labels == k).sum() for k in (1, 2)] == [24, 1]
    landmark = nib.affines.apply_affine(np.asarray(mask.affine), np.argwhere(labels == 2)[0])
    lps = np.array(ORIGIN_LPS) + (8 * SPACING_MM[2], 6 * SPACING_MM[1], 4 * SPACING_MM[0])
    assert np.allclose(landmark, lps * (-1, -1, 1), atol=0.01)
    header = read_header(path)
    assert header.shape == labels.shape and header.stores_integers
    assert np.allclose(header.affine, np.asarray(mask.affine))
    assert nib.affines.voxel_sizes(header.affine) == pytest.approx(SPACING_MM)


def test_an_empty_slice_between_others_is_kept_as_one(highdicom, tmp_path):
    segments = two_segments()  # slice 3 holds nothing, and is left out of the file
    labels, affine = read_mask(write_segmentation(highdicom, tmp_path / "a.dcm", segments))
    slices = np.argwhere((labels > 0).any((1, 2)))[:, 0]
    assert sorted(np.diff(slices)) == [1, 2]  # from either end
    assert labels.dtype == np.uint8 and labels.shape[1:] == SHAPE[1:] and affine.shape == (4, 4)


def test_overlapping_segments_are_no_label_map(highdicom, tmp_path):
    segments = two_segments()
    segments[1, 2, 3, 1] = 1
    path = write_segmentation(highdicom, tmp_path / "a.dcm", segments)
    with pytest.raises(InputError, match=r"a\.dcm is no single label map: .+ Export it without overlaps"):
        read_volume(path)


def test_fractions_are_no_label_map(highdicom, tmp_path):
    path = write_segmentation(highdicom, tmp_path / "a.dcm", two_segments() * 0.5, "FRACTIONAL")
    with pytest.raises(InputError, match=r"a\.dcm holds fractions of its segments; expected a label map"):
        read_volume(path)


def test_another_dicom_file_is_no_segmentation(highdicom, tmp_path):
    series()[0].save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=r"a\.dcm is a DICOM file of modality CT; expected SEG, a segmentation"):
        read_volume(str(tmp_path / "a.dcm"))


@pytest.mark.parametrize("content", [b"", b"not a volume"])
def test_a_damaged_segmentation_is_one_line(highdicom, tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.dcm is truncated or damaged: .+\. Download or copy it again") as error:
        read_header(str(tmp_path / "a.dcm"))
    assert "\n" not in str(error.value)


def test_a_cut_segmentation_is_one_line(highdicom, tmp_path):
    path = write_segmentation(highdicom, tmp_path / "a.dcm", two_segments())
    whole = (tmp_path / "a.dcm").read_bytes()
    for share in (0.3, 0.6, 0.99):
        (tmp_path / "a.dcm").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"a\.dcm is (truncated|no single label map|a DICOM file of modality)"):
            read_volume(path)


def test_without_highdicom_the_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").touch()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.setitem(sys.modules, "highdicom.seg", None)
    with pytest.raises(InputError, match=r"a\.dcm is a DICOM file, and highdicom.* is not installed; pip install high"):
        read_volume(str(tmp_path / "a.dcm"))


def test_a_case_is_named_after_its_segmentation():
    assert case_name("a/x_seg.dcm") == "x"
