"""Stage 1's term against blur: reconstructions shall hold as much energy at high frequencies as their volumes."""

import torch
from torch.nn import functional as F

# A half-band low pass: 1 at frequency 0, ½ at half the Nyquist frequency, 0 at the Nyquist frequency.
LOW_PASS = (-1 / 32, 0.0, 9 / 32, 16 / 32, 9 / 32, 0.0, -1 / 32)
# Far below the energy of any scan's noise, in squared intensity; keeps flat volumes out of the logarithm's pole.
FLOOR = 1e-8


def spectral_distance(reconstruction: torch.Tensor, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean squared logarithm of the ratio of high-frequency energies, over volumes and modalities.

    A pixel-wise loss leaves out what it cannot predict, so reconstructions are blurred. Adversarial terms invent it,
    which costs as much error as it adds energy; this one asks for the energy alone, whatever its phase. Beside a
    pixel-wise loss, which holds the phase, the cheapest answer is to amplify the detail that is predicted, and that
    costs a fraction. The spectrum's radial profile as a loss is of Durall et al. 2020 (arXiv:2003.01826); here it has
    one band, from about half the Nyquist frequency on in any direction, so that no gain is spent on frequencies that
    hold only noise. Squared, it pulls the less the nearer it is, and comes to rest below a ratio of 1, where the pixels
    pull as hard.

    The band is what a low pass leaves over, at every voxel alike. A window would let the middle of a volume answer for
    all of it, and `spectrum.spectrum_ratio`, which has one, stays a measure that nothing was trained on.

    Args:
        reconstruction: (B, C, D, H, W).
        image: of the same shape, in [0, 1].
        valid: (B, 1, D, H, W), 1 on the volume's own voxels and 0 on padding, which does not count.
    """
    inside = _inside(valid)
    ratio = (_energies(reconstruction, inside) + FLOOR).log() - (_energies(image, inside) + FLOOR).log()  # (B, C)
    return ratio.square().mean()


def _inside(valid: torch.Tensor) -> torch.Tensor:
    """Return 1 where the filter sees own voxels alone: (B, 1, D, H, W) less half a filter at each side."""
    return 1 - F.max_pool3d(1 - valid.float(), len(LOW_PASS), stride=1)


def _energies(volumes: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return the mean square (B, C) of what a low pass leaves over of `volumes`, where `inside` is 1."""
    volumes = volumes.float()
    low = volumes.flatten(0, 1).unsqueeze(1)
    for axis in range(2, 5):
        shape = [1] * 5
        shape[axis] = len(LOW_PASS)
        low = F.conv3d(low, low.new_tensor(LOW_PASS).view(shape))
    margin = len(LOW_PASS) // 2
    high = volumes[..., margin:-margin, margin:-margin, margin:-margin] - low.view(*volumes.shape[:2], *low.shape[2:])
    return (high.square() * inside).sum(dim=(2, 3, 4)) / inside.sum(dim=(2, 3, 4)).clamp(min=1)
