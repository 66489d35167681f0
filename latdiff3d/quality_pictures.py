"""The quality page's pictures: power spectra as curves, and a case as real, reconstructed and error."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latdiff3d.figures import slices_preview
from latdiff3d.spectrum import NUM_SHELLS

ERROR_GAIN = 3  # by which errors are brightened
# Okabe and Ito's orange and blue.
LINES = {"autoencoder": ("#d55e00", "-"), "block_pca": ("#0072b2", "--"), "real": ("#1c1c22", "-")}


@dataclass(frozen=True)
class Spectra:
    """Energy per voxel and frequency in shells, over all cases; see spectrum.shell_energies."""

    real: np.ndarray  # (C, NUM_SHELLS + 1); NaN in a shell that holds no frequency of any case
    autoencoder: np.ndarray  # the same shape
    block_pca: np.ndarray


@dataclass(frozen=True)
class Example:
    """A case to look at, cut to its own voxels."""

    name: str
    psnr_db: float
    real: np.ndarray  # (C, D, H, W) in [0, 1]
    reconstruction: np.ndarray


def slices_png(example: Example) -> bytes:
    """Return the PNG of a case: three planes of each channel, real, reconstructed and the brightened error."""
    error = np.abs(example.real - example.reconstruction) * ERROR_GAIN
    names = ("real", "reconstructed", f"error x {ERROR_GAIN}")  # PIL's own font has no ×
    with tempfile.TemporaryDirectory() as folder:
        path = slices_preview(Path(folder) / "slices.png", (example.real, example.reconstruction, error), names)
        return path.read_bytes()


def spectra_png(spectra: Spectra, modalities: Sequence[str], names: Mapping[str, str]) -> bytes:
    """Return the PNG of the radially averaged power spectra, one plot a modality.

    Args:
        spectra: of the cases.
        modalities: C names.
        names: of the curves, by field of `spectra`; those are drawn, in that order.
    """
    figure = Figure(figsize=(0.6 + 3.3 * len(modalities), 3.2), layout="constrained")
    FigureCanvasAgg(figure)  # this figure's own canvas: the backend a notebook has chosen stays
    frequency = (np.arange(NUM_SHELLS) + 0.5) / NUM_SHELLS
    plots = figure.subplots(1, len(modalities), squeeze=False)[0]
    for channel, (axes, modality) in enumerate(zip(plots, modalities, strict=True)):
        for field, name in names.items():
            power = getattr(spectra, field)[channel, :NUM_SHELLS]
            known = power > 0
            colour, dash = LINES[field]
            axes.plot(frequency[known], power[known], dash, color=colour, linewidth=1.3, label=name)
        axes.axvline(0.5, color="#999999", linewidth=0.7, linestyle=":")
        axes.set(yscale="log", title=modality, xlabel="frequency / Nyquist", xlim=(0, 1))
        axes.tick_params(labelsize=8)
    plots[0].set_ylabel("power")
    plots[0].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
