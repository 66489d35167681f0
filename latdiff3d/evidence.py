"""What an evaluation looks at: real volumes, those made for their masks, and what networks see in both.

All that takes time is made when it is first asked for, kept in the evaluation's folder under a hash of what it comes
from, and found there by the next run:

    volumes/<hash>.npz      a real volume as the model sees it, in steps of 1/65535
    samples/<case>[_seed…]  as `latdiff3d sample --grid crop` writes them
    features/<hash>.npy     of a set of volumes
"""

import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import nn

from latdiff3d import __version__, checkpoints, fingerprints, preflight, sample_folders, whole_files
from latdiff3d.checks import require_sound_headers
from latdiff3d.errors import InputError
from latdiff3d.features import FeatureNetwork, FeatureSets
from latdiff3d.handlers import progress_bar
from latdiff3d.model_cases import cases_of_split, known_of
from latdiff3d.real_volumes import RealVolumes
from latdiff3d.sample_folders import Job, Writing
from latdiff3d.segmentation import load_judge
from latdiff3d.synthesis import Model
from latdiff3d.volumes import median_spacing_mm

# What a model and the segmenter that judges it must share; of a model without masks, what concerns the images alone.
SETTINGS = ("modalities", "labels", "mask_mode", "spacing", "intensity_percentiles")
IMAGE_SETTINGS = ("modalities", "spacing", "intensity_percentiles")
MIN_CASES = 2  # a figure of one case has no spread, and no other case to compare it with
FORMAT = 1  # raised when the meaning of stored features changes


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
        all_training: real volumes of the training split.
        training: of them at most as many as were asked for, spread evenly over it; none where the split is train.
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
    all_training: RealVolumes
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
        train = list(model.config.get_parsed_content("splits").get("train", []))
        require_sound_headers([*cases, *train], len(model.modalities))
        _require_spacing(model, cases, dataset_dir)
        jobs, usable = _jobs_of(model, cases, num_samples, seed)
        if len(usable) < MIN_CASES:
            raise InputError(
                f"{dataset_dir} has {len(usable)} {split} case that can be used; expected {MIN_CASES} at least, for "
                "figures are means over cases beside their spread."
            )
        volumes = folder / "volumes"
        reals, all_training = RealVolumes(model, usable, volumes), RealVolumes(model, train, volumes)
        training = all_training.spread(num_training if split != "train" else 0)
        given = {"split": split, "networks": {network.name: network.sha256 for network in networks}}
        return cls(
            folder, model, dataset_dir, usable, jobs, num_samples, reals, all_training, training, judge, networks, seed,
            given, len(cases) - len(usable),
        )  # fmt: skip

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
