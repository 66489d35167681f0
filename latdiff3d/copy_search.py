"""The nearest training volumes of a volume, in image, latent and feature space, and how unlikely it is to be so near.

A volume's *closeness* is its distance to the nearest training volume over its mean distance to the next ones: what is
near to all of them, such as a blurred mean, is near to none in particular (Carlini et al. 2023, Sec. 5.1,
arXiv:2301.13188). Which closeness is too small, real held-out volumes say: a volume's p-value is the share of them that
are as close, itself counted among them. One that is drawn as they are has a p-value of at most `LEVEL` with at most
that probability (Vovk et al. 2005; Bates et al. 2023, arXiv:2104.08279).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn

from latdiff3d.codec import LatentCodec
from latdiff3d.handlers import progress_bar
from latdiff3d.latent_entries import Flip
from latdiff3d.nearest import Matches, ShiftedCorrelation, StandardisedDistance, View, Volume, coarse, flipped
from latdiff3d.segmentation import encoder_features

LEVEL = 0.05  # of p-values that are too small
NUM_NEIGHBOURS = 50  # after the nearest, as Carlini et al.
REACH_VOXELS = (
    4  # by which a volume is shifted along each axis, or one cell of the grid that is shifted where that is more
)

Matcher = Callable[[View], Matches]


class Space(NamedTuple):
    """What volumes are compared by.

    Attributes:
        view: of an image and its own voxels.
        matcher: of the training volumes' views.
        cell: voxels along the edge of a step by which views are shifted.
        reach_voxels: the largest shift along each axis.
    """

    view: Callable[[torch.Tensor, torch.Tensor], View]
    matcher: Callable[[Sequence[View]], Matcher]
    cell: int = 1
    reach_voxels: int = 0


class Found(NamedTuple):
    """What was found for M volumes among N training volumes in one space, each flipped and shifted as it fits best."""

    apart: np.ndarray  # (M, N)
    flip: np.ndarray  # (M, N), indices of the flips
    shift: np.ndarray  # (M, N, 3), in voxels


def spaces_for(
    shape: Sequence[int], codec: LatentCodec | None, judge: nn.Module | None, longest: int = 32
) -> dict[str, Space]:
    """Return the spaces to look in: image, and with a codec latent, and with a segmenter that is a UNet features.

    Args:
        shape: (D, H, W) of the volumes.
        codec: of the model that is looked at.
        judge: from `segmentation.load_judge`.
        longest: cells along an axis of the grid on which images are compared, at most.
    """
    _, cell = coarse(View(torch.zeros(1, *shape), torch.ones(1, *shape)), longest)
    spaces = {"image": _shifted_space(lambda image, own: coarse(View(image, own), longest)[0], cell)}
    if codec is not None:
        spaces["latent"] = _shifted_space(_latents_by(codec), codec.factor)
    if isinstance(judge, UNet):
        spaces["features"] = Space(_features_by(judge), StandardisedDistance)
    return spaces


class Search:
    """Finds the nearest of the training volumes in several spaces.

    Args:
        training: what is searched, all on one grid.
        spaces: by name, see `spaces_for`.
        flips: axes along which volumes are mirrored together, none of them first.
    """

    def __init__(self, training: Sequence[Volume], spaces: Mapping[str, Space], flips: Sequence[Flip]) -> None:
        self.spaces, self.flips = spaces, flips
        views: dict[str, list[View]] = {name: [] for name in spaces}
        for volume in progress_bar(training, desc="training volumes", unit="volume", leave=False):
            for name, space in spaces.items():
                views[name].append(space.view(*_tensors(volume)))
        self.matchers = {name: space.matcher(views[name]) for name, space in spaces.items()}

    def __call__(self, volumes: Sequence[Volume], what: str) -> dict[str, Found]:
        """Return what is found in each space for volumes, which a progress bar calls `what`."""
        rows: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in self.spaces}
        for volume in progress_bar(volumes, desc=what, unit="volume", leave=False):
            for name in self.spaces:
                rows[name].append(self._row(name, *_tensors(volume)))
        return {name: Found(*(np.stack(column) for column in zip(*of, strict=True))) for name, of in rows.items()}

    def _row(self, name: str, image: torch.Tensor, own: torch.Tensor) -> tuple[np.ndarray, ...]:
        space, matcher = self.spaces[name], self.matchers[name]
        matches = [matcher(space.view(flipped(image, flip), flipped(own, flip))) for flip in self.flips]
        apart = torch.stack([match.apart for match in matches])  # (flips, N)
        best = apart.argmin(0)
        shift = torch.stack([match.shift for match in matches])[best, torch.arange(len(best))]  # (N, 3)
        return apart.amin(0).numpy(), best.numpy(), shift.numpy() * space.cell


def closeness(apart: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS) -> np.ndarray:
    """Return of each volume its distance to the nearest training volume over the mean one to the next ones, (M,).

    0 for a copy, 1 for a volume that is as near to all of them.

    Args:
        apart: (M, N), from each to all training volumes.
        num_neighbours: how many the next ones are, where there are so many.
    """
    ordered = np.sort(apart, axis=1)[:, : num_neighbours + 1]
    return ordered[:, 0] / np.maximum(ordered[:, 1:].mean(axis=1), np.finfo(np.float32).tiny)


def p_values(scores: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return of each score (M,) the share of those of `null` (n,), itself counted among them, that are no larger."""
    return (1 + (null[None] <= scores[:, None]).sum(1)) / (1 + len(null))


def own_p_values(null: np.ndarray) -> np.ndarray:
    """Return the p-value of each of `null` (n,) among the others: what is flagged though nothing was memorised."""
    return (null[None] <= null[:, None]).sum(1) / len(null)  # itself is among them


def threshold(null: np.ndarray, level: float = LEVEL) -> float:
    """Return the closeness below which the p-value is at most `level`."""
    return float(np.sort(null)[int(np.floor(level * (len(null) + 1) + 1e-9)) - 1])


def _shifted_space(view: Callable[[torch.Tensor, torch.Tensor], View], cell: int) -> Space:
    reach = -(-REACH_VOXELS // cell)
    return Space(view, lambda views: ShiftedCorrelation(views, reach), cell, reach * cell)


def _latents_by(codec: LatentCodec) -> Callable[[torch.Tensor, torch.Tensor], View]:
    def view(image: torch.Tensor, own: torch.Tensor) -> View:
        latents = codec.encode(image[None].to(codec.latent_mean.device))[0][0].cpu()  # (C', d, h, w)
        return View(latents, (nn.functional.avg_pool3d(own.float()[None], codec.factor)[0] >= 0.5).float())

    return view


def _features_by(judge: UNet) -> Callable[[torch.Tensor, torch.Tensor], View]:
    def view(image: torch.Tensor, own: torch.Tensor) -> View:
        device = next(judge.parameters()).device
        features = encoder_features(judge, image[None].to(device), own[None].to(device))[0].cpu()
        return View(features.view(-1, 1, 1, 1), torch.ones(1, 1, 1, 1))

    return view


def _tensors(volume: Volume) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(volume.image, dtype=torch.float32), torch.as_tensor(volume.own, dtype=torch.float32)
