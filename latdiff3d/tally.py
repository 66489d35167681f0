"""What the reconstructions of one code, trained or linear, come to over many cases: means of fidelity and spectrum."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latdiff3d.fidelity import errors_by_label, ms_ssim, num_scales, psnr, ssim
from latdiff3d.spectrum import HIGH, shell_energies

# A case without any error counts as this, or its infinity would be the mean of all.
PSNR_CAP_DB = 100.0


class Tally:
    """Adds up, case by case.

    Args:
        device: where SSIM is computed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.psnr: list[float] = []  # all channels together
        self.psnr_by_channel: list[list[float]] = []
        self.ssim: list[np.ndarray] = []  # (C,) each
        self.mae: list[np.ndarray] = []
        self.ms_ssim: list[np.ndarray] = []
        self.scales: list[int] = []
        self.energies: list[np.ndarray] = []  # (C, NUM_SHELLS + 1) each
        self.absolute: dict[int, np.ndarray] = {}  # by class: (C,)
        self.voxels: dict[int, int] = {}

    def add(self, real: np.ndarray, reconstruction: np.ndarray, mask: np.ndarray | None) -> None:
        """Add a case, cut to its own voxels."""
        all_voxels = np.ones_like(real[:1])
        self.psnr.append(min(psnr(real, reconstruction, all_voxels), PSNR_CAP_DB))
        pairs = zip(real[:, None], reconstruction[:, None], strict=True)
        self.psnr_by_channel.append([min(psnr(*pair, all_voxels), PSNR_CAP_DB) for pair in pairs])
        self.ssim.append(ssim(real, reconstruction, self.device))
        self.mae.append(np.abs(real.astype(np.float64) - reconstruction).mean((1, 2, 3)))
        if num_scales(real.shape[1:]) >= 2:
            self.ms_ssim.append(ms_ssim(real, reconstruction, self.device))
            self.scales.append(num_scales(real.shape[1:]))
        self.energies.append(shell_energies(reconstruction))
        for label, error in (errors_by_label(real, reconstruction, mask) if mask is not None else {}).items():
            self.absolute[label] = self.absolute.get(label, 0) + error.absolute
            self.voxels[label] = self.voxels.get(label, 0) + error.num_voxels

    def figures(
        self, modalities: Sequence[str], labels: Sequence[int | str], real_energies: np.ndarray
    ) -> dict[str, Any]:
        """Return means over the cases; for energies, one sum over another."""
        energies = np.sum(self.energies, axis=0)[:, HIGH:].sum(1)  # (C,)
        real = real_energies[:, HIGH:].sum(1)
        columns = {
            "psnr_db": np.mean(self.psnr_by_channel, axis=0),
            "ssim": np.mean(self.ssim, axis=0),
            "ms_ssim": np.mean(self.ms_ssim, axis=0) if self.ms_ssim else np.full(len(modalities), np.nan),
            "mae": np.mean(self.mae, axis=0),
            "spectrum_ratio": np.array([_ratio(*pair) for pair in zip(energies, real, strict=True)]),
        }
        return {
            "psnr_db": float(np.mean(self.psnr)),
            "ssim": float(columns["ssim"].mean()),
            "ms_ssim": float(columns["ms_ssim"].mean()),
            "spectrum_ratio": _ratio(energies.sum(), real.sum()),
            "modalities": {
                modality: {name: float(column[c]) for name, column in columns.items()}
                for c, modality in enumerate(modalities)
            },
            "mae": {
                str(labels[label]): dict(zip(modalities, (sums / self.voxels[label]).tolist(), strict=True))
                for label, sums in sorted(self.absolute.items())
            },
        }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
