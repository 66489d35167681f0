"""Realism, a section of an evaluation: whether synthetic volumes are distributed as real ones are, and as sharp."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import wasserstein_distance

from latdiff3d.bootstrap import interval
from latdiff3d.features import FeatureSets
from latdiff3d.frechet_distance import beside_its_floor
from latdiff3d.html_page import captioned, notes, picture, table, with_interval
from latdiff3d.kernel_distance import (
    Kernel,
    gaussian_kernel,
    median_distance,
    paired_squared_mmd,
    polynomial_kernel,
    similarities,
    standardised,
)
from latdiff3d.plain_figures import rounded
from latdiff3d.plots import INK, ORANGE, Curve, curves_png, spectra_png
from latdiff3d.quality_pictures import preview_png
from latdiff3d.spectrum import HIGH, shell_energies, shell_shares

NUM_BINS = 64  # of intensities between 0 and 1
NUM_DRAWS = 200  # of real volumes, for a floor
KERNELS = {"mmd": "MMD², kernel inception distance's kernel", "gaussian_mmd": "MMD², Gaussian kernel"}
SPECTRUM, HISTOGRAM, SLICES = "spectrum", "histogram", "slices"


class Profile(NamedTuple):
    """What is kept of a volume's own voxels.

    Attributes:
        energies: (C, NUM_SHELLS + 1), see `spectrum.shell_energies`.
        shares: (NUM_SHELLS + 1,), see `spectrum.shell_shares`.
        histogram: (C, NUM_BINS), shares of voxels.
    """

    energies: np.ndarray
    shares: np.ndarray
    histogram: np.ndarray


def profile(volume: np.ndarray) -> Profile:
    """Return the profile of a volume (C, D, H, W) in [0, 1], cut to its own voxels."""
    counts = [np.histogram(channel, NUM_BINS, (0, 1))[0] / channel.size for channel in volume]
    return Profile(shell_energies(volume), shell_shares(volume.shape[1:]), np.array(counts))


def measure(
    features: Mapping[str, FeatureSets],
    real: Sequence[Profile],
    made: Sequence[Sequence[Profile]],
    training: Sequence[Profile],
    modalities: Sequence[str],
    examples: Sequence[tuple[str, np.ndarray]],
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the figures of realism, see `figures_of`, and pictures: spectra, histograms and slices.

    Args:
        examples: names and volumes (C, D, H, W) to show.
    """
    figures = figures_of(features, real, made, training, modalities, seed)
    curves = {"real": (real, INK), "synthetic": ([one for sample in made for one in sample], ORANGE)}
    with np.errstate(invalid="ignore", divide="ignore"):
        spectra = {
            name: Curve(_sum(p.energies for p in of) / _sum(p.shares for p in of), colour)
            for name, (of, colour) in curves.items()
        }
    histograms = {name: Curve(_sum(p.histogram for p in of) / len(of), colour) for name, (of, colour) in curves.items()}
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    return figures, {
        SPECTRUM: spectra_png(spectra, modalities),
        HISTOGRAM: curves_png(centres, histograms, modalities, "intensity", "share of voxels", logarithmic=True),
        SLICES: preview_png([volume for _, volume in examples], [name for name, _ in examples]),
    }


def figures_of(
    features: Mapping[str, FeatureSets],
    real: Sequence[Profile],
    made: Sequence[Sequence[Profile]],
    training: Sequence[Profile],
    modalities: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the figures of realism.

    Args:
        features: by network.
        real: of N real volumes.
        made: of S for each of these, S × N.
        training: of M other real volumes, M may be 0.
        modalities: C names.
        seed: of the draws of a floor.
    """
    return {
        "num_cases": len(real),
        "num_samples": len(made),
        "networks": {name: distances(sets, seed) for name, sets in features.items()},
        "spectrum": _spectrum(real, made, training, modalities, seed),
        "histogram": _histogram(real, made, training, modalities, seed),
    }


def distances(sets: FeatureSets, seed: int = 0) -> dict[str, Any]:
    """Return kernel and Fréchet distances in one network's features, each beside that of real volumes from each other.

    Features are in units of their spread over the real volumes. A kernel distance is the unbiased squared MMD of the
    real volumes and those made for their masks, the mean over the S samples. Its floor is that of as many training
    volumes, drawn anew `NUM_DRAWS` times, from as many of the real ones; without training volumes, of halves of them.
    """
    scaled = standardised(sets.real)
    real, made, training = scaled(sets.real), [scaled(one) for one in sets.made], sets.training
    others = scaled(training) if len(training) else real[:0]
    kernels: dict[str, Kernel] = {"mmd": polynomial_kernel, "gaussian_mmd": gaussian_kernel(median_distance(real))}
    figures: dict[str, Any] = {"num_features": real.shape[1]}
    for name, kernel in kernels.items():
        between = [similarities(real, one, kernel) for one in made]

        def mmd(weights: np.ndarray | None = None, between: Any = between) -> float:
            return float(np.mean([paired_squared_mmd(one, weights) for one in between]))

        def apart(one: np.ndarray, other: np.ndarray, kernel: Kernel = kernel) -> float:
            return paired_squared_mmd(similarities(one, other, kernel))

        figures[name] = {
            "value": rounded(mmd()),
            "interval": interval(mmd, len(real)),
            "n": len(real),
            **_floor(apart, real, others, seed),
        }
    pool = np.concatenate([real, others])[:, sets.deepest]
    figures["frechet"] = beside_its_floor(pool, np.concatenate(made)[:, sets.deepest], seed=seed)
    return figures


def _floor(distance: Callable[[Any, Any], float], real: Any, training: Any, seed: int) -> dict[str, Any]:
    """Return `floor`, the mean distance of real volumes from each other, and what holds 95 % of the draws."""
    generator, values = np.random.default_rng(seed), []
    n = min(len(real), len(training)) if len(training) >= 2 else len(real) // 2
    if n < 2:
        return {"floor": None, "floor_interval": [None, None], "floor_n": n}
    for _ in range(NUM_DRAWS):
        order = generator.permutation(len(real))
        other = training[generator.permutation(len(training))[:n]] if len(training) >= 2 else real[order[n : 2 * n]]
        values.append(distance(real[order[:n]], other))
    ends = np.quantile(values, [0.025, 0.975])
    return {
        "floor": rounded(float(np.mean(values))),
        "floor_interval": [rounded(float(end)) for end in ends],
        "floor_n": n,
    }


def _spectrum(
    real: Sequence[Profile],
    made: Sequence[Sequence[Profile]],
    training: Sequence[Profile],
    modalities: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the energy above half the Nyquist frequency over the real volumes', of all modalities and of each."""
    of_real, of_training = _high(real), _high(training)  # (N, C), (M, C)
    of_made = np.mean([_high(one) for one in made], axis=0)  # (N, C)

    def ratio(one: np.ndarray, other: np.ndarray) -> float:
        return float(other.sum() / one.sum()) if one.sum() > 0 else float("nan")

    return {
        "ratio": rounded(ratio(of_real, of_made)),
        "interval": interval(lambda w: ratio(w @ of_real, w @ of_made), len(real)),
        **_floor(ratio, of_real, of_training, seed),
        "modalities": {m: rounded(ratio(of_real[:, c], of_made[:, c])) for c, m in enumerate(modalities)},
    }


def _high(profiles: Sequence[Profile]) -> np.ndarray:
    return np.array([one.energies[:, HIGH:].sum(1) for one in profiles])


def _histogram(
    real: Sequence[Profile],
    made: Sequence[Sequence[Profile]],
    training: Sequence[Profile],
    modalities: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the Wasserstein distance of pooled intensities, in units of the range, of each modality."""
    counts = np.array([one.histogram for one in real])  # (N, C, B)
    of_training = np.array([one.histogram for one in training])
    of_made = np.mean([[one.histogram for one in sample] for sample in made], axis=0)
    bins = (np.arange(NUM_BINS) + 0.5) / NUM_BINS

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(wasserstein_distance(bins, bins, one.sum(0), other.sum(0)))

    figures = {}
    for c, modality in enumerate(modalities):
        one, other = counts[:, c], of_made[:, c]  # (N, B)
        figures[modality] = {
            "distance": rounded(distance(one, other)),
            "interval": interval(partial(_weighted, distance, one, other), len(real)),
            **_floor(distance, one, of_training[:, c] if len(training) else of_training, seed),
        }
    return figures


def _weighted(
    distance: Callable[[np.ndarray, np.ndarray], float], one: np.ndarray, other: np.ndarray, weights: np.ndarray
) -> float:
    return distance(weights[:, None] * one, weights[:, None] * other)


def _sum(arrays: Any) -> np.ndarray:
    return np.sum(list(arrays), axis=0)


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    parts = [_distance_table(name, of) for name, of in figures["networks"].items()]
    if not parts:
        parts = ["<p>No network to compare features by; give --segmenter, or --weights.</p>"]
    spectrum = figures["spectrum"]
    rows = [
        ["energy above Nyquist / 2, of the real"]
        + [
            with_interval(spectrum["ratio"], spectrum["interval"], 2),
            with_interval(spectrum["floor"], spectrum["floor_interval"], 2),
        ]
    ]
    for modality, of in figures["histogram"].items():
        shown = with_interval(of["distance"], of["interval"], 4), with_interval(of["floor"], of["floor_interval"], 4)
        rows.append([f"intensities of {modality}, Wasserstein distance", *shown])
    parts.append(table(["", "synthetic", "real against real"], rows))
    parts.append(picture(pictures[SPECTRUM], "radially averaged power spectra"))
    parts.append(picture(pictures[HISTOGRAM], "histograms of intensities"))
    parts.append(captioned(pictures[SLICES], "Real volumes, and synthetic ones beside them"))
    return "".join(parts) + notes(
        [
            "Real against real: as many training volumes, drawn 200 times, against the real ones of the split; halves "
            "of these where there are no training volumes. Read each distance against it, never alone.",
            "A kernel distance has no bias, and may be below 0. It leads; the Fréchet distance takes the deepest "
            "features alone, needs more volumes than those, and compares for one n only.",
            "Features are in units of their spread over the real volumes. All on volumes' own voxels.",
        ]
    )


def _distance_table(network: str, of: Mapping[str, Any]) -> str:
    rows = []
    for key, name in KERNELS.items():
        one = of[key]
        floor = with_interval(one["floor"], one["floor_interval"])
        rows.append([name, with_interval(one["value"], one["interval"]), floor, f"{one['n']} / {one['floor_n']}"])
    frechet = of["frechet"]
    if frechet["refused"]:
        rows.append(["Fréchet distance", "refused", "–", f"{frechet['n']}, needs {frechet['n_min']}"])
    else:
        shown = [with_interval(frechet[key], frechet[f"{key}_interval"]) for key in ("distance", "floor")]
        rows.append(["Fréchet distance", *shown, str(frechet["n"])])
    head = ["", "synthetic", "real against real", "n"]
    why = f"<p class=note>Fréchet distance: {frechet['refused']}.</p>" if frechet["refused"] else ""
    return f"<p>In {of['num_features']} features of {network}:</p>{table(head, rows)}{why}"


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a model card says of it."""
    said = []
    for name, of in figures["networks"].items():
        one = of["mmd"]
        said.append(
            f"In features of {name} the synthetic volumes lie at a squared MMD of "
            f"{with_interval(one['value'], one['interval'])} from the real ones, n = {one['n']}, real volumes at "
            f"{with_interval(one['floor'], one['floor_interval'])} from each other."
        )
    spectrum = figures["spectrum"]
    said.append(
        "Their energy above half the Nyquist frequency is "
        f"{with_interval(spectrum['ratio'], spectrum['interval'], 2)} of the real volumes'."
    )
    return " ".join(said)
