"""How far a figure of some cases may be trusted: intervals by drawing the cases anew."""

from collections.abc import Callable

import numpy as np

from latdiff3d.plain_figures import rounded


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], num_cases: int, level: float = 0.95, num_draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic of cases (Efron and Tibshirani 1993, Ch. 13).

    For a squared MMD it holds where the distributions differ; where they do not, its law is another one (Gretton et
    al. 2012, Thm. 12) and the interval is too narrow.

    Args:
        statistic: takes how often each case was drawn (num_cases,); all that belongs to a case goes with it, such as a
            real volume and those made for its mask. Draws of which it makes no number (NaN) are left out,
            and the interval is NaN where that is all.
        num_cases: of the set.
        level: of the interval.
        num_draws: how often the cases are drawn anew.
        seed: of the draws.
    """
    draws = np.random.default_rng(seed).multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=num_draws)
    values = [statistic(draw.astype(np.float64)) for draw in draws]
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(statistic: Callable[[np.ndarray], float], num_cases: int) -> list[float | None]:
    """Return a statistic's 95 % interval, see `bootstrap_interval`, as it is printed."""
    return [rounded(end) for end in bootstrap_interval(statistic, num_cases)]


def mean_interval(values: np.ndarray) -> list[float | None]:
    """Return the 95 % interval of the mean over cases of `values` (N,); those that are NaN do not count."""
    known = ~np.isnan(values)

    def mean(weights: np.ndarray) -> float:
        counted = weights * known
        return float(counted @ np.nan_to_num(values) / counted.sum()) if counted.any() else float("nan")

    return interval(mean, len(values))


def crossed_interval(
    table: np.ndarray, level: float = 0.95, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of a table's mean where its rows and its columns are both drawn anew.

    For several trainings, tested on the same cases: both vary, and neither stands for the other (Owen 2007,
    arXiv:0712.1111).

    Args:
        table: (rows, columns), finite.
        level, num_draws, seed: as of `bootstrap_interval`.
    """
    draw = np.random.default_rng(seed)
    rows, columns = (draw.multinomial(n, np.full(n, 1 / n), size=num_draws) / n for n in table.shape)
    means = ((rows @ table) * columns).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
