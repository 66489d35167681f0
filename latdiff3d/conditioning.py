"""The condition lives on the latent grid: a mask becomes one-hot, then fractions of each label per latent cell."""

import torch
from einops import rearrange
from torch.nn import functional as F

from latdiff3d.errors import InputError


class MaskCondition:
    """Concatenates the mask to the denoiser's input, as the fraction of each label in each latent cell.

    Fractions rather than the nearest label: a lesion smaller than a cell still counts.

    Args:
        num_classes: K, labels 0 … K − 1 of the mapped mask, background included.
        factor: the autoencoder's downsampling.
    """

    def __init__(self, num_classes: int, factor: int) -> None:
        self.num_classes = num_classes
        self.factor = factor

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """Return fractions (B, K, D/f, H/f, W/f) in [0, 1] that sum to 1 over K.

        Args:
            mask: (B, 1, D, H, W), whole numbers 0 … K − 1.

        Raises:
            InputError: for a label outside 0 … K − 1.
        """
        labels = mask.long()
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise InputError(
                f"the mask has labels {labels.unique().tolist()}; expected 0 to {self.num_classes - 1} after mapping. "
                "Check `labels` and `mask_mode` in the configuration."
            )
        one_hot = rearrange(F.one_hot(labels[:, 0], self.num_classes), "b d h w k -> b k d h w").float()
        return F.avg_pool3d(one_hot, self.factor)


def null_like(condition: torch.Tensor) -> torch.Tensor:
    """Return the condition that says nothing, of the shape of `condition` (B, K, D, H, W): no label anywhere.

    No mask gives it, for its fractions sum to 1 everywhere, the background's among them.
    """
    return torch.zeros_like(condition)


def dropped(condition: torch.Tensor, probability: float) -> torch.Tensor:
    """Return `condition` (B, K, D, H, W) with each volume's replaced by the null with `probability`.

    A denoiser trained so has learnt both predictions that classifier-free guidance needs.
    """
    if probability == 0:
        return condition
    keep = torch.rand(len(condition), device=condition.device) >= probability
    return torch.where(keep.view(-1, 1, 1, 1, 1), condition, null_like(condition))


class NoCondition:
    """The unconditional model: nothing is concatenated."""

    num_classes = 0

    def __call__(self, mask: torch.Tensor) -> None:
        """Return None, whatever the mask."""


def condition_for(conditioning: str, num_classes: int, factor: int) -> MaskCondition | NoCondition:
    """Return the condition that the setting `conditioning` names: "concat" or "none".

    Raises:
        InputError: for any other name.
    """
    if conditioning == "concat":
        return MaskCondition(num_classes, factor)
    if conditioning == "none":
        return NoCondition()
    raise InputError(f"conditioning is {conditioning!r}; expected 'concat' or 'none'.")


def num_condition_channels(conditioning: str, num_classes: int) -> int:
    """Return how many channels the condition adds to the denoiser's input."""
    return condition_for(conditioning, num_classes, factor=1).num_classes
