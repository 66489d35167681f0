"""Every finding about a mask, with its line, and none about a mask like those of training."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import refused, run_here
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Spacingd

from latdiff3d import checkpoints
from latdiff3d.conditioning import MaskCondition, PackedCondition
from latdiff3d.errors import InputError
from latdiff3d.preflight import Findings, examine, parse_label_map
from latdiff3d.synthesis import Model
from latdiff3d.training_masks import measured, summary

AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
# Of masks as `usual` makes them: 8 voxels of each label, of 27 mm³, in volumes of 16³.
TRAINED = {
    "num_cases": 4,
    "num_empty": 0,
    "size": [[16] * 3, [16] * 3],
    "spacing_mm": [[3.0] * 3, [3.0] * 3],
    "volume_mm3": [[100_000, 120_000], [216, 216], [216, 216], [216, 216]],
}


@pytest.fixture(scope="module")
def trained(tiny_runs):
    return Model.load(tiny_runs.diffusion)


@pytest.fixture
def model(trained):
    """The tiny model, as if it had been trained on masks like `usual`'s."""
    return replace(trained, training_masks=TRAINED)


def usual(shape=(16, 16, 16)):
    mask = np.zeros(shape, np.uint8)
    for number, label in enumerate((1, 2, 4)):
        mask[4:6, 4:6, 4 + 2 * number : 6 + 2 * number] = label
    return mask


@pytest.fixture
def write(tmp_path):
    def write(mask, affine=AFFINE, name="a_seg.nii.gz"):
        nib.save(nib.Nifti1Image(mask, affine), tmp_path / name)
        return tmp_path / name

    return write


def error_of(model, path):
    [error], warnings = examine(model, path)
    assert not warnings and "\n" not in error
    return error


def warning_of(model, path):
    errors, [warning] = examine(model, path)
    assert not errors and "\n" not in warning
    return warning


# Errors


def test_a_mask_like_those_of_training_has_no_findings(model, write):
    assert examine(model, write(usual())) == Findings([], [])


def test_the_models_own_training_masks_have_no_findings(trained, phantoms):
    for number in range(1, 4):
        assert examine(trained, next(phantoms.glob(f"*{number}/*_seg.nii.gz"))) == Findings([], [])


def test_a_file_that_cannot_be_read_is_an_error(model, tmp_path):
    assert "none.nii.gz does not exist" in error_of(model, tmp_path / "none.nii.gz")
    (tmp_path / "b.nrrd").write_bytes(b"not a volume")
    assert "b.nrrd is truncated or damaged" in error_of(model, tmp_path / "b.nrrd")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda mask: np.stack([mask, mask], -1), "is 4D (16×16×16×2): axis 3 holds 2 volumes; expected one 3D volume"),
        (lambda mask: mask[:, :, 4], "is 2D (16×16); expected a 3D volume"),
        (lambda mask: mask.astype(np.float32) / 2, "has 8 voxels whose labels are no integers (0.5); expected"),
        (lambda mask: np.where(mask == 4, np.nan, mask).astype(np.float32), "has 8 voxels whose labels are no int"),
        (
            lambda mask: np.where(mask == 4, 7, mask),
            "has labels {7}; this model knows {0, 1, 2, 4}. Map them, for instance with --label-map 7:4, or drop",
        ),
        (lambda mask: np.where(mask == 4, 3, mask), "BrainTumour numbers BraTS's labels otherwise: --label-map 1:2,2"),
        (lambda mask: mask * 0, "is empty: it holds no label but 0; all 4 training masks held one. Drop the case."),
    ],
    ids=["4D", "2D", "halves", "NaN", "an unknown label", "Decathlon's label", "empty"],
)
def test_what_no_volume_can_be_made_for_is_an_error(model, write, change, line):
    assert line in error_of(model, write(change(usual())))


def test_a_singular_affine_is_an_error(model, write):
    path = write(usual(), name="a.nii")
    image = nib.load(path)
    image.header.set_sform(np.diag([3.0, 3.0, 0.0, 1.0]), code=1)
    path.write_bytes(image.header.binaryblock + bytes(4) + path.read_bytes()[352:])
    assert "has a singular affine" in error_of(model, path)


# Warnings


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_whole_numbers_that_are_stored_as_floats_are_a_warning(model, tmp_path, name):
    image = sitk.GetImageFromArray(usual().transpose().astype(np.float64))
    image.SetSpacing((3, 3, 3))
    sitk.WriteImage(image, str(tmp_path / name))
    line = warning_of(model, tmp_path / name)
    assert line.endswith("stores its labels as floats; all are whole numbers, and taken as such.")


def test_a_header_that_does_not_say_how_it_lies_is_a_warning(model, tmp_path):
    image = nib.Nifti1Image(usual(), None)
    image.header.set_zooms((3, 3, 3))
    nib.save(image, tmp_path / "a.nii")
    line = warning_of(model, tmp_path / "a.nii")
    assert "does not say how it lies (qform and sform codes are 0); it is taken for LAS, and may be mirrored." in line


def test_a_header_that_contradicts_itself_is_a_warning(model, tmp_path):
    image = nib.Nifti1Image(usual(), AFFINE)
    image.set_qform(np.diag([-3.0, 3.0, 3.0, 1.0]), code=1)
    image.set_sform(AFFINE, code=1)
    nib.save(image, tmp_path / "a.nii")
    line = warning_of(model, tmp_path / "a.nii")
    assert "contradicts itself: its qform says LAS, its sform RAS; the sform is taken" in line


def test_another_spacing_than_in_training_is_a_warning(model, write):
    affine = np.diag([3.0, 3.0, 5.5, 1.0])
    line = warning_of(model, write(usual(), affine))
    assert "has voxels of 3×3×5.5 mm (RAS); this model was trained on 3×3×3 mm. Resample the mask" in line
    assert not examine(model, write(usual(), np.diag([3.1, 3.1, 3.1, 1]))).warnings


def test_an_older_checkpoint_is_held_to_its_median_spacing_alone(model, write):
    older = replace(model, training_masks=None)
    assert not examine(older, write(usual(), np.diag([3.0, 3.0, 4.0, 1.0]))).warnings
    assert "this model was trained on 3×3×3 mm" in warning_of(older, write(usual(), np.diag([3.0, 3.0, 5.5, 1.0])))
    empty = warning_of(older, write(usual() * 0))
    assert "is empty: it holds no label but 0, and whether the model was trained on such masks its checkpoint" in empty


def test_an_empty_mask_is_nothing_to_a_model_that_was_trained_on_some(model, write):
    some = replace(model, training_masks={**TRAINED, "num_empty": 1})
    assert examine(some, write(usual() * 0)) == Findings([], [])


def test_a_smaller_field_of_view_than_in_training_is_a_warning(model, write):
    line = warning_of(model, write(usual((16, 12, 16))))
    assert "has 16×12×16 voxels on the model's grid (RAS) and is padded to 16×16×16; no training volume had" in line


def test_a_part_outside_the_crop_is_a_warning_by_label(model, write):
    mask = np.zeros((16, 16, 40), np.uint8)
    mask[4:6, 4:6, 18:20] = 1
    mask[4:6, 4:6, 14:18:2] = 2
    mask[4:6, 4:6, 0:4:2] = 2
    mask[4:6, 4:6, 36:38] = 4
    errors, (second, third) = examine(model, write(mask))
    assert not errors
    assert "label 2 (432 mm³): 50.00% of it lies outside the model's crop of 16×16×16 voxels" in second
    assert "label 4 (216 mm³) lies outside the model's crop of 16×16×16 voxels, where the volume is 0." in third
    assert not any("outside" in line for line in examine(model, write(mask), crop_matters=False).warnings)


def test_a_label_that_is_lost_on_the_latent_grid_is_named_with_its_volume(model, write):
    mask = usual()
    mask[mask == 4] = 0
    mask[9:12:2, 9, 9] = 4  # 2 voxels in one cell of 64
    coarse = replace(model.synthesizer, condition=MaskCondition(4, 4))
    path = write(mask)
    lines = examine(replace(model, synthesizer=coarse), path).warnings
    said = "label 4 (54 mm³) is lost on the latent grid, whose cells are 12×12×12 mm; the volume may not show it."
    assert any(line.endswith(said) for line in lines)
    assert any(line.endswith(said) for line in examine(replace(model, synthesizer=coarse), path, False).warnings)
    assert not any("latent grid" in line for line in examine(model, path).warnings)  # whose cells hold 8 voxels
    packed = replace(model.synthesizer, condition=PackedCondition(4, 4))  # which keeps every voxel
    assert not any("latent grid" in line for line in examine(replace(model, synthesizer=packed), path).warnings)


def resampling_to(model, spacing_mm):
    """The model as if its configuration said `spacing`."""
    spacing = Spacingd("mask", spacing_mm, mode="nearest", allow_missing_keys=True)
    transforms = list(model.preprocessing.transforms)
    config = ConfigParser({**model.config.get(), "spacing": spacing_mm})
    return replace(
        model,
        config=config,
        spacing_mm=spacing_mm,
        preprocessing=Compose([*transforms[:3], spacing, *transforms[3:]]),
        training_masks=None,
    )


def test_a_label_that_resampling_loses_is_named_with_its_volume(model, write):
    mask = usual((30, 30, 30))
    mask[20, 20, 20] = 4
    mask[4:6, 4:6, 8:10] = 0
    resampling = resampling_to(model, [6.0, 6.0, 6.0])
    lost = examine(resampling, write(mask)).warnings
    shifted = mask.copy()
    shifted[20, 20, 20], shifted[21, 21, 21] = 0, 4
    lines = lost + examine(resampling, write(shifted)).warnings
    [line] = [line for line in lines if "label 4 (27 mm³) is lost at the model's spacing, 6×6×6 mm" in line]
    assert line.endswith("the volume will not show it.")


def test_a_mask_much_coarser_than_the_model_is_a_warning(model, write):
    resampling = resampling_to(model, [3.0, 3.0, 2.0])
    line = examine(resampling, write(usual(), np.diag([3.0, 3.0, 5.5, 1.0]))).warnings[0]
    assert "has voxels of 3×3×5.5 mm, which become steps at the model's 3×3×2 mm; expected at most 2 times" in line


@pytest.mark.parametrize(
    ("of_label_4", "line"),
    [
        ([1000, 2000], "has a size that the model has not seen: it was trained on 1000 mm³ to 2000 mm³."),
        ([10, 100], "label 4 (216 mm³) has a size that the model has not seen: it was trained on 10 mm³ to 100 mm³."),
        (None, "label 4 (216 mm³) was in none of the 4 training masks."),
    ],
)
def test_a_label_of_another_size_than_in_training_is_a_warning(model, write, of_label_4, line):
    other = replace(model, training_masks={**TRAINED, "volume_mm3": [*TRAINED["volume_mm3"][:3], of_label_4]})
    assert line in warning_of(other, write(usual()))


# The label map


def test_a_label_map_makes_a_mask_one_of_the_models(model, write):
    swapped = np.choose(np.minimum(usual(), 3), [0, 2, 1, 3]).astype(np.uint8)
    mapping = model.with_label_map({1: 2, 2: 1, 3: 4})
    path = write(swapped)
    assert examine(mapping, path) == Findings([], [])
    mapped, straight = mapping.grid_of(path), model.grid_of(write(usual(), name="b.nii"))
    assert torch.equal(mapped.mask.as_tensor(), straight.mask.as_tensor())
    assert model.label_map == {} and "has labels {3}" in error_of(model, path)


def test_a_label_map_to_nothing_the_model_knows_is_refused(model):
    with pytest.raises(InputError, match=r"--label-map maps to \[3\]; this model knows \{0, 1, 2, 4\}\. Map to one"):
        model.with_label_map({1: 3})


@pytest.mark.parametrize("text", ["1", "1:a", "1:2;3:4", "", "1:2:3"])
def test_what_is_no_label_map_is_refused(text):
    with pytest.raises(InputError, match=r"--label-map is .*; expected pairs of the file's label and the model's"):
        parse_label_map(text)


def test_a_label_map_is_pairs(model):
    assert parse_label_map("1:2,3:0") == {1: 2, 3: 0}
    with pytest.raises(InputError, match="expected each label of the file once"):
        parse_label_map("1:2,1:0")


# What travels in the checkpoint


def test_a_checkpoint_tells_what_its_training_masks_were_like(trained, phantoms):
    names = (phantoms / "train.list").read_text().split()
    labels = [nib.load(phantoms / name / f"{name}_seg.nii.gz").get_fdata() for name in names]
    masks = trained.training_masks
    assert masks["num_cases"] == len(names) == 4 and masks["num_empty"] == 0
    assert masks["size"] == [[16] * 3, [16] * 3]
    assert np.allclose(masks["spacing_mm"], 3)
    for k, label in enumerate((0, 1, 2, 4)):
        volumes = [27 * (mask == label).sum() for mask in labels if (mask == label).any()]
        assert np.allclose(masks["volume_mm3"][k], [min(volumes), max(volumes)])


def test_an_older_checkpoint_still_loads(tiny_runs, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    checkpoints.save(tmp_path / "x.pt", {**content, "notes": {"spacing_mm": content["notes"]["spacing_mm"]}})
    assert Model.load(tmp_path / "x.pt").training_masks is None


def test_masks_are_measured_in_mm3(tmp_path):
    mask = MetaTensor(torch.from_numpy(usual((10, 10, 12))[None].astype(np.int64)), affine=np.diag([1, 2, 3.0, 1]))
    found = measured(torch.clamp(mask, max=1), 3)
    assert found == ([10, 10, 12], [1, 2, 3], [(1200 - 24) * 6, 24 * 6, 0])
    cases = [{"mask": mask * 0}, {"mask": torch.clamp(mask, max=1)}]
    assert summary(cases, [lambda case: case], 3) == {
        "num_cases": 2,
        "num_empty": 1,
        "size": [[10, 10, 12]] * 2,
        "spacing_mm": [[1, 2, 3]] * 2,
        "volume_mm3": [[(1200 - 24) * 6, 1200 * 6], [24 * 6] * 2, None],
    }


# The doors


def test_a_label_map_goes_through_the_command_line(tiny_runs, write, tmp_path):
    swapped = np.choose(np.minimum(usual(), 3), [0, 2, 1, 3]).astype(np.uint8)
    path, out = write(swapped), tmp_path / "out"
    words = ("sample", "-r", tiny_runs.diffusion, "--mask", path, "--out", out)
    assert "has labels {3}" in refused(run_here(*words))
    assert "maps to [9]" in refused(run_here(*words, "--label-map", "3:9"))
    assert not out.exists()
    ended = run_here(*words, "--label-map", "1:2,2:1,3:4")
    assert ended.code == 0, ended
    written = np.asarray(nib.load(out / "a" / "a_seg.nii.gz").dataobj)
    assert np.array_equal(written, usual())
    warned = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    sidecar = json.loads((out / "a" / "a.json").read_text())
    assert sidecar["LabelMap"] == {"1": 2, "2": 1, "3": 4}
    assert warned and warned == [f"warning: {line}" for line in sidecar["Warnings"]]
