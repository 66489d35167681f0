"""Curves of several things beside each other, one plot a modality, as PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latdiff3d.spectrum import NUM_SHELLS

INK = "#1c1c22"
# Okabe and Ito's orange and blue.
ORANGE, BLUE = "#d55e00", "#0072b2"


class Curve(NamedTuple):
    """A curve of each modality.

    Attributes:
        values: (C, B); what is NaN, or on a logarithmic scale not above 0, is left out.
        colour, dash: matplotlib's.
    """

    values: np.ndarray
    colour: str
    dash: str = "-"


def curves_png(
    x: np.ndarray,
    curves: Mapping[str, Curve],
    modalities: Sequence[str],
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
    mark: float | None = None,
) -> bytes:
    """Return the PNG of the curves.

    Args:
        x: (B,), between 0 and 1.
        curves: by the names in the legend, drawn in that order.
        modalities: C names.
        logarithmic: of the y axis.
        mark: an x that is marked by a dotted line.
    """
    figure = Figure(figsize=(0.6 + 3.3 * len(modalities), 3.2), layout="constrained")
    FigureCanvasAgg(figure)  # this figure's own canvas: the backend a notebook has chosen stays
    plots = figure.subplots(1, len(modalities), squeeze=False)[0]
    for channel, (axes, modality) in enumerate(zip(plots, modalities, strict=True)):
        for name, curve in curves.items():
            y = curve.values[channel]
            known = y > 0 if logarithmic else ~np.isnan(y)
            axes.plot(x[known], y[known], curve.dash, color=curve.colour, linewidth=1.3, label=name)
        if mark is not None:
            axes.axvline(mark, color="#999999", linewidth=0.7, linestyle=":")
        axes.set(yscale="log" if logarithmic else "linear", title=modality, xlabel=xlabel, xlim=(0, 1))
        axes.tick_params(labelsize=8)
    plots[0].set_ylabel(ylabel)
    plots[0].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def spectra_png(spectra: Mapping[str, Curve], modalities: Sequence[str]) -> bytes:
    """Return the PNG of radially averaged power spectra, by the shells of `spectrum.shell_energies`.

    Args:
        spectra: (C, NUM_SHELLS + 1) each, by name; NaN in a shell that holds no frequency.
        modalities: C names.
    """
    frequency = (np.arange(NUM_SHELLS) + 0.5) / NUM_SHELLS
    shown = {name: curve._replace(values=curve.values[:, :NUM_SHELLS]) for name, curve in spectra.items()}
    return curves_png(frequency, shown, modalities, "frequency / Nyquist", "power", logarithmic=True, mark=0.5)
