"""Classifier-free guidance: two predictions, with the condition and without it, extrapolated to one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latdiff3d.conditioning import Condition
from latdiff3d.errors import InputError

# Takes noisy latents (B, C, D, H, W) and their condition; returns the denoiser's predictions.
Predict = Callable[[torch.Tensor, Condition], torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are pushed towards their condition (Ho and Salimans 2022, Eq. 6, arXiv:2207.12598).

    The prediction becomes null + scale · (conditional − null). What a denoiser predicts is, at given noisy latents, a
    linear function of the clean ones, so this is the same whatever its objective.

    Args:
        scale: 1 is the denoiser's own prediction, at the cost of one; above 1, conditions show more and volumes vary
            less; 0 ignores the condition.
        interval: noise levels σ_t, lowest and highest, within which guidance acts; outside it the scale is 1. Guidance
            at high noise costs variety and at low noise changes nothing (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        null_value: what stands in a grid that says nothing, see `conditioning.Condition.null`.
        in_sequence: call the denoiser twice instead of with a batch twice as large: half the memory.
        against: of the batch, what samples are pushed away from; None for the null. Any other condition needs no
            `condition_dropout` (as Liu et al. 2022 negate a concept, arXiv:2206.01714).

    Raises:
        InputError: a negative scale, or an interval that is none.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    null_value: float = 0.0
    in_sequence: bool = False
    against: Condition | None = None

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise InputError(f"guidance is {self.scale}; expected a number from 0 on, such as 2.")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"guidance_interval is [{low}, {high}]; expected two noise levels, 0 ≤ low ≤ high ≤ 1.")

    def acts(self, sigma: float) -> bool:
        """Say whether the null is asked too at noise level `sigma`."""
        return self.scale != 1 and self.interval[0] <= sigma <= self.interval[1]

    def __call__(self, predict: Predict, noisy: torch.Tensor, condition: Condition, sigma: float) -> torch.Tensor:
        """Return the guided prediction.

        Args:
            predict: of any batch.
            noisy: z_t, (B, C, D, H, W).
            condition: of the batch; that of an unconditional model, which is empty, cannot guide.
            sigma: σ_t, the share of noise in z_t, 0 … 1.
        """
        if not condition or not self.acts(sigma):
            return predict(noisy, condition)
        null = condition.null(self.null_value) if self.against is None else self.against.to(noisy.device)
        if self.in_sequence:
            with_condition, without = predict(noisy, condition), predict(noisy, null)
        else:
            both = predict(torch.cat([noisy, noisy]), condition.combined(null, lambda a, b: torch.cat([a, b])))
            with_condition, without = both.chunk(2)
        return without + self.scale * (with_condition - without)


def guidance_for(
    scale: float, interval: Sequence[float], null_value: float, in_sequence: bool, condition_dropout: float
) -> Guidance:
    """Return the guidance of a denoiser trained with `condition_dropout`.

    Raises:
        InputError: what `Guidance` refuses, or another scale than 1 for a denoiser that never went without condition.
    """
    if scale != 1 and condition_dropout == 0:
        raise InputError(
            f"guidance is {scale}, but this model is unconditional or was trained with condition_dropout 0, and cannot "
            "say what it would predict without its condition; leave guidance at 1, or train with condition_dropout=0.1."
        )
    low, high = interval
    return Guidance(scale, (low, high), null_value, in_sequence)
