"""The reference segmenter, from volume to mask: its training, and the rule that no teacher is a judge.

A segmenter serves one of two purposes, fixed when it is trained. One for `training` lends its features to the
perceptual loss; one for `evaluation` measures how faithful volumes are to their masks. A model that was trained to
please a network looks better to that network than it is, so each door takes its own kind only, and the two kinds begin
from other weights and see the cases in another order even under the same seed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from torch import nn
from torch.nn import functional as F

from latdiff3d import checkpoints
from latdiff3d.devices import autocast
from latdiff3d.dice import label_dice
from latdiff3d.distributed import mean_over_ranks
from latdiff3d.errors import InputError
from latdiff3d.perceptual import Perceptual, encoder_stages, segmenter_perceptual
from latdiff3d.training import Batch, to_device
from latdiff3d.updates import LossScaler, group_of, update

STAGE = "segmenter"
PURPOSES = ("training", "evaluation")
# The note under which a run that learns from a segmenter keeps `checkpoints.record` of it.
TEACHER = "segmenter"
# Below every label, so that MONAI's and PyTorch's losses leave padding out.
PADDING = -1

_dice_loss = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, ignore_index=PADDING)


@dataclass
class SegmenterStep:
    """One update of the segmenter by Dice and cross-entropy, both of weight 1 (Isensee et al. 2021, nnU-Net).

    A batch holds `image` (B, C, D, H, W) in [0, 1], `mask` (B, 1, D, H, W) with labels 0, 1, 2, …, and `valid`
    (B, 1, D, H, W), 1 on the volume's own voxels; the others do not count. `accumulate_grad_batches` batches share an
    update.
    """

    segmenter: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "bf16"
    max_grad_norm: float = 1.0
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        self.scaler = LossScaler(self.device, self.precision)

    def __call__(self, engine: Engine, batch: Batch) -> dict[str, float]:
        """Update the weights and return the loss's terms, means over the ranks."""
        self.segmenter.train()
        image, mask, valid = to_device(self.device, batch["image"], batch["mask"], batch["valid"])
        with autocast(self.device, self.precision):
            logits = self.segmenter(image)  # (B, K, D, H, W)
        terms = segmentation_terms(logits.float(), mask, valid)
        total = torch.stack(list(terms.values()))
        group = group_of(engine, self.accumulate_grad_batches, batch)
        update(total.sum(), self.segmenter, self.optimizer, self.max_grad_norm, group, self.scaler)
        return dict(zip(terms, mean_over_ranks(total).tolist(), strict=True)) | self.scaler.logged()


@dataclass
class SegmenterValidation:
    """Segments a batch and measures Dice on each volume's own voxels."""

    segmenter: nn.Module
    num_classes: int
    device: torch.device
    precision: str = "bf16"

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch) -> dict[str, torch.Tensor]:
        """Return `dice` (B, K − 1), see `dice.label_dice`."""
        self.segmenter.eval()
        image, mask, valid = to_device(self.device, batch["image"], batch["mask"], batch["valid"])
        with autocast(self.device, self.precision):
            prediction = self.segmenter(image).argmax(1, keepdim=True)  # (B, 1, D, H, W)
        return {"dice": label_dice(prediction, mask, valid, self.num_classes)}


def segmentation_terms(logits: torch.Tensor, mask: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `dice_loss`, soft and without the background, and `cross_entropy`: means of each volume's own.

    Args:
        logits: (B, K, D, H, W) in float32.
        mask: (B, 1, D, H, W), labels 0 to K − 1.
        valid: (B, 1, D, H, W), 1 on the volume's own voxels.
    """
    target = torch.where(valid > 0, mask, PADDING)
    surprise = F.cross_entropy(logits, target[:, 0].long(), ignore_index=PADDING, reduction="none")  # (B, D, H, W)
    cross_entropy = surprise.sum((1, 2, 3)) / valid.sum((1, 2, 3, 4))  # (B,)
    return {"dice_loss": _dice_loss(logits, target), "cross_entropy": cross_entropy.mean()}


def seed_for(purpose: str, seed: int) -> int:
    """Return the seed of a segmenter's weights and batches: another one for each purpose.

    Raises:
        InputError: for an unknown purpose.
    """
    if purpose not in PURPOSES:
        raise InputError(f"purpose is {purpose!r}; expected 'training' or 'evaluation'.")
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose)]).generate_state(1)[0])


def load_segmenter(
    place: str | Path, purpose: str = "training", settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a trained segmenter, frozen, in evaluation mode, on the CPU.

    It takes images (B, C, D, H, W) in [0, 1] and returns logits (B, K, D, H, W). The global generators are left alone.

    Args:
        place: the checkpoint, or the folder of its run.
        purpose: what it is wanted for, "training" or "evaluation".
        settings: this configuration's values of what both must share, such as modalities.

    Raises:
        InputError: no checkpoint, one of another stage, of the other purpose or of other settings.
    """
    path = checkpoints.find(place)
    content = checkpoints.load(path, STAGE)
    there = yaml.safe_load(content["config"])
    if content["notes"]["purpose"] != purpose:
        raise InputError(
            f"{path} is a segmenter for {content['notes']['purpose']}; expected one for {purpose}, for none may judge "
            f"what it taught. Train another: latdiff3d train segmenter purpose={purpose}."
        )
    for key, value in (settings or {}).items():
        if there[key] != value:
            raise InputError(f"{path} was trained with {key} {there[key]}, this run has {value}; use the same in both.")
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        network = ConfigParser(there).get_parsed_content("segmenter_def")
    checkpoints.load_weights(network, content["objects"]["segmenter"], str(path))
    return network.requires_grad_(False).eval()


def teacher(segmenter: str, settings: Mapping[str, Any]) -> Perceptual | None:
    """Return the perceptual term that looks through a segmenter's encoder, or None without one.

    Args:
        segmenter: its checkpoint, or the folder of its run; "" for none.
        settings: see `load_segmenter`.

    Raises:
        InputError: a segmenter that is no UNet, or see `load_segmenter`.
    """
    if not segmenter:
        return None
    network = load_segmenter(segmenter, "training", settings)
    if not isinstance(network, UNet):
        raise InputError(f"{segmenter} is a {type(network).__name__}; expected a UNet, whose encoder lends features.")
    return segmenter_perceptual(network)


def teacher_note(segmenter: str) -> dict[str, dict[str, str]]:
    """Return what a run that learns from `segmenter` notes of it, nothing without one; see `TEACHER`."""
    return {TEACHER: checkpoints.record(segmenter)} if segmenter else {}


def load_judge(
    place: str | Path, judged: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a segmenter that may measure models, as `load_segmenter` does.

    Args:
        place: the segmenter's checkpoint, or the folder of its run.
        judged: the contents of the models' checkpoints, of both stages; see `TEACHER`.
        settings: as for `load_segmenter`.

    Raises:
        InputError: a segmenter that taught one of them, is for training, or see `load_segmenter`.
    """
    path = checkpoints.find(place)
    teachers = [content["notes"].get(TEACHER) for content in judged]
    if checkpoints.sha256(path) in [teacher["sha256"] for teacher in teachers if teacher]:
        raise InputError(
            f"{path} taught the model that it is to judge; measure with another: latdiff3d train segmenter "
            "purpose=evaluation."
        )
    return load_segmenter(path, "evaluation", settings)


@torch.no_grad()
def encoder_features(segmenter: UNet, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return what a segmenter's encoder sees in volumes: (B, F), to compare sets of them by.

    Mean and standard deviation of each channel of each of its stages over a volume's own voxels.

    Args:
        segmenter: a judge, from `load_judge`.
        image: (B, C, D, H, W) in [0, 1].
        valid: (B, 1, D, H, W), 1 on the volume's own voxels.
    """
    features, x = [], image
    for stage in encoder_stages(segmenter):
        x = stage(x)  # (B, C', D / s, H / s, W / s)
        share = F.interpolate(valid.float(), x.shape[2:], mode="area")  # of a cell's voxels that are the volume's own
        share = share / share.sum((2, 3, 4), keepdim=True)
        mean = (share * x).sum((2, 3, 4), keepdim=True)
        variance = (share * (x - mean) ** 2).sum((2, 3, 4))
        features += [mean[:, :, 0, 0, 0], variance.sqrt()]
    return torch.cat(features, dim=1)
