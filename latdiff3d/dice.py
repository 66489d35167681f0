"""Dice: how far a segmentation of a volume, real or synthetic, overlaps the mask it belongs to, by label."""

import operator
from collections.abc import Sequence

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.metrics import compute_dice

from latdiff3d.errors import InputError


def label_dice(prediction: torch.Tensor, mask: torch.Tensor, valid: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the Dice overlap of each volume and label but the background, on the volume's own voxels.

    Args:
        prediction: (B, 1, D, H, W), labels 0 to num_classes − 1.
        mask: of the same shape, the truth.
        valid: of the same shape, 1 on the volume's own voxels.

    Returns:
        (B, num_classes − 1), NaN where the truth lacks the label.
    """
    inside = valid > 0
    return compute_dice(prediction * inside, mask * inside, include_background=False, num_classes=num_classes)


class MeanDice(Metric):
    """The mean Dice of one label over the volumes that have it, or the mean of all labels' means.

    Args:
        num_labels: without the background.
        index: of the label, 0 for the first after the background; None for the mean.
    """

    def __init__(self, num_labels: int, index: int | None = None) -> None:
        if num_labels < 1:
            raise InputError("labels has the background only; a segmenter needs one more at least.")
        self.num_labels = num_labels
        self.index = index
        super().__init__(output_transform=operator.itemgetter("dice"))

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all volumes."""
        self.sums = torch.zeros(self.num_labels)
        self.counts = torch.zeros(self.num_labels)

    @reinit__is_reduced
    def update(self, output: torch.Tensor) -> None:
        """Take in the Dice (B, num_labels) of further volumes."""
        dice = output.detach().float().cpu()
        self.sums += dice.nansum(0)
        self.counts += (~dice.isnan()).sum(0)

    @sync_all_reduce("sums", "counts")
    def compute(self) -> float:
        """Return the mean; NaN for a label that no volume has.

        Raises:
            InputError: when no volume has any label, and all labels' mean is asked for.
        """
        means = self.sums / self.counts  # NaN where no volume has the label
        if self.index is not None:
            return means[self.index].item()
        if not self.counts.any():
            raise InputError("no validation mask has a label but the background; validate on labelled cases.")
        return means.nanmean().item()


def dice_by_label(labels: Sequence[int], mask_mode: str) -> dict[str, MeanDice]:
    """Return a metric for each label but the background, named by the label as it is in the files.

    Args:
        labels: of the files, the background's first.
        mask_mode: "fine", or "coarse" for all labels in one.
    """
    names = [str(label) for label in labels[1:]] if mask_mode == "fine" else ["foreground"]
    return {f"dice_{name}": MeanDice(len(names), index) for index, name in enumerate(names)}
