"""What stage 2's denoiser is given to learn, channel by channel: how far the latents are from unit normals."""

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class ChannelMoments:
    """One latent channel, over posterior draws; a unit normal has 0, 1 and 0."""

    mean: float
    std: float
    excess_kurtosis: float  # E[(z − mean)⁴] / std⁴ − 3; NaN where std is 0
    noise_share: float  # of the variance, what the posterior's width gives: 1 is a channel that says nothing

    def as_dict(self) -> dict[str, float]:
        """Return plain numbers by name."""
        return asdict(self)


class LatentMoments:
    """Sums the first four moments of posterior draws, without drawing.

    A draw is m + s ε with ε a unit normal, so E z³ = m³ + 3 m s² and E z⁴ = m⁴ + 6 m² s² + 3 s⁴ in each cell. Every
    cell counts, those over padding too: the denoiser sees them all.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int) -> None:
        self.num_cells = 0
        self.powers = torch.zeros(4, num_channels, dtype=torch.float64)  # sums of z, z², z³, z⁴
        self.noise = torch.zeros(num_channels, dtype=torch.float64)  # sum of s²

    def update(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Add the normalised posteriors of a batch, mean and std (B, C, D, H, W)."""
        m, s = (moment.detach().double().cpu() for moment in (mean, std))
        powers = (m, m**2 + s**2, m**3 + 3 * m * s**2, m**4 + 6 * m**2 * s**2 + 3 * s**4)
        self.powers += torch.stack([power.sum(dim=(0, 2, 3, 4)) for power in powers])
        self.noise += (s**2).sum(dim=(0, 2, 3, 4))
        self.num_cells += m.numel() // m.shape[1]

    def channels(self) -> list[ChannelMoments]:
        """Return what has been summed so far, one entry a channel.

        Raises:
            ValueError: before any update.
        """
        if self.num_cells == 0:
            raise ValueError("LatentMoments has seen no latents.")
        e1, e2, e3, e4 = self.powers / self.num_cells  # each (C,)
        variance = (e2 - e1**2).clamp(min=0)
        fourth = e4 - 4 * e1 * e3 + 6 * e1**2 * e2 - 3 * e1**4
        table = torch.stack([e1, variance.sqrt(), fourth / variance**2 - 3, self.noise / self.num_cells / variance], 1)
        return [ChannelMoments(*row) for row in table.tolist()]
