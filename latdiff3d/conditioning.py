"""The condition lives on the latent grid: a mask becomes one-hot, then fractions of each label per latent cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional as F

from latdiff3d.covariates import MISSING
from latdiff3d.errors import InputError
from latdiff3d.norms import cut


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told of a batch beside noisy latents and times.

    Attributes:
        grid: (B, K, D, H, W) on the latent grid, or None for a model without masks.
        covariates: (B, N), NaN where nothing is known, or None for a model without any.
    """

    grid: torch.Tensor | None = None
    covariates: torch.Tensor | None = None

    def __bool__(self) -> bool:
        """Say whether it is one, and not an unconditional model's."""
        return self.grid is not None or self.covariates is not None

    def null(self, null_value: float) -> "Condition":
        """Return the one that says nothing: the grid holds `null_value` everywhere, every covariate is missing."""
        return self.combined(self, lambda a, _: torch.full_like(a, null_value if a is self.grid else MISSING))

    def combined(self, other: "Condition", how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> "Condition":
        """Return the two, of one model, as one: `how` makes one tensor of theirs."""
        pairs = (self.grid, other.grid), (self.covariates, other.covariates)
        return Condition(*(None if a is None or b is None else how(a, b) for a, b in pairs))

    def window(self, box: Sequence[slice]) -> "Condition":
        """Return the part that is said of a box, slices of D, H and W on the latent grid."""
        return Condition(None if self.grid is None else cut(self.grid, box), self.covariates)

    def to(self, device: torch.device) -> "Condition":
        """Return it on `device`."""
        return self.combined(self, lambda a, _: a.to(device))


class MaskCondition:
    """Concatenates the mask to the denoiser's input, as the fraction of each label in each latent cell.

    Fractions rather than the nearest label: a lesion smaller than a cell still counts.

    Args:
        num_classes: K, labels 0 … K − 1 of the mapped mask, background included.
        factor: the autoencoder's downsampling.

    Attributes:
        null_value: what stands everywhere when nothing is said. No mask gives it: fractions sum to 1 in every cell.
    """

    null_value = 0.0

    def __init__(self, num_classes: int, factor: int) -> None:
        self.num_classes = num_classes
        self.factor = factor

    @property
    def num_channels(self) -> int:
        """How many channels it has."""
        return self.num_classes

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """Return fractions (B, K, D/f, H/f, W/f) in [0, 1] that sum to 1 over K.

        Args:
            mask: (B, 1, D, H, W), whole numbers 0 … K − 1.

        Raises:
            InputError: for a label outside 0 … K − 1.
        """
        labels = self._labels(mask)
        # One label at a time: all of a whole volume's at once, in one_hot's int64, would take more than the rest.
        shares = [F.avg_pool3d((labels == k).float(), self.factor) for k in range(self.num_classes)]
        return torch.cat(shares, dim=1)

    def _labels(self, mask: torch.Tensor) -> torch.Tensor:
        labels = mask.long()
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise InputError(
                f"the mask has labels {labels.unique().tolist()}; expected 0 to {self.num_classes - 1} after mapping. "
                "Check `labels` and `mask_mode` in the configuration."
            )
        return labels


class ScalarCondition(MaskCondition):
    """Concatenates the mask as one channel of numbers: label / (K − 1), mean over each latent cell.

    What CompVis-style 3D models on BraTS take, whose masks are label / 3. Labels are no quantities: half a cell of
    label 2 looks like a whole one of label 1, which `MaskCondition` tells apart.

    Attributes:
        null_value: −1, for 0 is background.
    """

    null_value = -1.0

    @property
    def num_channels(self) -> int:
        """How many channels it has."""
        return 1

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """Return numbers (B, 1, D/f, H/f, W/f) in [0, 1]; see `MaskCondition.__call__`."""
        return F.avg_pool3d(self._labels(mask).float() / max(self.num_classes - 1, 1), self.factor)


class PackedCondition(MaskCondition):
    """The whole mask on the latent grid, for a network to encode that is trained with the denoiser.

    Each cell's voxels become channels (space to depth), so that nothing is averaged away, and latent crops, dropout,
    guidance and the latent cache treat it as any condition.

    Attributes:
        null_value: 0. No mask gives it: of each voxel's K channels one is 1.
    """

    @property
    def num_channels(self) -> int:
        """How many channels the encoder is given: K · f³."""
        return self.num_classes * self.factor**3

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the one-hot mask (B, K · f³, D/f, H/f, W/f), the label outermost; see `MaskCondition.__call__`."""
        labels = self._labels(mask)
        one_hot = torch.cat([labels == k for k in range(self.num_classes)], dim=1)  # (B, K, D, H, W), bool
        packed = rearrange(one_hot, "b k (d i) (h j) (w l) -> b (k i j l) d h w", **dict.fromkeys("ijl", self.factor))
        return packed.float()


def dropped(condition: Condition, probability: float, null_value: float) -> Condition:
    """Return `condition` with each volume's, mask and covariates alike, replaced by the null with `probability`.

    A denoiser trained so has learnt both predictions that classifier-free guidance needs.
    """
    given = condition.covariates if condition.grid is None else condition.grid
    if probability == 0 or given is None:
        return condition
    keep = torch.rand(len(given), device=given.device) >= probability
    null = condition.null(null_value)
    return condition.combined(null, lambda a, b: torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b))


class NoCondition:
    """The unconditional model: nothing is concatenated."""

    num_channels = 0
    null_value = 0.0

    def __call__(self, mask: torch.Tensor) -> None:
        """Return None, whatever the mask."""


def condition_for(conditioning: str, num_classes: int, factor: int) -> MaskCondition | NoCondition:
    """Return the condition that the setting `conditioning` names: "concat", "scalar", "encoder" or "none".

    Raises:
        InputError: for any other name.
    """
    if conditioning == "concat":
        return MaskCondition(num_classes, factor)
    if conditioning == "scalar":
        return ScalarCondition(num_classes, factor)
    if conditioning == "encoder":
        return PackedCondition(num_classes, factor)
    if conditioning == "none":
        return NoCondition()
    raise InputError(f"conditioning is {conditioning!r}; expected 'concat', 'scalar', 'encoder' or 'none'.")


def num_condition_channels(conditioning: str, num_classes: int, factor: int = 1) -> int:
    """Return how many channels the condition has; the configurations in checkpoints of earlier versions ask so."""
    return condition_for(conditioning, num_classes, factor).num_channels
