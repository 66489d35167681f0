"""How far a set of synthetic volumes lies from the real ones: the squared maximum mean discrepancy of their features.

MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y) is 0 for equal distributions and, with a kernel that tells all of them
apart, above 0 for any others (Gretton et al. 2012, arXiv:0805.2368). Unlike the Fréchet distance it has an unbiased
estimate from few samples, and asks for no Gaussian features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

SPREAD_FLOOR = 0.1  # of the median: a feature that hardly varies over the real volumes would decide all distances


class Similarities(NamedTuple):
    """The kernel's values between all members of two sets, from which any resampled MMD follows."""

    real: np.ndarray  # (N, N)
    synthetic: np.ndarray  # (M, M)
    cross: np.ndarray  # (N, M)


def standardised(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what brings features (N, F) to units of their spread over `reference`, the real volumes'."""
    centre, spread = reference.mean(0), reference.std(0)
    spread = spread.clip(SPREAD_FLOOR * np.median(spread))
    spread[spread == 0] = 1  # nothing varies
    return lambda features: (features - centre) / spread


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (x · y / F + 1)³, (N, M), of features (N, F) and (M, F): that of the kernel inception distance.

    It sees differences in the first three moments (Bińkowski et al. 2018, Sec. 4, arXiv:1801.01401).
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(bandwidth: float) -> Kernel:
    """Return exp(−|x − y|² / (2 bandwidth²)), which tells all distributions apart, as a kernel of (N, F) and (M, F)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(-_squared_distances(x, y) / (2 * bandwidth**2))

    return kernel


def median_distance(features: np.ndarray) -> float:
    """Return the median distance between two members of `features` (N, F): the usual bandwidth (Gretton, Sec. 8).

    Taken of the real volumes alone, it is the same for all that are compared with them.
    """
    apart = _squared_distances(features, features)[np.triu_indices(len(features), k=1)]
    return float(np.sqrt(np.median(apart)))


def similarities(real: np.ndarray, synthetic: np.ndarray, kernel: Kernel) -> Similarities:
    """Return the kernel's values between features (N, F) of real and (M, F) of synthetic volumes.

    Raises:
        ValueError: features of different lengths, or fewer than two volumes in a set.
    """
    if real.ndim != 2 or synthetic.ndim != 2 or real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"Features of {real.shape} and {synthetic.shape}: give (N, F) and (M, F).")
    if min(len(real), len(synthetic)) < 2:
        raise ValueError(f"{len(real)} real and {len(synthetic)} synthetic volumes: give two of each at least.")
    real, synthetic = real.astype(np.float64), synthetic.astype(np.float64)
    return Similarities(kernel(real, real), kernel(synthetic, synthetic), kernel(real, synthetic))


def squared_mmd(between: Similarities, unbiased: bool = True) -> float:
    """Return MMD² of two independent sets (Gretton et al. 2012, Eq. 3 unbiased, Eq. 5 biased).

    Args:
        between: from `similarities`.
        unbiased: leave out each member's similarity with itself; the estimate may then be below 0. The biased one,
            with it, never is, and is 0 for a set and itself.
    """
    within = _mean(between.real, unbiased) + _mean(between.synthetic, unbiased)
    return within - 2 * float(between.cross.mean())


def paired_squared_mmd(between: Similarities, weights: np.ndarray | None = None) -> float:
    """Return the unbiased MMD² of two sets whose i-th members belong together (Gretton et al. 2012, Eq. 4).

    A volume that was made for a real one's mask is more like it than two volumes drawn apart would be, so their own
    similarity is left out as well.

    Args:
        between: from `similarities`, of sets of one size N.
        weights: (N,) from 0 on, such as how often a bootstrap drew each pair, which then is not paired with its own
            copies; None: all alike. NaN where fewer than two pairs have any.

    Raises:
        ValueError: sets of different sizes.
    """
    if len(between.real) != len(between.synthetic):
        raise ValueError(f"{between.cross.shape} similarities: pairs need two sets of one size.")
    w = np.ones(len(between.real)) if weights is None else weights
    h = between.real + between.synthetic - between.cross - between.cross.T
    num_pairs = w.sum() ** 2 - (w**2).sum()
    return float((w @ h @ w - w**2 @ np.diag(h)) / num_pairs) if num_pairs > 0 else float("nan")


def _mean(kernel: np.ndarray, unbiased: bool) -> float:
    if not unbiased:
        return float(kernel.mean())
    return float((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T
    return np.maximum(squares, 0)
