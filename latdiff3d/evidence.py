"""What an evaluation looks at: real volumes, those made for their masks, and what networks see in both.

All that takes time is made when it is first asked for, kept in the evaluation's folder under a hash of what it comes
from, and found there by the next run:

    volumes/<hash>.npz      a real volume as the model sees it, in steps of 1/65535
    samples/<case>[_seed…]  as `latdiff3d sample --grid crop` writes them
    features/<hash>.npy     of a set of volumes
"""

import io
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, SpatialPad, SpatialPadd
from torch import nn

from latdiff3d import __version__, checkpoints, fingerprints, preflight, sample_folders, whole_files
from latdiff3d.checks import require_sound_headers
from latdiff3d.errors import InputError
from latdiff3d.features import FeatureNetwork, FeatureSets
from latdiff3d.handlers import progress_bar
from latdiff3d.layouts import files_of
from latdiff3d.sample_folders import Job, Writing
from latdiff3d.segmentation import load_judge
from latdiff3d.synthesis import Model, cases_of_split, known_of
from latdiff3d.transforms import ForegroundCropd, MarkValidd
from latdiff3d.volumes import median_spacing_mm, place_mask

# What a model and the segmenter that judges it must share; of a model without masks, what concerns the images alone.
SETTINGS = ("modalities", "labels", "mask_mode", "spacing", "intensity_percentiles")
IMAGE_SETTINGS = ("modalities", "spacing", "intensity_percentiles")
MIN_CASES = 2  # a figure of one case has no spread, and no other case to compare it with
STEPS = 65535  # of stored intensities: a step costs a volume nothing below 100 dB
FORMAT = 1  # raised when the meaning of what is stored changes


@dataclass(frozen=True)
class RealVolume:
    """A real volume as the model sees it.

    Attributes:
        name: of its case.
        image: (C, D, H, W) in [0, 1], cut around its mask as a sample for that mask is; around its foreground, of a
            model without masks.
        mask: (1, D, H, W), classes 0 … K − 1; None of a model without masks.
        own: (1, D, H, W), 1 on the volume's own voxels, 0 on padding.
        spacing_mm: of its voxels, (3,).
    """

    name: str
    image: np.ndarray
    mask: np.ndarray | None
    own: np.ndarray
    spacing_mm: np.ndarray


class RealVolumes(Sequence[RealVolume]):
    """Real volumes, each read and preprocessed when it is first asked for, and then from the folder's file of it.

    Attributes:
        keys: of each, a hash of its files and of what is done with them.
    """

    def __init__(self, model: Model, cases: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self.model, self.cases, self.folder = model, cases, folder
        how = [FORMAT, fingerprints.of_transforms(model.preprocessing), model.crop_to, model.is_conditional]
        self.keys = [
            fingerprints.of([how, [fingerprints.of_volume(file) for file in files_of(dict(case))]])
            for case in progress_bar(cases, desc="looking for changes", unit="case", leave=False)
        ]

    def __len__(self) -> int:
        return len(self.cases)

    @overload
    def __getitem__(self, index: int) -> RealVolume: ...
    @overload
    def __getitem__(self, index: slice) -> list[RealVolume]: ...
    def __getitem__(self, index: int | slice) -> RealVolume | list[RealVolume]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        path, case = self.folder / f"{self.keys[index]}.npz", self.cases[index]
        if not _is_whole(path):
            _store(path, real_volume(self.model, case))
        return _stored(path, _name(case))


@dataclass
class Evidence:
    """All that the sections of an evaluation look at; from `gathered`.

    Attributes:
        folder: the evaluation's.
        model: that is evaluated.
        dataset_dir: of the real volumes.
        cases: of the split.
        jobs: the volumes that are to be made, S for each case, a case's one after the other.
        num_samples: S.
        reals: the cases' real volumes.
        training: real volumes of the training split, at most as many as were asked for, spread evenly over it.
        judge: the segmenter that measures, on the model's device, or None.
        networks: whose features are compared.
        seed: of all that is drawn.
        given: what else decides the figures, such as the judge's hash.
        num_left_out: cases of the split whose masks no volume can be made for.
    """

    folder: Path
    model: Model
    dataset_dir: Path
    cases: Sequence[Mapping[str, Any]]
    jobs: Sequence[Job]
    num_samples: int
    reals: RealVolumes
    training: RealVolumes
    judge: nn.Module | None
    networks: Sequence[FeatureNetwork]
    seed: int
    given: Mapping[str, Any] = field(default_factory=dict)
    num_left_out: int = 0

    @classmethod
    def gathered(
        cls,
        folder: Path,
        model: Model,
        dataset_dir: Path,
        split: str,
        judge: nn.Module | None,
        networks: Sequence[FeatureNetwork],
        num_samples: int,
        num_training: int,
        seed: int,
    ) -> "Evidence":
        """Look at a data set and at what is to be made; nothing is sampled yet.

        Masks that no volume can be made for are named on standard error, and their cases left out.

        Raises:
            InputError: another split, fewer than `MIN_CASES` cases, or cases that do not go together or with the model.
        """
        cases = cases_of_split(model, dataset_dir, split)
        training = list(model.config.get_parsed_content("splits").get("train", [])) if split != "train" else []
        training = spread(training, num_training)
        require_sound_headers([*cases, *training], len(model.modalities))
        _require_spacing(model, cases, dataset_dir)
        jobs, usable = _jobs_of(model, cases, num_samples, seed)
        if len(usable) < MIN_CASES:
            raise InputError(
                f"{dataset_dir} has {len(usable)} {split} case that can be used; expected {MIN_CASES} at least, for "
                "figures are means over cases beside their spread."
            )
        volumes = folder / "volumes"
        reals, trained = RealVolumes(model, usable, volumes), RealVolumes(model, training, volumes)
        given = {"split": split, "networks": {network.name: network.sha256 for network in networks}}
        return cls(
            folder, model, dataset_dir, usable, jobs, num_samples, reals, trained, judge, networks, seed, given,
            len(cases) - len(usable),
        )  # fmt: skip

    @cached_property
    def all_training(self) -> RealVolumes:
        """Return the real volumes of the whole training split, however many were asked for."""
        cases = self.model.config.get_parsed_content("splits").get("train", [])
        return RealVolumes(self.model, cases, self.folder / "volumes")

    @cached_property
    def key(self) -> str:
        """Return a hash of all that figures depend on but code."""
        made = [{name: sample_folders.essence(part) for name, part in job.provenance.items()} for job in self.jobs]
        volumes = [self.reals.keys, self.training.keys, self.all_training.keys]
        return fingerprints.of([__version__, *volumes, made, self.seed, dict(self.given)])

    @cached_property
    def samples(self) -> Path:
        """Return the folder of the samples, after making those that it lacks."""
        out = self.folder / "samples"
        left = [job for job in self.jobs if not sample_folders.is_made(job, out)]
        for _ in sample_folders.make(self.model, left, out) if left else ():
            pass
        return out

    def made(self, sample: int, case: int) -> np.ndarray:
        """Return the volume (C, D, H, W) in [0, 1] that is sample number `sample` for a case's mask."""
        name = self.jobs[case * self.num_samples + sample].name
        files = [self.samples / name / f"{name}_{modality}.nii.gz" for modality in self.model.modalities]
        images: list[Any] = [nib.load(file) for file in files]
        return np.stack([np.asarray(image.dataobj, dtype=np.float32) for image in images])

    def made_own(self, case: int) -> np.ndarray:
        """Return the own voxels (1, D, H, W) of samples for a case's mask; without a mask, all of them are."""
        own = self.reals[case].own
        return own if self.model.is_conditional else np.ones_like(own)

    @cached_property
    def features(self) -> dict[str, FeatureSets]:
        """Return each network's features of all volumes, by its name."""
        return {network.name: self._features_of(network) for network in self.networks}

    def _features_of(self, network: FeatureNetwork) -> FeatureSets:
        num_samples, num_cases = range(self.num_samples), range(len(self.cases))
        real = self._rows(network, "real", self.reals.keys, lambda: ((v.image, v.own) for v in self.reals))
        training = self._rows(
            network, "training", self.training.keys, lambda: ((v.image, v.own) for v in self.training)
        )
        made = self._rows(
            network, "made", [self.key],
            lambda: ((self.made(s, n), self.made_own(n)) for s in num_samples for n in num_cases),
            len(num_samples) * len(num_cases),
        )  # fmt: skip
        return FeatureSets(real, made.reshape(len(num_samples), len(num_cases), -1), training, network.deepest)

    def _rows(
        self,
        network: FeatureNetwork,
        what: str,
        keys: Sequence[str],
        volumes: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
        number: int | None = None,
    ) -> np.ndarray:
        """Return the features (N, F) of volumes and their own voxels, from the folder if they are there."""
        path = self.folder / "features" / f"{fingerprints.of([FORMAT, network.name, network.sha256, what, keys])}.npy"
        if not path.is_file():
            total = len(keys) if number is None else number
            bar = progress_bar(volumes(), total=total, desc=f"{network.name} features, {what}", unit="volume")
            rows = [network.row(image, own) for image, own in bar]
            buffer = io.BytesIO()
            np.save(buffer, np.stack(rows) if rows else np.zeros((0, 0)))
            whole_files.write(path, buffer.getvalue())
        return np.asarray(np.load(path))


def judge_of(model: Model, place: str | Path) -> nn.Module:
    """Return the segmenter at `place`, which must not have taught the model, on the model's device.

    Raises:
        InputError: see `segmentation.load_judge`.
    """
    shared = SETTINGS if model.is_conditional else IMAGE_SETTINGS
    judge = load_judge(place, _judged(model), {key: model.config[key] for key in shared})
    return judge.to(model.synthesizer.device)


def real_volume(model: Model, case: Mapping[str, Any]) -> RealVolume:
    """Return a case's volume as the model sees it: read, preprocessed, padded as in training and cut.

    Raises:
        InputError: a case that cannot be read, or whose image and mask do not go together.
    """
    name = _name(case)
    if not model.is_conditional:
        transforms = [
            *model.preprocessing.transforms,
            MarkValidd(),
            SpatialPadd("image", model.crop_to, mode="edge"),
            SpatialPadd("valid", model.crop_to),
            ForegroundCropd(["image", "valid"], "image", model.crop_to),
        ]
        item = Compose(transforms)({"image": case["image"]})
        spacing_mm = np.linalg.norm(np.asarray(item["image"].affine)[:3, :3], axis=0)
        return RealVolume(name, _array(item["image"]), None, _array(item["valid"]), spacing_mm)
    item = model.preprocessing({"image": case["image"], "mask": case["mask"]})
    grid = place_mask(case["mask"], item["mask"], model.preprocessing, model.crop_to)
    image = grid.crop(SpatialPad(model.crop_to, mode="edge")(item["image"]))
    own = grid.crop(grid.pad(torch.ones_like(item["image"][:1])))
    spacing_mm = np.linalg.norm(np.asarray(grid.mask.affine)[:3, :3], axis=0)
    return RealVolume(name, _array(image), _array(grid.mask), _array(own), spacing_mm)


def spread(things: Sequence[Any], number: int) -> list[Any]:
    """Return at most `number` of several things, evenly spread, from the first to the last."""
    return [things[k] for k in sorted({round(k) for k in np.linspace(0, len(things) - 1, min(len(things), number))})]


def _jobs_of(
    model: Model, cases: Sequence[Mapping[str, Any]], num_samples: int, seed: int
) -> tuple[list[Job], list[Mapping[str, Any]]]:
    """Return the volumes that can be made, and the cases that they can be made for."""
    writing = Writing(picture=False)
    if not model.is_conditional:
        jobs, _ = sample_folders.jobs_for(model, [], len(cases) * num_samples, seed, False, writing=writing)
        return jobs, list(cases)
    masks, known = [case["mask"] for case in cases], [known_of(model, case) for case in cases]
    jobs, refused = sample_folders.jobs_for(model, masks, num_samples, seed, False, known, writing, noise_apart=True)
    for line in refused.values():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return jobs, [case for case in cases if str(case["mask"]) not in refused]


def _judged(model: Model) -> list[dict[str, Any]]:
    """Return the contents of both stages' checkpoints; of stage 1's, only where it still is."""
    content = checkpoints.load(model.path, "diffusion")
    first = Path((content["first_stage"] or {}).get("path", ""))
    return [content, *([checkpoints.load(first, "autoencoder")] if first.is_file() else [])]


def _require_spacing(model: Model, cases: Sequence[Mapping[str, Any]], dataset_dir: Path) -> None:
    """Refuse voxels of another size than the model's, unless it resamples them: sizes would not compare."""
    if model.is_resampling:
        return
    if unseen := preflight.unseen_spacing(model, np.array(median_spacing_mm(cases))):
        raise InputError(f"{dataset_dir} {unseen} and does not resample. Resample the data, or evaluate on its own.")


def _store(path: Path, real: RealVolume) -> None:
    image = np.round(real.image * STEPS).astype(np.uint16)
    mask = np.zeros(0) if real.mask is None else real.mask
    buffer = io.BytesIO()
    np.savez(buffer, image=image, mask=mask.astype(np.uint8), own=real.own.astype(np.uint8), spacing_mm=real.spacing_mm)
    whole_files.write(path, buffer.getvalue())


def _stored(path: Path, name: str) -> RealVolume:
    with np.load(path) as arrays:
        image = arrays["image"].astype(np.float32) / STEPS
        mask = arrays["mask"] if arrays["mask"].size else None
        return RealVolume(name, image, mask, arrays["own"], arrays["spacing_mm"])


def _is_whole(path: Path) -> bool:
    """Say whether a file of arrays is there, its checksums right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _name(case: Mapping[str, Any]) -> str:
    return Path(str(case["case"])).name


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(torch.as_tensor(tensor).as_subclass(torch.Tensor), dtype=np.float32)
