"""A few phantoms dressed as the data that a bundle was made for, on which it can be tried."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser

from latdiff3d.covariates import TABLE
from latdiff3d.phantoms import MIN_AXIS, MODALITIES, write_phantoms

NUM_TRAIN, NUM_VAL = 2, 1  # at least
SPACING_MM = 3.0


def write_trial_data(folder: Path, settings: ConfigParser, num_ranks: int = 1) -> Path:
    """Write phantoms in BraTS's layout with a bundle's modalities, labels and covariates, and return the folder.

    Args:
        folder: not there yet.
        settings: the bundle's common.yaml.
        num_ranks: that train on them at once; each has a case of training and one of validation at least.
    """
    modalities, labels, crop_to = (settings[key] for key in ("modalities", "labels", "crop_to"))
    spacing_mm = float(np.mean(settings["spacing"])) if isinstance(settings["spacing"], list) else SPACING_MM
    size = [max(MIN_AXIS, length) for length in crop_to]
    nums = max(NUM_TRAIN, num_ranks), max(NUM_VAL, num_ranks)
    source = write_phantoms(folder.with_name("phantoms"), *nums, (size[0], size[1], size[2]), spacing_mm)
    folder.mkdir()
    for place in sorted(path for path in source.iterdir() if path.is_dir()):
        case = folder / place.name
        case.mkdir()
        for number, modality in enumerate(modalities):
            drawn = place / f"{place.name}_{MODALITIES[number % len(MODALITIES)]}.nii.gz"
            shutil.copyfile(drawn, case / f"{place.name}_{modality}.nii.gz")
        _write_mask(place / f"{place.name}_seg.nii.gz", case / f"{place.name}_seg.nii.gz", labels)
    for file in source.glob("*.list"):
        shutil.copyfile(file, folder / file.name)
    _write_covariates(folder, settings["covariates"])
    shutil.rmtree(source)
    return folder


def _write_mask(drawn: Path, file: Path, labels: Sequence[int]) -> None:
    """Write a phantom's mask with its labels, in order, replaced by `labels`; those beyond by the last."""
    mask: Any = nib.load(drawn)
    voxels = np.asarray(mask.dataobj)
    ranks = np.searchsorted(np.unique(voxels), voxels)
    named = np.asarray(labels, dtype=np.int16)[np.minimum(ranks, len(labels) - 1)]
    nib.save(nib.Nifti1Image(named, mask.affine), file)


def _write_covariates(folder: Path, covariates: Sequence[Any]) -> None:
    known = {each["name"]: each["classes"][0] if "classes" in each else each["mean"] for each in covariates}
    known.pop("spacing", None)  # the header's
    if not known:
        return
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *known])
        writer.writerows([path.name, *known.values()] for path in sorted(folder.iterdir()) if path.is_dir())
