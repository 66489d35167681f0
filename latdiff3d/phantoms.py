"""Small synthetic brain cases with tumour masks, in BraTS 2021's layout: the quickstart's data and the tests'.

A brain is drawn from level sets in *brain units*: one unit is the half-length of the brain, about 75 mm in a head and
21 to 25 voxels at the default shape. Depths are positive inside, so `_edge(depth)` is a voxel's partial volume.
Axes are x to the right, y to the front, z up: arrays are (D, H, W) = (x, y, z), RAS.
"""

import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from latdiff3d.errors import InputError

MODALITIES = ("flair", "t1", "t1ce", "t2")  # the channel order, and the files' suffixes
CORE, OEDEMA, RIM = 1, 2, 4  # BraTS 2021's labels; 3 was dropped in 2017

TISSUES = ("csf", "grey", "white", "nuclei", "vessel", "oedema", "rim", "core")
# Relative signal at about 3 T: one row per modality, one column per tissue.
SIGNAL = np.array(
    [
        # csf  grey  white nuclei vessel oedema rim  core
        [0.14, 0.62, 0.48, 0.57, 0.40, 0.98, 0.92, 0.62],  # flair
        [0.28, 0.62, 0.86, 0.68, 0.45, 0.40, 0.38, 0.22],  # t1
        [0.28, 0.60, 0.78, 0.64, 1.20, 0.50, 1.50, 0.28],  # t1ce
        [1.00, 0.60, 0.40, 0.48, 0.45, 0.86, 0.80, 1.05],  # t2
    ]
)
MIN_AXIS = 16  # voxels; below it a rim and its core no longer fit into a lesion
SCALE_RANGE = (200.0, 2500.0)  # a scanner's arbitrary units; white noise and lesions stay far below int16's 32767
LESION_RADIUS = (0.21, 0.37)  # brain units: 4.5 to 8 voxels at the default shape

README = """Synthetic phantoms, drawn by latdiff3d.phantoms: no patient, no scanner, free to use and to share.

Layout of BraTS 2021: <case>/<case>_{{flair,t1,t1ce,t2,seg}}.nii.gz, masks 0 background, 1 necrotic core, 2 oedema,
4 enhancing rim. train.list and val.list name the cases of each split, one a line.
Shape {shape}, spacing {spacing_mm} mm, seed {seed}. They serve to try the software, and support no medical claim.
"""


def write_phantoms(
    folder: str | Path,
    num_train: int = 32,
    num_val: int = 16,
    shape: tuple[int, int, int] = (48, 56, 48),
    spacing_mm: float = 3.0,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write synthetic cases in BraTS 2021's layout, with `train.list` and `val.list`.

    Case k is drawn from (seed, k) alone, so it is the same whatever the number of cases. The folder appears complete
    or not at all: it is written beside its place and renamed at the end.

    Args:
        folder: where to write; must be absent or empty.
        num_train: cases in `train.list`, the first ones; at least 1.
        num_val: cases in `val.list`, those after them; 0 or more.
        shape: (D, H, W) voxels, each at least 16.
        spacing_mm: isotropic voxel size in mm.
        seed: 0 or more.
        progress: count the cases on stderr.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds something or is a file, or an argument is out of its range.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder. Name a new folder, or remove this one first.")
    if num_train < 1 or num_val < 0:
        raise InputError(f"{num_train} training and {num_val} validation cases: ask for at least 1 and at least 0.")
    _check(shape, spacing_mm, seed)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    cases = [f"phantom_{index:04d}" for index in range(num_train + num_val)]
    try:
        for index, case in enumerate(cases):
            _write_case(unfinished / case, *phantom_case(shape, (seed, index), spacing_mm))
            if progress:
                print(f"\rphantom {index + 1} of {len(cases)}", end="", file=sys.stderr, flush=True)
        if progress:
            print(file=sys.stderr)
        for split, members in (("train", cases[:num_train]), ("val", cases[num_train:])):
            (unfinished / f"{split}.list").write_text("".join(f"{case}\n" for case in members))
        text = README.format(shape=" x ".join(map(str, shape)), spacing_mm=spacing_mm, seed=seed)
        (unfinished / "README.txt").write_text(text)
        if folder.exists():
            folder.rmdir()  # empty, see above; Windows cannot rename onto it
        unfinished.rename(folder)
    except BaseException:  # an interrupt as well must leave nothing behind
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def phantom_case(
    shape: tuple[int, int, int] = (48, 56, 48), seed: int | Sequence[int] = 0, spacing_mm: float = 3.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one skull-stripped brain with one tumour, sometimes two.

    Args:
        shape: (D, H, W) voxels, each at least 16; the brain fills it.
        seed: what the case is drawn from: a number, or several such as (seed, index); 0 or more.
        spacing_mm: isotropic voxel size in mm, for the affine only.

    Returns:
        The image, (4, D, H, W) float32 in the order of `MODALITIES`: whole numbers in a scanner's arbitrary units,
        of another scale in every case and modality, at least 1 in the brain and 0 outside it;
        the mask, (D, H, W) uint8 with labels 0, 1 (necrotic core), 2 (oedema) and 4 (enhancing rim), all present;
        the affine, (4, 4) float64, RAS, in mm.

    Raises:
        InputError: an argument is out of its range.
    """
    _check(shape, spacing_mm, seed)
    rng = np.random.default_rng(seed)
    grid = _brain_grid(shape, rng)
    anatomy = _draw_anatomy(grid, rng)
    fractions, mask = _draw_tumour(grid, anatomy, rng)
    return _acquire(fractions, anatomy.brain, grid, rng), mask, _affine(shape, spacing_mm, rng)


class _Grid(NamedTuple):
    position: np.ndarray  # (3, D, H, W), brain units, after rotation, scale and deformation: where the anatomy is drawn
    voxel: float  # the size of a voxel in brain units


class _Anatomy(NamedTuple):
    fractions: np.ndarray  # (len(TISSUES), D, H, W), sums to 1 in every voxel
    brain: np.ndarray  # (D, H, W) bool
    depth: np.ndarray  # (D, H, W), brain units below the surface of the cerebrum


def _check(shape: Sequence[int], spacing_mm: float, seed: int | Sequence[int]) -> None:
    if len(shape) != 3 or min(shape) < MIN_AXIS:
        raise InputError(f"A phantom of shape {tuple(shape)}: give three axes of at least {MIN_AXIS} voxels each.")
    if not spacing_mm > 0:
        raise InputError(f"A spacing of {spacing_mm} mm: give a number above 0.")
    if np.min(seed) < 0:
        raise InputError(f"A seed of {seed}: give 0 or more.")


def _brain_grid(shape: tuple[int, int, int], rng: np.random.Generator) -> _Grid:
    """Place every voxel in the brain's own frame, which differs from case to case."""
    half = 0.462 * np.array(shape)  # voxels; leaves a margin of air
    voxel = 1 / half.mean()
    size = rng.uniform(0.90, 0.98) * rng.uniform(0.96, 1.0, 3)
    roll, pitch, yaw = np.deg2rad(rng.normal(0, 3.0, 3).clip(-7, 7))
    turn = _rotation(1, roll) @ _rotation(0, pitch) @ _rotation(2, yaw)
    index = np.indices(shape, dtype=np.float32)
    centred = index - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2 - rng.uniform(-0.015, 0.015, (3, 1, 1, 1)) / voxel
    position = np.einsum("ij,jdhw->idhw", turn, centred) / (half * size).reshape(3, 1, 1, 1)
    bend = np.stack([_noise(shape, 1.1 / voxel, rng) for _ in range(3)])
    return _Grid(position + 0.022 * bend.clip(-2, 2), voxel)


def _rotation(axis: int, angle: float) -> np.ndarray:
    i, j = [a for a in range(3) if a != axis]
    turn = np.eye(3)
    turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return turn


def _noise(
    shape: tuple[int, ...], wavelength: float, rng: np.random.Generator, bandwidth: float | None = None
) -> np.ndarray:
    """Draw smooth noise of mean 0 and std 1; with a bandwidth, a band around the wavelength (voxels) alone."""
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij", sparse=True)))
    if bandwidth is None:
        gain = np.exp(-((frequency * wavelength) ** 2))
    else:
        gain = np.exp(-(((frequency * wavelength - 1) / bandwidth) ** 2))
    spectrum = np.fft.rfftn(rng.standard_normal(shape)) * gain[..., : shape[-1] // 2 + 1]
    noise = np.fft.irfftn(spectrum, s=shape, axes=range(len(shape)))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _edge(depth: np.ndarray, voxel: float) -> np.ndarray:
    """Turn a depth (brain units) into a voxel's partial volume, 0 to 1, over about one voxel."""
    return 1 / (1 + np.exp(-np.clip(depth / (0.28 * voxel), -30, 30)))


def _ellipsoid(position: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Return the depth inside an ellipsoid, in brain units, exact at its surface's flattest point."""
    scaled = [(position[a] - centre[a]) / radii[a] for a in range(3)]
    return (1 - np.sqrt(sum(s**2 for s in scaled))) * min(radii)


def _cerebrum(position: np.ndarray) -> np.ndarray:
    """Return the depth inside the cerebrum: wide at the back, flat below, hollow where the brainstem enters."""
    x, y, z = position
    z = z - 0.10
    width = 0.93 - 0.13 * y
    chiasm = 0.32 * np.exp(-((x / 0.28) ** 2) - ((y + 0.05) / 0.30) ** 2)
    frontal = 0.22 / (1 + np.exp(-(y - 0.38) / 0.06))
    occipital = 0.20 / (1 + np.exp((y + 0.30) / 0.08))
    height = np.where(z > 0, 0.90, 0.80 - chiasm - frontal - occipital)
    power = 2.3
    radius = ((np.abs(x) / width) ** power + np.abs(y) ** power + (np.abs(z) / height) ** power) ** (1 / power)
    return 1 - radius


def _draw_anatomy(grid: _Grid, rng: np.random.Generator) -> _Anatomy:
    """Draw cortex, white matter, ventricles and nuclei of a healthy brain."""
    position, voxel = grid
    x, y, z = position
    side = np.stack([np.abs(x), y, z])  # both hemispheres at once
    shape = x.shape

    depth = _cerebrum(position) + 0.02 * _noise(shape, 0.5 / voxel, rng)
    hemisphere = _ellipsoid(side, (0.30, -0.52, -0.58), (0.36, 0.38, 0.28))
    vermis = _ellipsoid(position, (0.0, -0.50, -0.58), (0.30, 0.34, 0.25))
    cerebellum = np.maximum(hemisphere, vermis)
    stem = np.minimum(_ellipsoid(position, (0.0, -0.16, -0.55), (0.17, 0.17, 0.60)), z + 0.96)
    outside = np.maximum(np.maximum(depth, cerebellum), stem)
    brain = outside > 0

    # The sheets on which band-passed noise changes its sign wind through the cortex as sulci do.
    folds = _noise(shape, 0.34 / voxel, rng, bandwidth=0.3)
    to_sheet = _distance_to_zero(folds, voxel)
    to_sulcus = np.maximum(to_sheet, depth - rng.uniform(0.22, 0.28))
    wobble = 0.012 * _noise(shape, 0.6 / voxel, rng)
    callosum = 0.34 + 0.22 * np.abs(y)
    radius = np.sqrt(y**2 + np.maximum(z, 0) ** 2)
    to_fissure = np.maximum(np.abs(x + wobble), np.maximum(callosum - radius, -0.10 - z))
    to_sylvian = np.maximum(np.abs(z + 0.10 - 0.25 * y), np.maximum(0.58 - side[0], np.abs(y - 0.12) - 0.40))
    to_pia = np.minimum.reduce([depth, to_sulcus, to_fissure, to_sylvian])

    cortex = rng.uniform(0.062, 0.075)
    csf = _edge(0.016 - to_pia, voxel)
    white = _edge(to_pia - cortex, voxel)
    in_cerebellum = _edge(cerebellum - depth, voxel)
    lobules = 0.03 * np.sin(2 * np.pi * (z + 0.3 * y) / 0.16)
    white = white * (1 - in_cerebellum) + in_cerebellum * _edge(cerebellum - 0.13 + lobules, voxel)
    csf = csf * (1 - in_cerebellum) + in_cerebellum * _edge(0.012 - cerebellum, voxel)

    fractions = np.zeros((len(TISSUES), *shape), np.float32)
    fractions[TISSUES.index("grey")] = 1
    _paint(fractions, "white", white)
    _paint(fractions, "csf", csf)
    _paint(fractions, "white", _edge(stem, voxel) * _edge(stem - depth, voxel) * _edge(stem - cerebellum, voxel))
    _paint(fractions, "nuclei", _edge(_nuclei(side), voxel))
    _paint(fractions, "csf", _edge(_ventricles(side, rng.uniform(0.8, 1.5)), voxel))

    # Two such families of sheets cross in curves: vessels, which lie in the sulci; and the sinus along the midline.
    crossing = _distance_to_zero(_noise(shape, 0.5 / voxel, rng, bandwidth=0.3), voxel)
    vessel = np.minimum(0.03 - np.hypot(to_sheet, crossing), 0.15 - depth)
    sinus = np.minimum(0.05 - np.hypot(x, depth - 0.02), z + 0.1 - 0.4 * (y + 0.5))
    _paint(fractions, "vessel", 0.8 * _edge(np.maximum(vessel, sinus), voxel))
    return _Anatomy(fractions, brain, depth)


def _distance_to_zero(noise: np.ndarray, voxel: float) -> np.ndarray:
    """Return the distance to where the noise changes its sign, in brain units, to first order."""
    slope = np.sqrt(sum(g**2 for g in np.gradient(noise)))
    return np.abs(noise) / (slope + 0.05) * voxel


def _nuclei(side: np.ndarray) -> np.ndarray:
    """Return the depth inside thalamus, caudate head and putamen."""
    thalamus = _ellipsoid(side, (0.14, -0.12, 0.00), (0.11, 0.21, 0.14))
    caudate = _ellipsoid(side, (0.20, 0.26, 0.08), (0.08, 0.15, 0.14))
    putamen = _ellipsoid(side, (0.37, 0.10, -0.01), (0.095, 0.28, 0.17))
    return np.maximum.reduce([thalamus, caudate, putamen])


def _ventricles(side: np.ndarray, size: float) -> np.ndarray:
    """Return the depth inside the lateral ventricles, which part at both ends, the third and the fourth."""
    x, y, z = side
    bent = np.stack([x - 0.22 * np.maximum(y - 0.05, 0) - 0.38 * np.maximum(-y - 0.05, 0), y, z - 0.10 * (0.1 - y**2)])
    lateral = _ellipsoid(bent, (0.09, -0.02, 0.13), (0.065 * size, 0.52, 0.12 * size))
    third = _ellipsoid(side, (0.0, -0.05, -0.04), (0.025 * size, 0.16, 0.12))
    fourth = _ellipsoid(side, (0.0, -0.34, -0.50), (0.07, 0.05, 0.10))
    return np.maximum.reduce([lateral, third, fourth])


def _paint(fractions: np.ndarray, tissue: str, cover: np.ndarray) -> None:
    """Lay a tissue over those drawn before it, opaque where `cover` is 1."""
    fractions *= 1 - cover
    fractions[TISSUES.index(tissue)] += cover


def _draw_tumour(grid: _Grid, anatomy: _Anatomy, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint one or two tumours over the white matter; return the new fractions and the mask."""
    fractions, mask = anatomy.fractions.copy(), np.zeros(anatomy.brain.shape, np.uint8)
    num_lesions = 1 + int(rng.random() < 0.15)
    for lesion in range(num_lesions):
        radius = max(rng.uniform(*LESION_RADIUS) * (1.0 if lesion == 0 else 0.6), 2.8 * grid.voxel)
        centre = _lesion_centre(grid, anatomy, radius, rng)
        whole, rim, core = _lesion_depths(grid, anatomy, radius, centre, rng)
        inside = _edge(anatomy.depth, grid.voxel)
        for tissue, label, depth in (("oedema", OEDEMA, whole), ("rim", RIM, rim), ("core", CORE, core)):
            _paint(fractions, tissue, inside * _edge(depth, grid.voxel))
            mask[(depth > 0) & anatomy.brain & (anatomy.depth > 0)] = label
    return fractions, mask


def _lesion_centre(grid: _Grid, anatomy: _Anatomy, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a voxel of the white matter of either hemisphere, far enough from surface and midline."""
    x, _, z = grid.position
    white = anatomy.fractions[TISSUES.index("white")] > 0.5
    allowed = white & (anatomy.depth > 0.6 * radius) & (np.abs(x) > 0.15) & (z > -0.35)
    candidates = np.argwhere(allowed)
    if not len(candidates):  # a coarse grid may resolve no white matter there
        candidates = np.argwhere(anatomy.depth >= np.quantile(anatomy.depth, 0.99))
    return candidates[rng.integers(len(candidates))]


def _lesion_depths(
    grid: _Grid, anatomy: _Anatomy, radius: float, centre: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the depths inside the whole lesion, its rim with the core, and the core: each within the one before."""
    shape = anatomy.brain.shape
    stretch = rng.uniform(0.8, 1.25, 3)
    stretch /= stretch.prod() ** (1 / 3)
    offset = (np.indices(shape) - centre.reshape(3, 1, 1, 1)) * grid.voxel
    distance = np.sqrt(sum((offset[a] / stretch[a]) ** 2 for a in range(3)))

    def rough(amount: float) -> np.ndarray:
        # Fades towards the centre, so that the centre itself always lies inside.
        ripple = _noise(shape, 0.9 * radius / grid.voxel, rng) + 0.5 * _noise(shape, 0.45 * radius / grid.voxel, rng)
        return amount * np.minimum(radius, distance) * ripple.clip(-1.5, 1.5)

    csf, grey = (anatomy.fractions[TISSUES.index(tissue)] for tissue in ("csf", "grey"))
    spared = 0.25 * grey + 1.2 * csf  # oedema runs along white matter, and neither into sulci nor ventricles
    whole = 1.08 * radius * (1 - ndimage.gaussian_filter(spared, 0.7)) - distance + rough(0.14)
    whole = np.maximum(whole, 0.7 * radius - distance)  # what the tumour itself fills
    parts, _ = ndimage.label(whole > 0)
    whole = np.where((parts == parts[tuple(centre)]) | (whole < 0), whole, -grid.voxel)
    rim = np.minimum(rng.uniform(0.54, 0.66) * radius - distance + rough(0.14), whole)
    thickness = max(0.26 * radius, 1.1 * grid.voxel)
    core = np.minimum(rng.uniform(0.34, 0.44) * radius - distance + rough(0.12), rim - thickness)
    core = np.maximum(core, 0.5 * grid.voxel - distance)
    return whole, rim, core


def _acquire(fractions: np.ndarray, brain: np.ndarray, grid: _Grid, rng: np.random.Generator) -> np.ndarray:
    """Scan the brain: contrast, texture, bias field, Rician noise and a scale for each modality."""
    shape = brain.shape
    texture = 1 + 0.03 * _noise(shape, 0.25 / grid.voxel, rng)
    image = np.empty((len(MODALITIES), *shape), np.float32)
    for channel, signal in enumerate(SIGNAL):
        signal = signal * rng.normal(1, 0.03, len(TISSUES))
        clean = np.einsum("t,tdhw->dhw", signal, fractions) * texture
        clean *= np.exp(rng.uniform(0.04, 0.10) * _noise(shape, 1.6 / grid.voxel, rng))
        sigma = rng.uniform(0.015, 0.03)
        noisy = np.hypot(clean + sigma * rng.standard_normal(shape), sigma * rng.standard_normal(shape))
        scale = np.exp(rng.uniform(*np.log(SCALE_RANGE)))
        image[channel] = np.where(brain, np.maximum(np.rint(scale * noisy), 1), 0)
    return image


def _affine(shape: tuple[int, int, int], spacing_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Return a RAS affine whose world origin lies near the middle of the brain, as after a rough alignment."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = -spacing_mm * (np.array(shape) - 1) / 2 + np.round(rng.normal((0, -18, 12), 2), 2)
    return affine


def _write_case(folder: Path, image: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> None:
    folder.mkdir()
    for suffix, volume in (*zip(MODALITIES, image.astype(np.int16), strict=True), ("seg", mask)):
        nifti = nib.Nifti1Image(volume, affine)
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, folder / f"{folder.name}_{suffix}.nii.gz")
