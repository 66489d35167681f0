"""What the denoiser is asked to predict, and how its answer splits noisy latents into clean latents and noise."""

import torch


class Epsilon:
    """The denoiser predicts the noise (Ho et al. 2020, Eq. 14, arXiv:2006.11239).

    Noisy latents are z_t = √ᾱ_t · z_0 + √(1 − ᾱ_t) · ε.
    """

    def target(self, latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser should say: the noise itself.

        Args:
            latents: z_0, (B, C, D, H, W).
            noise: ε, of the same shape.
            alpha_bar: ᾱ_t, broadcastable to them.
        """
        return noise

    def split(
        self, prediction: torch.Tensor, noisy: torch.Tensor, alpha_bar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (z_0, ε) as implied by the denoiser's `prediction` at the noisy latents z_t."""
        return (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt(), prediction
