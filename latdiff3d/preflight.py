"""Look at a mask before any compute: why no volume can be made for it, and what of it the model has not seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, Spacingd

from latdiff3d.checks import affine_problem, voxel_problems
from latdiff3d.conditioning import MaskCondition, PackedCondition
from latdiff3d.errors import InputError, root_input_error
from latdiff3d.readers import read_header, read_volume, shape_problem, size_text
from latdiff3d.synthesis import Model
from latdiff3d.training_masks import Measures, measured
from latdiff3d.volumes import place_mask, spacing_mm_of

# How far outside the training masks' range a mask may lie without a word: factors.
SPACING_TOLERANCE = 1.1
MEDIAN_TOLERANCE = 1.5  # of a checkpoint that knows the median spacing alone
VOLUME_TOLERANCE = 2.0
# Masks coarser than this times the model's spacing become steps when they are resampled to it.
COARSE_SPACING = 2.0
# A label is lost on the latent grid where no cell holds this share of it: a cube of half a cell's edge.
SMALLEST_SHARE = 1 / 8


class Findings(NamedTuple):
    """What was found, one line each: why no volume can be made, and, if one can, what it may suffer from."""

    errors: list[str]
    warnings: list[str]


def examine(model: Model, mask: str | Path, crop_matters: bool = True) -> Findings:
    """Hold a mask against what a model was trained on; no network is run.

    A mask that is mirrored cannot be told from one that is not; only headers that contradict themselves, or say
    nothing of orientation, are found.

    Args:
        model: from `Model.load`.
        mask: its file.
        crop_matters: say what lies outside the crop around its labels; not where the crop is cut around something else.

    Raises:
        InputError: for a model without masks.
    """
    model.require_mask(mask)
    path = str(mask)
    try:
        header = read_header(path)
        if wrong := shape_problem(path, header.shape, 1) or affine_problem(path, header.affine):
            return Findings([wrong], [])
        stored = read_volume(path)
        if errors := _label_errors(model, stored, Path(path).name):
            return Findings(errors, [])
        whole = model.preprocessing({"mask": stored})["mask"]  # (1, D, H, W), mapped, RAS, the model's spacing
    except Exception as error:
        mistake = root_input_error(error)
        if mistake is None:
            raise
        return Findings([str(mistake)], [])
    on_grid = measured(whole, model.num_classes)
    warnings = [*_header_warnings(path, header.stores_integers), *_grid_warnings(model, path, on_grid)]
    unresampled = _before_resampling(model, stored, on_grid)
    if not any(on_grid.volume_mm3[1:]) and not any(unresampled.volume_mm3[1:]):
        errors, more = _empty(model, Path(path).name)
        return Findings(errors, [*warnings, *more])
    return Findings([], [*warnings, *_class_warnings(model, stored, whole, on_grid, unresampled, crop_matters)])


def parse_label_map(text: str) -> dict[int, int]:
    """Return `1:2,3:0`, pairs of a file's label and the model's, as a dict.

    Raises:
        InputError: for anything else, or a label of the file's that is named twice.
    """
    pairs = [pair.split(":") for pair in text.split(",")]
    try:
        numbers = [(int(file), int(ours)) for file, ours in pairs]
    except ValueError:
        raise InputError(
            f"--label-map is {text!r}; expected pairs of the file's label and the model's, such as 1:2,3:0."
        ) from None
    if len(dict(numbers)) < len(numbers):
        raise InputError(f"--label-map is {text!r}; expected each label of the file once.")
    return dict(numbers)


def unseen_spacing(model: Model, spacing_mm: np.ndarray) -> str | None:
    """Return how far voxels of `spacing_mm` (3,), in RAS order, are off those of training, None where they are not."""
    trained = model.training_masks
    lowest, highest = np.array(trained["spacing_mm"] if trained else [model.spacing_mm, model.spacing_mm])
    tolerance = SPACING_TOLERANCE if trained else MEDIAN_TOLERANCE
    if not (spacing_mm < lowest / tolerance).any() and not (spacing_mm > highest * tolerance).any():
        return None
    return f"has voxels of {_mm(spacing_mm)} (RAS); this model was trained on {_range(lowest, highest, _mm)}"


def _label_errors(model: Model, mask: MetaTensor, name: str) -> list[str]:
    if problems := voxel_problems(None, mask, None, [], name):
        return problems
    found = [int(value) for value in np.unique(mask.numpy())]
    unknown = [label for label in found if model.label_map.get(label, label) not in model.labels]
    if not unknown:
        return []
    listed, known = ", ".join(map(str, unknown[:8])), ", ".join(map(str, model.labels))
    example = ",".join(f"{label}:{model.labels[-1]}" for label in unknown[:8])
    hint = ""
    if unknown == [3] and 4 in model.labels:
        hint = " Decathlon's BrainTumour numbers BraTS's labels otherwise: --label-map 1:2,2:1,3:4."
    elif unknown == [4] and 3 in model.labels:
        hint = " BraTS numbers Decathlon's BrainTumour's labels otherwise: --label-map 1:2,2:1,4:3."
    return [
        f"{name} has labels {{{listed}}}; this model knows {{{known}}}. Map them, for instance with --label-map "
        f"{example}, or drop the case.{hint}"
    ]


def _header_warnings(path: str, stores_integers: bool) -> Iterator[str]:
    name = Path(path).name
    if not stores_integers:
        yield f"{name} stores its labels as floats; all are whole numbers, and taken as such."
    if not path.lower().endswith((".nii", ".nii.gz")):
        return
    nifti: Any = nib.load(path)
    qform, sform = nifti.get_qform(coded=True)[0], nifti.get_sform(coded=True)[0]
    if qform is None and sform is None:
        yield (
            f"{name} does not say how it lies (qform and sform codes are 0); it is taken for {_axes(nifti.affine)}, "
            "and may be mirrored. Lay the mask over its scan to see."
        )
    elif qform is not None and sform is not None and _axes(qform) != _axes(sform):
        yield (
            f"{name} contradicts itself: its qform says {_axes(qform)}, its sform {_axes(sform)}; the sform is taken, "
            "and the mask may be mirrored or turned. Lay it over its scan to see."
        )


def _axes(affine: np.ndarray) -> str:
    return "".join(code or "?" for code in nib.aff2axcodes(affine))


def _grid_warnings(model: Model, path: str, mask: Measures) -> Iterator[str]:
    name, trained = Path(path).name, model.training_masks
    here_mm, model_mm = np.array(mask.spacing_mm), np.array(model.spacing_mm)
    if model.is_resampling:
        stored_mm = spacing_mm_of(path)
        if (stored_mm > COARSE_SPACING * model_mm).any():
            yield (
                f"{name} has voxels of {_mm(stored_mm)}, which become steps at the model's {_mm(model_mm)}; expected "
                f"at most {COARSE_SPACING:g} times that. Draw it, or interpolate it, on a finer grid."
            )
    else:
        if unseen := unseen_spacing(model, here_mm):
            yield f"{name} {unseen}. Resample the mask, or shapes will have sizes that it has not seen."
    if trained:
        expected = np.minimum(trained["size"][0], model.crop_to)
        if (np.array(mask.size) < expected).any():
            yield (
                f"{name} has {size_text(mask.size)} voxels on the model's grid (RAS) and is padded to "
                f"{size_text(model.crop_to)}; no training volume had fewer than {size_text(trained['size'][0])}. "
                "Use a mask of a larger field of view."
            )


def _empty(model: Model, name: str) -> Findings:
    line = f"{name} is empty: it holds no label but {model.class_names[0]}"
    if not model.training_masks:
        return Findings([], [f"{line}, and whether the model was trained on such masks its checkpoint does not say."])
    if model.training_masks["num_empty"]:
        return Findings([], [])
    return Findings([f"{line}; all {model.training_masks['num_cases']} training masks held one. Drop the case."], [])


def _before_resampling(model: Model, stored: MetaTensor, on_grid: Measures) -> Measures:
    if not model.is_resampling:
        return on_grid
    others = [transform for transform in model.preprocessing.transforms if not isinstance(transform, Spacingd)]
    return measured(Compose(others)({"mask": stored})["mask"], model.num_classes)


def _class_warnings(
    model: Model, stored: MetaTensor, whole: MetaTensor, on_grid: Measures, unresampled: Measures, crop_matters: bool
) -> Iterator[str]:
    """Say of each class what the model will not be shown, or has not seen."""
    condition = model.synthesizer.condition
    assert isinstance(condition, MaskCondition)
    cell_voxels = model.whole_cell if crop_matters else condition.factor  # nothing is cut off
    crop = place_mask(stored, whole, model.preprocessing, model.crop_to, cell_voxels).mask
    in_crop = measured(crop, model.num_classes).volume_mm3
    shares = MaskCondition(model.num_classes, condition.factor)(crop.as_tensor()[None])  # (1, K, D/f, H/f, W/f)
    largest = shares.amax((0, 2, 3, 4)).tolist()
    cell = _mm(np.array(on_grid.spacing_mm) * condition.factor)
    name = Path(str(stored.meta["filename_or_obj"])).name
    for k, volume_mm3 in enumerate(unresampled.volume_mm3):
        if k == 0 or not volume_mm3:
            continue
        label = f"{name}: label {model.class_names[k]} ({volume_mm3:.4g} mm³)"
        if not on_grid.volume_mm3[k]:
            yield f"{label} is lost at the model's spacing, {_mm(on_grid.spacing_mm)}; the volume will not show it."
        elif not in_crop[k]:
            yield f"{label} lies outside the model's crop of {size_text(model.crop_to)} voxels, where the volume is 0."
        else:
            outside = 1 - in_crop[k] / on_grid.volume_mm3[k]
            if outside > 0:
                yield (
                    f"{label}: {outside:.2%} of it lies outside the model's crop of {size_text(model.crop_to)} voxels "
                    "around the labels' middle, where the volume is 0."
                )
            if largest[k] < SMALLEST_SHARE and not isinstance(condition, PackedCondition):
                yield f"{label} is lost on the latent grid, whose cells are {cell}; the volume may not show it."
        yield from _volume_warning(model, k, label, volume_mm3)


def _volume_warning(model: Model, k: int, label: str, volume_mm3: float) -> Iterator[str]:
    if not model.training_masks:
        return
    ends = model.training_masks["volume_mm3"][k]
    if ends is None:
        yield f"{label} was in none of the {model.training_masks['num_cases']} training masks."
    elif not ends[0] / VOLUME_TOLERANCE <= volume_mm3 <= ends[1] * VOLUME_TOLERANCE:
        trained = _range(ends[0], ends[1], "{:.4g} mm³".format)
        yield f"{label} has a size that the model has not seen: it was trained on {trained}."


def _range(lowest: Any, highest: Any, text: Any) -> str:
    return text(lowest) if text(lowest) == text(highest) else f"{text(lowest)} to {text(highest)}"


def _mm(spacing_mm: Any) -> str:
    return f"{size_text(f'{size:.3g}' for size in spacing_mm)} mm"
