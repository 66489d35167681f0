"""How much of a volume's fine detail a reconstruction keeps: the energy in each band of spatial frequencies."""

from collections.abc import Sequence

import numpy as np
from scipy import fft

# Shells of the spectrum between 0 and the Nyquist frequency; one more holds what lies beyond, in the cube's corners.
NUM_SHELLS = 20
HIGH = NUM_SHELLS // 2  # the first shell above half the Nyquist frequency


def shell_energies(volume: np.ndarray) -> np.ndarray:
    """Return the energy per voxel in shells of spatial frequency, whatever their direction.

    The mean is taken off and a Hann window laid over the volume, or the step from each face to the opposite one, which
    no blur of the inside takes away, would fill all frequencies and hide one. Frequencies are in voxels.

    Args:
        volume: (C, D, H, W).

    Returns:
        (C, NUM_SHELLS + 1): shell k holds what lies above k/20 and up to (k + 1)/20 of the Nyquist frequency, the first
        one the frequency 0 as well and the last one all above the Nyquist frequency. White noise of variance v has v
        in all, divided among the shells as `shell_shares`.
    """
    centred = volume.astype(np.float64)
    centred -= centred.mean(axis=(1, 2, 3), keepdims=True)
    weight = 1.0
    for axis, size in enumerate(volume.shape[1:], start=1):
        window = np.hanning(size + 2)[1:-1]  # without the zeros at its ends, so that one or two voxels have a window
        centred *= window.reshape([-1 if a == axis else 1 for a in range(4)])
        weight *= float((window**2).sum())
    power = np.abs(fft.fftn(centred, axes=(1, 2, 3))) ** 2 / (weight * centred[0].size)
    shells = _shells(volume.shape[1:])
    return np.stack([np.bincount(shells, channel.ravel(), NUM_SHELLS + 1) for channel in power])


def shell_shares(shape: Sequence[int]) -> np.ndarray:
    """Return each shell's share (NUM_SHELLS + 1,) of the frequencies of a volume of `shape` (D, H, W)."""
    return np.bincount(_shells(shape), minlength=NUM_SHELLS + 1) / np.prod(shape)


def high_frequency_energy(volume: np.ndarray) -> np.ndarray:
    """Return the energy per voxel above half the Nyquist frequency, see `shell_energies`, (C,) of (C, D, H, W)."""
    return shell_energies(volume)[:, HIGH:].sum(1)


def spectrum_ratio(image: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return a reconstruction's energy above half the Nyquist frequency over the image's, all channels together.

    1 is right, a blurred reconstruction is below, a noisy one above. NaN where the image is flat.

    Args:
        image: (C, D, H, W).
        reconstruction: the same shape.
    """
    real = float(high_frequency_energy(image).sum())
    return float(high_frequency_energy(reconstruction).sum()) / real if real > 0 else float("nan")


def _shells(shape: Sequence[int]) -> np.ndarray:
    """Return the shell (D * H * W,) of each frequency."""
    axes = np.meshgrid(*(2 * fft.fftfreq(size) for size in shape), indexing="ij", sparse=True)  # 1 is Nyquist
    radius = np.sqrt(sum(axis**2 for axis in axes))
    return np.clip(np.ceil(radius * NUM_SHELLS).astype(int) - 1, 0, NUM_SHELLS).ravel()
