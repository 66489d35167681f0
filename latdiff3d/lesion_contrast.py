"""Whether a synthetic lesion stands out as the real one does: the sign of its contrast, beside what chance gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class ContrastAgreement:
    """How often synthetic lesions are brighter, or darker, than their surround where real ones are.

    Compare `agreement` with `shuffled`, never with 0: a lesion that is always bright agrees by brightness anywhere.
    """

    agreement: float  # fraction of the scored pairs; NaN where there is none
    shuffled: float  # the floor: the same samples scored at every other case's lesion
    num_pairs: int  # (case, channel) pairs scored: clear in the real volume, defined in the synthetic one
    num_shuffled_pairs: int  # (sample, other case, channel) triples scored
    num_undefined: int  # clear pairs left out because the synthetic contrast is NaN
    num_shuffled_undefined: int
    per_channel: tuple[float, ...]  # agreement by channel; NaN where no pair was clear
    shuffled_per_channel: tuple[float, ...]


def lesion_contrast(image: np.ndarray, lesion: np.ndarray, brain: np.ndarray, ring_voxels: float = 3) -> np.ndarray:
    """Measure how far a lesion stands out: (its mean - its surround's mean) / its surround's std, per channel.

    Args:
        image: (C, D, H, W), any unit.
        lesion: (D, H, W) bool; all its voxels count, inside the brain or not.
        brain: (D, H, W) bool, where the surround may lie.
        ring_voxels: the surround holds the voxels at most this far (Euclidean, in voxels) from the lesion.

    Returns:
        (C,) float64; NaN where the lesion or its surround is empty, infinite where the surround is flat and the
        lesion differs.

    Raises:
        ValueError: the grids differ.
    """
    if image.shape[1:] != lesion.shape or brain.shape != lesion.shape:
        raise ValueError(f"image {image.shape}, lesion {lesion.shape}, brain {brain.shape}: give one grid to all.")
    return _contrast(image, brain, _site(lesion, ring_voxels))


def contrast_sign_agreement(
    real: Sequence[np.ndarray],
    synthetic: Sequence[np.ndarray],
    lesions: Sequence[np.ndarray],
    brains_real: Sequence[np.ndarray],
    brains_synthetic: Sequence[np.ndarray],
    clear_above: float = 1.0,
    ring_voxels: float = 3,
) -> ContrastAgreement:
    """Ask whether synthetic lesions have the sign of the real ones' contrast, beside the floor that chance gives.

    A (case, channel) pair is asked where the real contrast is clear. It agrees where `synthetic[i]`, made from the
    mask of case i, has a contrast of the same sign at `lesions[i]`; exactly 0 does not agree.

    The floor asks the same of samples that never saw the mask: each `synthetic[i]` at the lesion of every other case
    j, cut to the brain of sample i, against the sign of real case j. It tells what anatomy gives without any lesion
    (white matter is darker than cortex on T2 wherever one looks) and what chance overlap of two cases' lesions adds.
    So all volumes lie on one grid, roughly aligned.

    Args:
        real: (C, D, H, W) each, one per case.
        synthetic: (C, D, H, W) each, sample i made from the mask of case i.
        lesions: (D, H, W) bool each, the masks' foreground.
        brains_real: (D, H, W) bool each.
        brains_synthetic: (D, H, W) bool each; fill holes first, or a lesion that came out black is no brain.
        clear_above: a real contrast c is clear where |c| exceeds this; in stds of the surround.
        ring_voxels: as in `lesion_contrast`.

    Returns:
        Both fractions and what they count.

    Raises:
        ValueError: the lists differ in length or are empty, or the grids differ.
    """
    lengths = {len(volumes) for volumes in (real, synthetic, lesions, brains_real, brains_synthetic)}
    if lengths == {0} or len(lengths) > 1:
        raise ValueError(f"Lists of {sorted(lengths)} cases: give every list the same cases, at least one.")
    grids = {v.shape[-3:] for volumes in (real, synthetic, lesions, brains_real, brains_synthetic) for v in volumes}
    if len(grids) > 1:
        raise ValueError(f"Volumes of {sorted(grids)}: the floor needs all cases on one grid.")

    cases = range(len(real))
    sites = [_site(lesion, ring_voxels) for lesion in lesions]
    wanted = np.stack([_contrast(real[i], brains_real[i], sites[i]) for i in cases])  # (N, C)
    got = np.stack([_contrast(synthetic[i], brains_synthetic[i], sites[i]) for i in cases])  # (N, C)
    others = [(i, j) for i in cases for j in cases if i != j]
    floor_wanted = np.array([wanted[j] for _, j in others]).reshape(-1, wanted.shape[1])  # (N * (N - 1), C)
    floor_got = np.array(
        [_contrast(synthetic[i], brains_synthetic[i], sites[j], within_brain=True) for i, j in others]
    ).reshape(-1, wanted.shape[1])  # (N * (N - 1), C)

    agreement, num_pairs, num_undefined, per_channel = _same_sign(wanted, got, clear_above)
    shuffled, num_shuffled, num_shuffled_undefined, floor_per_channel = _same_sign(floor_wanted, floor_got, clear_above)
    return ContrastAgreement(
        agreement,
        shuffled,
        num_pairs,
        num_shuffled,
        num_undefined,
        num_shuffled_undefined,
        per_channel,
        floor_per_channel,
    )


class _Site(NamedTuple):
    """A lesion and the ring around it, on the box that holds both."""

    box: tuple[slice, ...]
    lesion: np.ndarray  # bool
    ring: np.ndarray  # bool, the brain not yet considered


def _site(lesion: np.ndarray, ring_voxels: float) -> _Site:
    lesion = lesion > 0
    if not lesion.any():
        return _Site((slice(0, 0),) * 3, np.zeros((0, 0, 0), bool), np.zeros((0, 0, 0), bool))
    margin = int(np.ceil(ring_voxels))
    (tight,) = ndimage.find_objects(lesion.astype(np.uint8))
    box = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in tight)
    inside = lesion[box]
    distance = ndimage.distance_transform_edt(~inside)
    return _Site(box, inside, (distance > 0) & (distance <= ring_voxels))


def _contrast(image: np.ndarray, brain: np.ndarray, site: _Site, within_brain: bool = False) -> np.ndarray:
    brain = brain[site.box] > 0
    lesion = site.lesion & brain if within_brain else site.lesion
    ring = site.ring & brain
    if not lesion.any() or not ring.any():
        return np.full(len(image), np.nan)
    box = (slice(None), *site.box)
    voxels = image[box].astype(np.float64)
    surround = voxels[:, ring]  # (C, N)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (voxels[:, lesion].mean(1) - surround.mean(1)) / surround.std(1)


def _same_sign(wanted: np.ndarray, got: np.ndarray, clear_above: float) -> tuple[float, int, int, tuple[float, ...]]:
    """Return the fraction of equal signs, the number scored, the number undefined, and the fraction per channel."""
    clear = np.abs(wanted) > clear_above  # (N, C); False where NaN
    scored = clear & ~np.isnan(got)
    same = scored & (np.sign(wanted) == np.sign(got))
    per_channel = tuple(_fraction(same[:, c], scored[:, c]) for c in range(wanted.shape[1]))
    return _fraction(same, scored), int(scored.sum()), int((clear & ~scored).sum()), per_channel


def _fraction(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
