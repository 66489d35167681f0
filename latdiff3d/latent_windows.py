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

# Of a window, that neighbours share at least. With half of it borders show no less, by benchmarks/whole_volume.py
# --compare; nor did they with windows that moved from call to call, at 1.7 times as many of them.
OVERLAP = 0.25


@dataclass(frozen=True)
class LatentWindows:
    """Where a denoiser looks at latents of any size.

    Args:
        size: (d, h, w) of the latents, each at least the window's.
        window: (d, h, w) of the training crop's latents.
        overlap: the least share of a window that neighbours have in common.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    overlap: float = OVERLAP

    @property
    def per_axis(self) -> list[list[slice]]:
        """Return of each axis the windows."""
        return [
            along(length, edge, math.ceil(self.overlap * edge))
            for length, edge in zip(self.size, self.window, strict=True)
        ]

    @property
    def number(self) -> int:
        """Return how many windows there are."""
        return math.prod(map(len, self.per_axis))

    def prediction(
        self,
        predict: Predict,
        noisy: torch.Tensor,
        condition: Condition,
        after_each: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        """Return the prediction (B, C, D, H, W) for latents of `size`.

        Args:
            predict: of latents of the window's size and their condition.
            noisy: z_t, (B, C, D, H, W).
            condition: of the whole.
            after_each: called after each window.
        """

        def in_box(box: Sequence[slice]) -> tuple[torch.Tensor]:
            made = predict(cut(noisy, box), condition.window(box))
            after_each()
            return (made,)

        return blended_boxes(in_box, self.per_axis, noisy.device)[0]
