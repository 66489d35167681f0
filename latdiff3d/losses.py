"""AutoencoderLoss: what stage 1 minimises, as named terms whose weights are arguments."""

import torch
from torch.nn import functional as F

from latdiff3d.errors import InputError

# Keeps the adaptive weight finite where the discriminator's gradient vanishes, and bounded where it nearly does;
# both values from Esser et al. 2021, arXiv:2012.09841, and its code.
ADAPTIVE_EPSILON = 1e-4
ADAPTIVE_MAX = 1e4


class AutoencoderLoss:
    """L1 + KL, and a hinge adversarial term from `disc_start` on.

    Every term is a mean over elements, so that the patch's size and the batch's size leave their balance alone, unless
    `kl_reduction` is "sum".

    Args:
        kl_weight: weight of the KL divergence of the posterior from a standard normal.
        kl_reduction: "mean" over latent elements, or "sum" over a volume's latent elements and mean over the batch
            (CompVis, MONAI's tutorials): the same `kl_weight` then weighs more by the number of latent elements.
        disc_weight: weight of the adversarial term, after the adaptive weight.
        disc_start: the first iteration (counted from 1) whose generator update sees the discriminator.
        disc_warmup: for so many iterations before `disc_start` the discriminator trains alone, so that it is not cold
            when it is first listened to.
        adaptive_weight: scale the adversarial term so that its gradient at the decoder's last layer is as long as the
            reconstruction's (Esser et al. 2021, Eq. 7).

    Raises:
        InputError: for another `kl_reduction`.
    """

    def __init__(
        self,
        kl_weight: float = 1e-4,
        kl_reduction: str = "mean",
        disc_weight: float = 0.1,
        disc_start: int = 1000,
        disc_warmup: int = 100,
        adaptive_weight: bool = True,
    ) -> None:
        if kl_reduction not in ("mean", "sum"):
            raise InputError(f"kl_reduction is {kl_reduction!r}; expected 'mean' or 'sum'.")
        self.kl_weight = kl_weight
        self.kl_reduction = kl_reduction
        self.disc_weight = disc_weight
        self.disc_start = disc_start
        self.disc_warmup = disc_warmup
        self.adaptive_weight = adaptive_weight

    def generator_sees_discriminator(self, iteration: int) -> bool:
        """Say whether the adversarial term counts at `iteration`."""
        return self.disc_weight > 0 and iteration >= self.disc_start

    def discriminator_trains(self, iteration: int) -> bool:
        """Say whether the discriminator is updated at `iteration`."""
        return self.disc_weight > 0 and iteration >= self.disc_start - self.disc_warmup

    def kl(self, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Return the KL divergence of N(mean, std²) from N(0, 1), reduced as `kl_reduction` says.

        Args:
            mean: (B, C, D, H, W).
            std: of the same shape, above 0.
        """
        divergence = 0.5 * (mean**2 + std**2 - 1) - std.log()
        return divergence.mean() if self.kl_reduction == "mean" else divergence.sum() / len(mean)


def masked_l1(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error over a volume's own voxels.

    Args:
        reconstruction: (B, C, D, H, W).
        image: of the same shape.
        valid: (B, 1, D, H, W), 1 on the volume's own voxels, 0 on padding.
    """
    return ((reconstruction - image).abs() * valid).sum() / (valid.sum() * image.shape[1])


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


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the discriminator's hinge loss (Lim & Ye 2017, arXiv:1705.02894) of its scores.

    MONAI's PatchAdversarialLoss squashes the scores by tanh first, so its hinge never bends and its gradient vanishes
    for a confident discriminator; hence this one.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: torch.Tensor) -> torch.Tensor:
    """Return the generator's loss: minus the mean score of its output."""
    return -fake.mean()


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """Return by how much the adversarial loss is scaled to pull as hard as the reconstruction loss at `layer`.

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss.
        layer: the weight both depend on, the decoder's last.
    """
    (pull_rec,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (pull_adv,) = torch.autograd.grad(adversarial, layer, retain_graph=True)
    weight = pull_rec.float().norm() / (pull_adv.float().norm() + ADAPTIVE_EPSILON)
    return weight.clamp(0, ADAPTIVE_MAX).detach()
