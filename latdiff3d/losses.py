"""AutoencoderLoss: what stage 1 minimises, as named terms whose weights are arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latdiff3d.distributed import mean_over_ranks
from latdiff3d.errors import InputError
from latdiff3d.spectral_loss import spectral_distance

# Keeps the adaptive weight finite where the discriminator's gradient vanishes, and bounded where it nearly does;
# both values from Esser et al. 2021, arXiv:2012.09841, and its code.
ADAPTIVE_EPSILON = 1e-4
ADAPTIVE_MAX = 1e4


@dataclass
class Terms:
    """Named scalar loss terms, raw, the weight of each in the sum, and what else is worth logging."""

    raw: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, float | torch.Tensor] = field(default_factory=dict)
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, term: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Add a term."""
        self.raw[name], self.weights[name] = term, weight

    def total(self) -> torch.Tensor:
        """Return the weighted sum, what is minimised."""
        return torch.stack([self.weights[name] * term for name, term in self.raw.items()]).sum()

    def logged(self) -> dict[str, torch.Tensor]:
        """Return every term raw, under its name, and weighted, under `weighted_<name>`, and the notes; no gradients."""
        raw = {name: term.detach() for name, term in self.raw.items()}
        return raw | {f"weighted_{name}": self.weights[name] * term for name, term in raw.items()} | self.notes


class AutoencoderLoss:
    """Reconstruction, regularisation of the latents, and what makes sharp: perceptual and adversarial terms.

    Every term is a mean over elements, so that the sizes of patch and batch leave their balance alone, unless
    `kl_reduction` is "sum". Names that CompVis' latent-diffusion has are kept; where its meaning differs, it is said.

    Args:
        reconstruction: "l1" or "l2", the mean absolute or squared error over a volume's own voxels. CompVis has L1.
        logvar_init: the reconstruction, perceptual and spectral terms are divided by exp(logvar_init). CompVis declares
            it a parameter that no optimiser holds, so there too it is a constant; it adds the constant to the loss.
        kl_weight: weight of the KL divergence of the posterior from a standard normal.
        kl_reduction: "mean" over latent elements, or "sum" over a volume's latent elements and mean over the batch
            (MONAI's tutorials): the same `kl_weight` then weighs more by the number of latent elements. CompVis sums
            both KL and reconstruction over a volume, whose balance has, with "mean" here,
            kl_weight = its kl_weight × latent elements / image elements.
        codebook_weight: VQ: weight of the codebook and the commitment term together.
        commitment_weight: VQ: weight of the commitment term relative to the codebook's; CompVis' beta.
        perceptual_weight: weight of `perceptual`.
        perceptual: a module that compares (reconstruction, image), see perceptual.py; goes with a weight above 0.
        spectrum_weight: weight of `spectral_distance`, the missing energy at high frequencies.
        adversarial: "hinge" (Lim & Ye 2017, arXiv:1705.02894) or "least_squares" (Mao et al. 2017, arXiv:1611.04076).
        disc_weight: weight of the adversarial term, after the adaptive weight.
        feature_matching_weight: weight of the mean absolute difference of the discriminator's hidden features (Wang
            et al. 2018, arXiv:1711.11585), from `disc_start` on.
        disc_start: the first update (counted from 1) whose generator sees the discriminator.
        disc_warmup: for so many updates before `disc_start` the discriminator trains alone, so that it is not cold
            when it is first listened to.
        disc_ramp: over so many updates from `disc_start` on, both weights grow linearly to their full value.
        adaptive_weight: scale the adversarial term so that its gradient at the decoder's last layer is as long as the
            reconstruction's (Esser et al. 2021, Eq. 7).

    Raises:
        InputError: an unknown choice, a weight or a number of updates that is none or below 0, or a perceptual weight
            without a network, or the reverse.
    """

    def __init__(
        self,
        reconstruction: str = "l1",
        logvar_init: float = 0.0,
        kl_weight: float = 1e-4,
        kl_reduction: str = "mean",
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        perceptual_weight: float = 0.0,
        perceptual: nn.Module | None = None,
        spectrum_weight: float = 0.0,
        adversarial: str = "hinge",
        disc_weight: float = 0.1,
        feature_matching_weight: float = 0.0,
        disc_start: int = 1000,
        disc_warmup: int = 100,
        disc_ramp: int = 0,
        adaptive_weight: bool = True,
    ) -> None:
        for name, value, choices in (
            ("reconstruction", reconstruction, ("l1", "l2")),
            ("kl_reduction", kl_reduction, ("mean", "sum")),
            ("adversarial", adversarial, ("hinge", "least_squares")),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; expected {choices[0]!r} or {choices[1]!r}.")
        _require_updates(disc_start=disc_start, disc_warmup=disc_warmup, disc_ramp=disc_ramp)
        _require_weights(
            kl_weight=kl_weight, codebook_weight=codebook_weight, commitment_weight=commitment_weight,
            perceptual_weight=perceptual_weight, spectrum_weight=spectrum_weight, disc_weight=disc_weight,
            feature_matching_weight=feature_matching_weight,
        )  # fmt: skip
        if not _is_number(logvar_init):
            raise InputError(f"logvar_init is {logvar_init!r}; expected a number, such as 0.")
        if not isinstance(adaptive_weight, bool):
            raise InputError(f"adaptive_weight is {adaptive_weight!r}; expected true or false.")
        if (perceptual_weight > 0) != (perceptual is not None):
            found = "no" if perceptual is None else "a"
            raise InputError(
                f"perceptual_weight is {perceptual_weight} and there is {found} perceptual network; give both or "
                "neither: segmenter=RUN or loss::perceptual, and a weight such as 0.05."
            )
        self.reconstruction = reconstruction
        self.reconstruction_weight = math.exp(-logvar_init)
        self.kl_weight = kl_weight
        self.kl_reduction = kl_reduction
        self.codebook_weight = codebook_weight
        self.commitment_weight = commitment_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual = perceptual
        self.spectrum_weight = spectrum_weight
        self.adversarial = adversarial
        self.disc_weight = disc_weight
        self.feature_matching_weight = feature_matching_weight
        self.disc_start = disc_start
        self.disc_warmup = disc_warmup
        self.disc_ramp = disc_ramp
        self.adaptive_weight = adaptive_weight

    def reconstruction_terms(
        self, reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor, shown: torch.Tensor
    ) -> Terms:
        """Return the reconstruction term and, if they have a weight, the perceptual and the spectral one.

        Args:
            reconstruction: (B, C, D, H, W).
            image: of the same shape, in [0, 1].
            valid: (B, 1, D, H, W), 1 on the volume's own voxels, 0 on padding.
            shown: the reconstruction, with the image's own padding: what networks compare.
        """
        terms = Terms()
        distance = masked_l1 if self.reconstruction == "l1" else masked_l2
        terms.add(self.reconstruction, distance(reconstruction, image, valid), self.reconstruction_weight)
        if self.perceptual is not None and self.perceptual_weight > 0:
            weight = self.perceptual_weight * self.reconstruction_weight
            terms.add("perceptual", self.perceptual(shown, image), weight)
        if self.spectrum_weight > 0:
            weight = self.spectrum_weight * self.reconstruction_weight
            terms.add("spectrum", spectral_distance(reconstruction, image, valid), weight)
        return terms

    def add_regularisation(self, terms: Terms, *latents: Any) -> None:
        """Add the terms of the latents to `terms`.

        Args:
            latents: what an autoencoder returns behind its reconstruction: the posterior's mean and std, or the
                quantiser's terms by name.
        """
        if isinstance(latents[0], Mapping):
            weights = {"codebook": self.codebook_weight, "commitment": self.codebook_weight * self.commitment_weight}
            for name, term in latents[0].items():
                terms.add(name, term, weights[name])
        else:
            terms.add("kl", self.kl(*(moment.float() for moment in latents)), self.kl_weight)

    def add_adversarial(
        self,
        terms: Terms,
        number: int,
        fake: Sequence[torch.Tensor],
        real: Sequence[torch.Tensor] | None,
        layer: torch.Tensor,
        scale: float = 1.0,
    ) -> None:
        """Add what the discriminator has to say to `terms`, which hold the reconstruction's.

        Args:
            terms: so far.
            number: of the update, counted from 1.
            fake: the discriminator's features of the reconstruction, its scores last.
            real: of the image; needed by feature matching alone.
            layer: the decoder's last weight, where the adaptive weight compares gradients.
            scale: of the loss on its way back, see `adaptive_weight`.
        """
        score = generator_loss(fake[-1], self.adversarial)
        weight: float | torch.Tensor = self.disc_weight * self.ramp(number)
        if self.adaptive_weight:
            terms.notes["adaptive_weight"] = adaptive_weight(self._pull(terms), score, layer, scale)
            weight = weight * terms.notes["adaptive_weight"]
        terms.add("adversarial", score, weight)
        if real is not None and self.feature_matching_weight > 0:
            matching = feature_matching(fake[:-1], real[:-1])
            terms.add("feature_matching", matching, self.feature_matching_weight * self.ramp(number))

    def _pull(self, terms: Terms) -> torch.Tensor:
        pulling = [name for name in (self.reconstruction, "perceptual") if name in terms.raw]
        return torch.stack([terms.weights[name] * terms.raw[name] for name in pulling]).sum()

    @property
    def uses_discriminator(self) -> bool:
        """Whether a term of the discriminator has a weight."""
        return self.disc_weight > 0 or self.feature_matching_weight > 0

    def generator_sees_discriminator(self, number: int) -> bool:
        """Say whether the discriminator's terms count in the update `number`."""
        return self.uses_discriminator and number >= self.disc_start

    def discriminator_trains(self, number: int) -> bool:
        """Say whether the discriminator takes part in the update `number`."""
        return self.uses_discriminator and number >= self.disc_start - self.disc_warmup

    def ramp(self, number: int) -> float:
        """Return by how much the discriminator's weights have grown at the update `number`, in [0, 1]."""
        return min(1.0, (number - self.disc_start + 1) / (self.disc_ramp + 1))

    def kl(self, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Return the KL divergence of N(mean, std²) from N(0, 1), reduced as `kl_reduction` says.

        Args:
            mean: (B, C, D, H, W).
            std: of the same shape, above 0.
        """
        divergence = 0.5 * (mean**2 + std**2 - 1) - std.log()
        return divergence.mean() if self.kl_reduction == "mean" else divergence.sum() / len(mean)


def _require_updates(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"{name} is {value!r}; expected a whole number of updates from 0 on, such as 100.")


def _require_weights(**weights: Any) -> None:
    for name, value in weights.items():
        if not _is_number(value) or value < 0:
            raise InputError(f"{name} is {value!r}; expected a number from 0 on, such as 0.1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def masked_l1(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error over a volume's own voxels.

    Over several ranks each divides by the mean number of valid voxels, so that the mean of the ranks' losses is that
    of their joint batch.

    Args:
        reconstruction: (B, C, D, H, W).
        image: of the same shape.
        valid: (B, 1, D, H, W), 1 on the volume's own voxels, 0 on padding.
    """
    return _masked_mean((reconstruction - image).abs(), valid)


def masked_l2(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over a volume's own voxels; see `masked_l1`."""
    return _masked_mean((reconstruction - image) ** 2, valid)


def _masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return (values * valid).sum() / (mean_over_ranks(valid.sum()) * values.shape[1])


def volume_l1(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of each volume over its own voxels, (B,); arguments as of `masked_psnr`."""
    dims = (1, 2, 3, 4)
    return ((reconstruction - image).abs() * valid).sum(dims) / (valid.sum(dims) * image.shape[1])


def masked_psnr(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB of each volume, over its own voxels, for a data range of 1.

    Args:
        reconstruction: (B, C, D, H, W); clipped to [0, 1] first.
        image: of the same shape, in [0, 1].
        valid: (B, 1, D, H, W), 1 on the volume's own voxels.

    Returns:
        (B,).
    """
    dims = (1, 2, 3, 4)
    squared = ((reconstruction.clamp(0, 1) - image) ** 2 * valid).sum(dims)
    return -10 * torch.log10(squared / (valid.sum(dims) * image.shape[1]))


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """Return the discriminator's loss of its scores, "hinge" or "least_squares".

    MONAI's PatchAdversarialLoss squashes the scores by tanh before the hinge, so its hinge never bends and its gradient
    vanishes for a confident discriminator; hence this one.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (((real - 1) ** 2).mean() + (fake**2).mean())


def generator_loss(fake: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """Return the generator's loss of the discriminator's scores for its output, "hinge" or "least_squares"."""
    return -fake.mean() if kind == "hinge" else 0.5 * ((fake - 1) ** 2).mean()


def feature_matching(fake: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over layers of the mean absolute difference of the discriminator's features."""
    return torch.stack([F.l1_loss(one.float(), other.float()) for one, other in zip(fake, real, strict=True)]).mean()


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, layer: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Return by how much the adversarial loss is scaled to pull as hard as the reconstruction loss at `layer`.

    Both gradients are averaged over the ranks before they are measured, so all ranks get the joint batch's weight.

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss.
        layer: the weight both depend on, the decoder's last.
        scale: of both losses on their way back, where gradients that small are lost in float16; the weight is that of
            the losses as they are.
    """
    pull_rec, pull_adv = (_pull_at(layer, loss, scale) for loss in (reconstruction, adversarial))
    return (pull_rec.norm() / (pull_adv.norm() + ADAPTIVE_EPSILON)).clamp(0, ADAPTIVE_MAX)


def _pull_at(layer: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    (pull,) = torch.autograd.grad(scale * loss, layer, retain_graph=True)
    pull = mean_over_ranks(pull.float())
    # The scale is one that the weighted losses' sum bears, which says little of each alone.
    if scale > 1 and not torch.isfinite(pull).all():
        return _pull_at(layer, loss, scale / 256)
    return pull / scale
