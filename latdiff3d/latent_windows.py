"""Latents larger than the training crop: windows of its size, their predictions blended at every call.

A denoiser that was trained on crops is asked for nothing else: it sees windows of the crop's size, condition and all,
as in training. What is blended is what it predicts of one and the same z_t, never samples: noise is drawn once for the
whole, so that its variance stays, and neighbours agree on their overlap because at every call they are made to
(MultiDiffusion, Bar-Tal et al. 2023, Sec. 3, arXiv:2302.08113, with weights that fall towards a window's faces, as
Barbero Jiménez 2023, arXiv:2302.02412, has them). (z_0, ε) are linear in the prediction at a given z_t, so that
blending either, or what guidance makes of two predictions, is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latdiff3d.conditioning import Condition
from latdiff3d.guidance import Predict
from latdiff3d.norms import cut
from latdiff3d.tiling import along, blended_boxes

OVERLAP = 0.25  # of a window, that neighbours share at least; by benchmarks/whole_volume.py
# Between calls the windows move by these shares of their distance along D, H and W: g⁻¹, g⁻² and g⁻³ with g⁴ = g + 1,
# which spread evenly over all places (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
SHIFTS = (0.8191725134, 0.6710436067, 0.5497004779)


@dataclass(frozen=True)
class LatentWindows:
    """Where a denoiser looks at latents of any size.

    From call to call the windows move, so that no border between them stays in one place.

    Args:
        size: (d, h, w) of the latents, each at least the window's.
        window: (d, h, w) of the training crop's latents.
        overlap: the least share of a window that neighbours have in common.
        is_shifting: let windows move.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    overlap: float = OVERLAP
    is_shifting: bool = True

    def per_axis(self, call: int) -> list[list[slice]]:
        """Return of each axis the windows of the call with this number, from 0 on."""
        shifts = [call * share % 1 if self.is_shifting else 0.0 for share in SHIFTS]
        return [
            along(length, edge, math.ceil(self.overlap * edge), shift=shift)
            for length, edge, shift in zip(self.size, self.window, shifts, strict=True)
        ]

    def number(self, num_calls: int) -> int:
        """Return how many windows the first `num_calls` calls have in all."""
        return sum(math.prod(map(len, self.per_axis(call))) for call in range(num_calls))

    def prediction(
        self,
        predict: Predict,
        noisy: torch.Tensor,
        condition: Condition,
        call: int,
        after_each: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        """Return the prediction (B, C, D, H, W) for latents of `size`.

        Args:
            predict: of latents of the window's size and their condition.
            noisy: z_t, (B, C, D, H, W).
            condition: of the whole.
            call: its number, from 0 on.
            after_each: called after each window.
        """

        def in_box(box: Sequence[slice]) -> tuple[torch.Tensor]:
            made = predict(cut(noisy, box), condition.window(box))
            after_each()
            return (made,)

        return blended_boxes(in_box, self.per_axis(call), noisy.device)[0]
