"""The Fréchet distance of two sets of features, and from how many volumes on it says anything.

d² = |m − m'|² + tr(C + C' − 2 (C C')^½) between Gaussians of the sets' means and covariances (Dowson and Landau 1982;
on a network's features, Heusel et al. 2017, arXiv:1706.08500). The covariance of n rows has rank n − 1 at most: below
F + 1 rows there are directions in which a set seems not to vary at all, and the distance says how few rows there are
rather than how far apart the sets lie. Even above, it is biased upwards, by about 1/n (Bińkowski et al. 2018,
arXiv:1801.01401), so that only distances of the same n compare.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from latdiff3d.plain_figures import rounded


def smallest_number(num_features: int) -> int:
    """Return n, the fewest rows a set's covariance of so many features can have full rank with."""
    return num_features + 1


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Return the squared Fréchet distance of features (N, F) and (M, F), from 0 on.

    The trace of (C C')^½ is the nuclear norm of X Y' / ((N − 1) (M − 1))^½, X and Y being the centred features: no root
    of a matrix is taken, and a singular covariance needs no constant added to it.

    Raises:
        ValueError: features of different lengths, or fewer than two rows.
    """
    if real.ndim != 2 or synthetic.ndim != 2 or real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"Features of {real.shape} and {synthetic.shape}: give (N, F) and (M, F).")
    if min(len(real), len(synthetic)) < 2:
        raise ValueError(f"{len(real)} real and {len(synthetic)} synthetic volumes: give two of each at least.")
    x, y = (f.astype(np.float64) - f.mean(0) for f in (real, synthetic))
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    between = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    shift = real.mean(0, dtype=np.float64) - synthetic.mean(0, dtype=np.float64)
    return max(0.0, float(shift @ shift + (x**2).sum() + (y**2).sum() - 2 * between))


def beside_its_floor(real: np.ndarray, synthetic: np.ndarray, num_draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """Return the distance of synthetic from real volumes beside that of real ones from each other, for the same n.

    Real volumes are dealt anew, `num_draws` times, into two halves: the distance from the first to as many synthetic
    ones, drawn without repetition, and to the second half. This is no bootstrap: rows that it repeats lower the
    covariances' rank, and sets lie further apart than any real volumes.

    Args:
        real: (N, F).
        synthetic: (M, F).

    Returns:
        `n`, of each set; `n_min`, see `smallest_number`; `distance` and `floor`, means over the draws, each with an
        `…_interval` that holds 95 % of them. Below `n_min` the four are None, and `refused` says why.
    """
    n, least = min(len(real) // 2, len(synthetic)), smallest_number(real.shape[1])
    names = ("distance", "distance_interval", "floor", "floor_interval")
    if n < least:
        why = f"{n} volumes in a set, {real.shape[1]} features; the covariance has full rank from {least} volumes on"
        return {"n": n, "n_min": least, "refused": why, **dict.fromkeys(names)}
    draws = np.array(list(_distances(real, synthetic, n, num_draws, seed)))  # (draws, 2)
    figures: dict[str, Any] = {"n": n, "n_min": least, "refused": None}
    for name, values in zip(("distance", "floor"), draws.T, strict=True):
        figures[name] = rounded(float(values.mean()))
        figures[f"{name}_interval"] = [rounded(float(end)) for end in np.quantile(values, [0.025, 0.975])]
    return figures


def _distances(
    real: np.ndarray, synthetic: np.ndarray, n: int, num_draws: int, seed: int
) -> Iterator[tuple[float, float]]:
    generator = np.random.default_rng(seed)
    for _ in range(num_draws):
        order, drawn = generator.permutation(len(real)), generator.permutation(len(synthetic))[:n]
        reference, others = real[order[:n]], real[order[n : 2 * n]]
        yield frechet_distance(reference, synthetic[drawn]), frechet_distance(reference, others)
