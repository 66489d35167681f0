"""What lies around a region, continued smoothly into it: the correction that leaves no step where a region was edited.

Poisson image editing (Pérez et al. 2003, Sec. 2, 10.1145/882262.882269) keeps the gradients of what is put into a
region, and the values around it. Its solution is what is put in plus a membrane: the harmonic function that has, on the
region's border, the difference between what was there and what is put in.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import cg

TOLERANCE = 1e-8  # of the residual, relative to the border's values

Slices = tuple[slice, slice, slice]


def membrane(
    values: np.ndarray, free: np.ndarray, known: np.ndarray, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """Return `values`, and in free voxels the harmonic function that continues them.

    It solves Laplace's equation with the known voxels that share a face with a free one as its border; towards voxels
    that are neither, and across the volume's own ends, it is level. A constant border gives that constant, a linear one
    the same ramp, and no value is outside the border's range. Free voxels from which no known one is reached get the
    border's mean; without any border 0.

    Args:
        values: (C, D, H, W); what voxels hold that are not known does not count.
        free: (D, H, W), True where the function is wanted.
        known: (D, H, W), True where values may be its border; nowhere where `free` is.
        spacing_mm: of the voxels: a neighbour at twice the distance counts a quarter.

    Returns:
        (C, D, H, W), float64.
    """
    number = np.full(free.shape, -1)
    number[free] = np.arange(free.sum())
    num_free = int(free.sum())
    diagonal, from_border = np.zeros(num_free), np.zeros((len(values), num_free))
    border_weight = 0.0
    rows, columns, entries = [], [], []
    for here, there, weight in _faces(spacing_mm):
        mine, other = number[here], number[there]
        at_border, between = (mine >= 0) & known[there], (mine >= 0) & (other >= 0)
        np.add.at(diagonal, mine[at_border | between], weight)
        border_weight += weight * int(at_border.sum())
        for channel, wanted in zip(values, from_border, strict=True):
            np.add.at(wanted, mine[at_border], weight * channel[there][at_border])
        rows.append(mine[between])
        columns.append(other[between])
        entries.append(np.full(int(between.sum()), -weight))
    solved = values.astype(np.float64)
    if not border_weight:
        solved[:, free] = 0
        return solved
    off_diagonal = (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns)))
    laplacian = (sparse.diags(diagonal) + sparse.coo_matrix(off_diagonal, (num_free, num_free))).tocsr()
    preconditioner = sparse.diags(1 / np.where(diagonal > 0, diagonal, 1))
    for k, wanted in enumerate(from_border):
        start = np.full(num_free, wanted.sum() / border_weight)  # the border's mean, exact where that is constant
        solved[k, free], unsolved = cg(laplacian, wanted, start, rtol=TOLERANCE, M=preconditioner)
        if unsolved:
            raise RuntimeError(f"the membrane of channel {k} is not solved after {unsolved} steps; it would show.")
    return solved


def _faces(spacing_mm: Sequence[float]) -> Iterator[tuple[Slices, Slices, float]]:
    """Yield, of each of a voxel's six neighbours, where the voxels are that have one, where that is, and its weight."""
    behind, ahead = slice(1, None), slice(None, -1)
    for axis, size_mm in enumerate(spacing_mm):
        for mine, other in ((behind, ahead), (ahead, behind)):
            here, there = [slice(None)] * 3, [slice(None)] * 3
            here[axis], there[axis] = mine, other
            yield (here[0], here[1], here[2]), (there[0], there[1], there[2]), 1 / size_mm**2
