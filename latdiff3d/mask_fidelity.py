"""Do synthetic volumes lie on their masks? A segmenter's Dice on them, between real volumes' and chance."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from latdiff3d.dice import label_dice
from latdiff3d.errors import InputError


@torch.no_grad()
def segmented(segmenter: nn.Module, volume: torch.Tensor) -> torch.Tensor:
    """Return the label (1, D, H, W) that a segmenter sees in each voxel of a volume (C, D, H, W), on the CPU."""
    device = next(segmenter.parameters()).device
    return segmenter(volume[None].to(device))[0].argmax(dim=0, keepdim=True).cpu()


def dice_table(
    predictions: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], own: Sequence[torch.Tensor], num_classes: int
) -> np.ndarray:
    """Return the Dice overlap of each prediction with each mask and label but the background.

    Args:
        predictions: N of (1, D, H, W), of volumes made for the masks, or of the real ones, in the masks' order.
        masks: N of the same shape, on one grid.
        own: N of the same shape, 1 on the voxels that are each volume's own; Dice is over the prediction's.
        num_classes: K, the background included.

    Returns:
        (N, N, K − 1): of prediction i and mask j; NaN where the mask lacks the label.

    Raises:
        InputError: fewer than two cases, or lists of different lengths.
    """
    if not len(predictions) == len(masks) == len(own) >= 2:
        raise InputError(f"{len(predictions)} volumes for {len(masks)} masks; expected as many, and two at least.")
    truth = torch.stack([mask.float() for mask in masks])  # (N, 1, D, H, W)
    rows = [
        label_dice(prediction.float().expand_as(truth), truth, valid.expand_as(truth), num_classes).numpy()
        for prediction, valid in zip(predictions, own, strict=True)
    ]
    return np.stack(rows).astype(np.float64)


def matched_dice(table: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean over the labels of the mean Dice of volumes and their own masks.

    Args:
        table: (N, N, K − 1), from `dice_table`.
        weights: (N,), of the cases; all 1 if None.
    """
    own = table[np.arange(len(table)), np.arange(len(table))]  # (N, K − 1)
    return _mean_over_labels(own, np.ones(len(table)) if weights is None else weights)


def mismatched_dice(table: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean over the labels of the mean Dice of volumes and all other cases' masks; see `matched_dice`.

    Masks that look alike overlap by chance: this is what a model has that takes no notice of its mask.
    """
    weights = np.ones(len(table)) if weights is None else weights
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    return _mean_over_labels(table.reshape(-1, table.shape[-1]), pairs.ravel())


def normalised_fidelity(made: np.ndarray, real: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return (D − S) / (R − S): 1 where synthetic volumes lie on their masks as real ones do, 0 by chance.

    Args:
        made: the `dice_table` of synthetic volumes; D and S are its matched and mismatched Dice.
        real: that of the real ones, of the same masks; R is its matched Dice.
        weights: (N,), of the cases.
    """
    chance = mismatched_dice(made, weights)
    return (matched_dice(made, weights) - chance) / (matched_dice(real, weights) - chance)


def _mean_over_labels(dice: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean over the labels (…, L) of their weighted means, each over what is not NaN."""
    known = weights[:, None] * ~np.isnan(dice)
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(np.nansum(known * np.nan_to_num(dice), axis=0) / known.sum(axis=0)))
