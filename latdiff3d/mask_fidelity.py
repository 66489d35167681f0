"""Do synthetic volumes lie on their masks? A segmenter's Dice on them, between real volumes' and chance.

A section of an evaluation, and what it measures by: `measure`, `render` and `sentence`, see evaluation.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from latdiff3d.bootstrap import interval, mean_interval
from latdiff3d.dice import label_dice
from latdiff3d.errors import InputError
from latdiff3d.html_page import captioned, notes, number, table, with_interval
from latdiff3d.plain_figures import rounded
from latdiff3d.surface_distance import surface_distances

PICTURE = "outlined"
SURFACES = {"hd95": "95 % Hausdorff distance, mm", "assd": "mean surface distance, mm"}
GOOD = 0.9  # of the normalised fidelity


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
    return _mean_over_labels(_own_pairs(table), np.ones(len(table)) if weights is None else weights)


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

    NaN where R is S: a segmenter that sees nothing, or no difference between masks, judges nothing.

    Args:
        made: the `dice_table` of synthetic volumes; D and S are its matched and mismatched Dice.
        real: that of the real ones, of the same masks; R is its matched Dice.
        weights: (N,), of the cases.
    """
    chance, best = mismatched_dice(made, weights), matched_dice(real, weights)
    return (matched_dice(made, weights) - chance) / (best - chance) if best != chance else float("nan")


def measure(
    made: Sequence[Sequence[torch.Tensor]],
    real: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    spacing_mm: Sequence[np.ndarray],
    class_names: Sequence[str],
    picture: bytes,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the figures of mask fidelity, and a picture.

    Args:
        made: what the segmenter sees in S volumes for each of the N masks, S × N of (1, D, H, W).
        real: what it sees in the N real volumes.
        masks, own: N, see `dice_table`.
        spacing_mm: N of (3,).
        class_names: of classes 0 … K − 1.
        picture: of a sample and its mask.

    Raises:
        InputError: fewer than two cases.
    """
    num_cases, num_classes = len(masks), len(class_names)
    real_table = dice_table(real, masks, own, num_classes)
    tables = [dice_table(one, masks, own, num_classes) for one in made]

    def over_samples(statistic: Callable[[np.ndarray, np.ndarray | None], float]) -> dict[str, Any]:
        def mean(weights: np.ndarray | None = None) -> float:
            return float(np.mean([statistic(table, weights) for table in tables]))

        return {"value": rounded(mean()), "interval": interval(mean, num_cases)}

    def surfaces(predictions: Sequence[torch.Tensor]) -> np.ndarray:
        rows = zip(predictions, masks, own, spacing_mm, strict=True)
        return np.array([surface_distances(*row[:3], num_classes, row[3]) for row in rows])  # (N, 2, K − 1)

    figures = {
        "num_cases": num_cases,
        "num_samples": len(made),
        "normalised": over_samples(lambda table, w: normalised_fidelity(table, real_table, w)),
        "dice_made": over_samples(matched_dice),
        "dice_shuffled": over_samples(mismatched_dice),
        "dice_real": {
            "value": rounded(matched_dice(real_table)),
            "interval": interval(lambda w: matched_dice(real_table, w), num_cases),
        },
        "labels": _by_label(
            class_names,
            np.array([_own_pairs(table) for table in tables]),
            _own_pairs(real_table),
            np.array([surfaces(one) for one in made]),
            surfaces(real),
        ),
    }
    return figures, {PICTURE: picture}


def _by_label(
    class_names: Sequence[str], made_dice: np.ndarray, real_dice: np.ndarray, made: np.ndarray, real: np.ndarray
) -> dict[str, Any]:
    """Return, by label, Dice and surface distances on made (S, N, …) and real (N, …) volumes.

    `num_unseen` counts the volumes in which a label of the mask has no surface distance, for none of it was seen.
    """
    figures = {}
    for k, name in enumerate(class_names[1:]):
        of_made = {"dice": made_dice[..., k]} | {s: made[:, :, i, k] for i, s in enumerate(SURFACES)}  # (S, N)
        of_real = {"dice": real_dice[None, :, k]} | {s: real[None, :, i, k] for i, s in enumerate(SURFACES)}  # (1, N)
        figures[name] = {
            kind: {measure: _mean_of(values) for measure, values in of.items()}
            | {"num_unseen": int((~np.isnan(of["dice"]) & np.isnan(of["hd95"])).sum())}
            for kind, of in (("made", of_made), ("real", of_real))
        }
    return figures


def _mean_of(values: np.ndarray) -> dict[str, Any]:
    """Return the mean of (S, N), and its interval over the N cases."""
    known = ~np.isnan(values)
    counts = known.sum(0)
    cases = np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)
    mean = float(np.nanmean(cases)) if counts.any() else float("nan")
    return {"value": rounded(mean), "interval": mean_interval(cases)}


def _own_pairs(table: np.ndarray) -> np.ndarray:
    """Return the Dice (N, K − 1) of each volume with its own mask."""
    return table[np.arange(len(table)), np.arange(len(table))]


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    fidelity = figures["normalised"]
    off = fidelity["value"] is not None and fidelity["value"] < GOOD
    ends = [number(end, 3) for end in fidelity["interval"]]
    lines = {
        "D, on synthetic volumes": "dice_made",
        "R, on real volumes": "dice_real",
        "S, synthetic volumes against other cases' masks": "dice_shuffled",
    }
    rows = [[name, with_interval(figures[key]["value"], figures[key]["interval"], 3)] for name, key in lines.items()]
    measures = {"dice": "Dice", **SURFACES}
    of_labels = [
        [f"label {label}, {measures[measure]}"]
        + [with_interval(of[kind][measure]["value"], of[kind][measure]["interval"], 3) for kind in ("made", "real")]
        + [f"{of['made']['num_unseen']} / {of['real']['num_unseen']}"]
        for label, of in figures["labels"].items()
        for measure in measures
    ]
    head = ["", "synthetic", "real", "not seen at all, synthetic / real"]
    return (
        f"<p>(D − S) / (R − S) = {number(fidelity['value'], 3, off)} ({ends[0]} to {ends[1]}); 1 lies on its masks as "
        f"real volumes do, 0 takes no notice of them; {GOOD} is good.</p>{table(['', 'Dice'], rows)}"
        f"{table(head, of_labels)}{captioned(pictures[PICTURE], 'A sample, and the outline of its mask')}"
        + notes(
            [
                "By a segmenter that was trained on real volumes and has taught the model nothing. Dice is the mean "
                "over labels of means over the cases that have the label, on volumes' own voxels.",
                "Surface distances are means over the volumes in which the segmenter sees the label at all.",
            ]
        )
    )


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a model card says of it."""
    said = {key: with_interval(of["value"], of["interval"], 3) for key, of in figures.items() if "dice" in key}
    fidelity = with_interval(figures["normalised"]["value"], figures["normalised"]["interval"], 3)
    return (
        f"A segmenter trained on real cases has a Dice of {said['dice_made']} on synthetic volumes and their masks, "
        f"{said['dice_real']} on real ones and {said['dice_shuffled']} with other cases' masks: a normalised mask "
        f"fidelity of {fidelity}."
    )


def _mean_over_labels(dice: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean over the labels (…, L) of their weighted means, each over what is not NaN."""
    known = weights[:, None] * ~np.isnan(dice)
    if not known.any():
        return float("nan")
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(np.nansum(known * np.nan_to_num(dice), axis=0) / known.sum(axis=0)))
