"""What benchmarks of sampled volumes share: a trained run, its judge, and the real volumes of the validation masks."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latdiff3d import checkpoints, runs
from latdiff3d.config import CONFIG_FOLDER
from latdiff3d.errors import InputError
from latdiff3d.evidence import judge_of
from latdiff3d.model_cases import cases_of_split
from latdiff3d.real_volumes import real_volume
from latdiff3d.segmentation import encoder_features
from latdiff3d.synthesis import Model


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all of them have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="the data set's folder")
    parser.add_argument("--run", required=True, help="stage 2's run; trained there if there is none")
    parser.add_argument("--first-stage", help="stage 1's run, for a stage 2 yet to be trained")
    parser.add_argument("--segmenter", help="the evaluation segmenter's run; trained there if there is none")
    parser.add_argument("--config", default=str(CONFIG_FOLDER / "hippocampus.yaml"), help="overlay for the data set")
    parser.add_argument("--cases", type=int, help="look at so many validation masks only")
    return parser


@dataclass
class Judging:
    """A model, the segmenter that judges it, and what is compared with.

    Attributes:
        cases: of validation.
        reals: their volumes (C, D, H, W) as the model sees them.
        masks: theirs (1, D, H, W), on the same grid.
        own: 1 on the voxels that are a volume's own (1, D, H, W).
    """

    model: Model
    judge: nn.Module
    cases: list[dict[str, Any]]
    reals: list[torch.Tensor]
    masks: list[torch.Tensor]
    own: list[torch.Tensor]

    @classmethod
    def prepared(cls, given: argparse.Namespace, guidance: float | None = None) -> "Judging":
        """Load everything, and train first what is missing.

        Raises:
            InputError: an unconditional model, fewer than two cases, or see `Model.load` and `load_judge`.
        """
        judge_run = given.segmenter or f"{given.run}_judge"
        train_missing(given, judge_run)
        model = Model.load(given.run, guidance=guidance)
        if not model.is_conditional:
            raise InputError(f"{given.run} is an unconditional model; expected one that makes volumes for masks.")
        judge = judge_of(model, judge_run)
        cases = cases_of_split(model, given.data, "val")[: given.cases]
        if len(cases) < 2:
            raise InputError(f"{given.data} has {len(cases)} validation case; expected two at least.")
        return cls(model, judge, cases, *real_volumes(model, cases))

    def features(self, volumes: Sequence[torch.Tensor], own: Sequence[torch.Tensor] | None = None) -> np.ndarray:
        """Return the judge's features (N, F) of volumes (C, D, H, W), for the validation masks if `own` is None."""
        device = next(self.judge.parameters()).device
        rows = [
            encoder_features(self.judge, volume[None].to(device), valid[None].to(device))[0]
            for volume, valid in zip(volumes, self.own if own is None else own, strict=True)
        ]
        return torch.stack(rows).double().cpu().numpy()


def train_missing(given: argparse.Namespace, judge_run: str) -> None:
    """Train stage 2, its first stage and the judge, each where there is no checkpoint."""

    def train(stage: str, run: str, **settings: Any) -> None:
        if not (Path(run) / checkpoints.FOLDER / "best.pt").is_file():
            overlays = [given.config, CONFIG_FOLDER / f"hippocampus_{stage}.yaml"]
            runs.start(overlays, [], {"dataset_dir": given.data, "run_dir": run, **settings}, stage)

    if not (Path(given.run) / checkpoints.FOLDER / "best.pt").is_file():
        first_stage = given.first_stage or f"{given.run}_autoencoder"
        train("autoencoder", first_stage)
        train("diffusion", given.run, first_stage=first_stage)
    train("segmenter", judge_run, purpose="evaluation")


def real_volumes(
    model: Model, cases: Sequence[dict[str, Any]]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return the cases' volumes (C, D, H, W), masks and own voxels (1, D, H, W), see `real_volumes.real_volume`."""
    found = [real_volume(model, case) for case in cases]
    volumes, own = [torch.as_tensor(real.image) for real in found], [torch.as_tensor(real.own) for real in found]
    return volumes, [torch.as_tensor(real.mask) for real in found], own
