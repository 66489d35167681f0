"""Covariates enter the denoiser beside the time: one learnt embedding of each, and one of each that is not known."""

from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from latdiff3d.covariates import Covariate, Covariates
from latdiff3d.errors import InputError

# Of the sines and cosines that a standardised number is shown as, in radians a standard deviation: from half a wave
# over all that occurs to differences of a few tenths.
FREQUENCIES = (0.5, 1.0, 2.0, 4.0)


class NumberEmbedding(nn.Module):
    """A number's embedding: itself, its sines and cosines, through two layers."""

    def __init__(self, mean: float, std: float, channels: int) -> None:
        super().__init__()
        self.mean = mean
        self.std = std
        self.layers = nn.Sequential(
            nn.Linear(1 + 2 * len(FREQUENCIES), channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return (B, E) of `value` (B,)."""
        standard = ((value - self.mean) / self.std)[:, None]  # (B, 1)
        angles = standard * standard.new_tensor(FREQUENCIES)  # (B, F)
        return self.layers(torch.cat([standard, angles.sin(), angles.cos()], dim=1))


class ClassEmbedding(nn.Embedding):
    """A class' embedding, of its number as a float."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return (B, E) of `value` (B,)."""
        return super().forward(value.long())


class CovariateEmbedding(nn.Module):
    """The sum of all covariates' embeddings, in place of `DiffusionModelUNet.class_embedding`.

    A value that is missing has an embedding of its own, learnt as the others are: not that of a likely value.

    Args:
        covariates: at least one.
        channels: E, of the time's embedding.
    """

    def __init__(self, covariates: Covariates, channels: int) -> None:
        super().__init__()
        columns = [covariate for covariate in covariates.known for _ in range(covariate.num_columns)]
        self.columns = nn.ModuleList(_embedding(covariate, channels) for covariate in columns)
        self.missing = nn.Embedding(len(columns), channels)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (B, E) of `numbers` (B, N), which are NaN where nothing is known."""
        embedded = []
        for column, value, missing in zip(self.columns, numbers.unbind(1), self.missing.weight, strict=True):
            known = column(value.nan_to_num())  # (B, E)
            embedded.append(torch.where(value.isnan()[:, None], missing.to(known), known))
        return torch.stack(embedded).sum(0)


def with_covariates(denoiser: Any, covariates: Covariates) -> nn.Module:
    """Return `denoiser`, which takes numbers (B, N) as `class_labels` from now on; as it is where there are none.

    Args:
        denoiser: a DiffusionModelUNet without classes of its own. Changed in place.
        covariates: see there.

    Raises:
        InputError: for another denoiser.
    """
    if not len(covariates):
        return denoiser
    if not isinstance(denoiser, DiffusionModelUNet) or denoiser.num_class_embeds is not None:
        raise InputError(
            f"covariates are set, and denoiser_def is a {type(denoiser).__name__} with num_class_embeds "
            f"{getattr(denoiser, 'num_class_embeds', None)}; expected a DiffusionModelUNet without. Leave either out."
        )
    unet: Any = denoiser
    unet.num_class_embeds = covariates.num_columns
    unet.class_embedding = CovariateEmbedding(covariates, unet.time_embed[-1].out_features)
    return unet


def _embedding(covariate: Covariate, channels: int) -> nn.Module:
    if covariate.classes:
        return ClassEmbedding(len(covariate.classes), channels)
    return NumberEmbedding(covariate.mean, covariate.std, channels)
