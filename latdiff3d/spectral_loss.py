"""Stage 1's term against blur: reconstructions shall hold as much energy at high frequencies as their volumes."""

import torch

# In units of the Nyquist frequency; where spectrum.py measures from.
CUT_OFF = 0.5
# Far below the energy of any scan's noise, in squared intensity; keeps flat volumes out of the logarithm's pole.
FLOOR = 1e-8


def spectral_distance(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean squared logarithm of the ratio of high-frequency energies, over volumes and modalities.

    A pixel-wise loss leaves out what it cannot predict, so reconstructions are blurred. Adversarial terms invent it,
    which costs as much error as it adds energy; this one asks for the energy alone, whatever its phase. Beside a
    pixel-wise loss, which holds the phase, the cheapest answer is to amplify the detail that is predicted, and that
    costs a fraction. The spectrum's radial profile as a loss is of Durall et al. 2020 (arXiv:2003.01826); here it has
    one band, everything above half the Nyquist frequency, so that no gain is spent on shells that hold only noise.
    Squared, it pulls the less the nearer it is, and comes to rest below a ratio of 1, where the pixels pull as hard.

    Energies are those of `spectrum.high_frequency_energy`: of a volume's own voxels, under a Hann window.

    Args:
        reconstruction: (B, C, D, H, W), in float32.
        image: of the same shape, in [0, 1].
        valid: (B, 1, D, H, W), 1 on the volume's own voxels, which fill a box, and 0 on padding.
    """
    ratios = []
    for made, real, own in zip(reconstruction, image, valid, strict=True):
        box = _box(own[0])
        ratios.append(_energy(made[box]).add(FLOOR).log() - _energy(real[box]).add(FLOOR).log())  # (C,)
    return torch.stack(ratios).square().mean()


def _box(own: torch.Tensor) -> tuple[slice, ...]:
    """Return the box (C, D, H, W) of what is 1 in `own` (D, H, W)."""
    spans = []
    for axis in range(3):
        inside = own.amax(dim=[a for a in range(3) if a != axis]).nonzero()
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return (slice(None), *spans)


def _energy(volume: torch.Tensor) -> torch.Tensor:
    """Return the energy per voxel above the cut-off, (C,) of (C, D, H, W)."""
    volume = volume.float() - volume.float().mean(dim=(1, 2, 3), keepdim=True)
    squared_radius: torch.Tensor | float = 0.0
    weight: torch.Tensor | float = 1.0
    for axis, size in enumerate(volume.shape[1:], start=1):
        along = [-1 if a == axis else 1 for a in range(4)]
        window = torch.hann_window(size + 2, periodic=False, device=volume.device)[1:-1]  # without its zeros
        volume = volume * window.view(along)
        weight = weight * window.square().sum()
        squared_radius = squared_radius + (2 * torch.fft.fftfreq(size, device=volume.device)).square().view(along)
    power = torch.fft.fftn(volume, dim=(1, 2, 3)).abs().square() / (weight * volume[0].numel())
    return (power * (squared_radius > CUT_OFF**2)).sum(dim=(1, 2, 3))
