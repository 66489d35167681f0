"""Does a volume larger than the training crop show where its windows meet, and does it keep to its memory?

    python benchmarks/whole_volume.py [--run RUN_OR_CKPT] [--data DATA] [--size 240 240 155] [--memory 6GB] [--short]

Makes one volume by `latdiff3d sample --whole`, files and pictures included, in a fresh process, whose largest resident
set, Python and PyTorch included, is `peak_gb` (a GPU's memory is not in it) and whose time is `minutes`; `cpu_minutes`
is what its threads computed in all, whatever else the machine did. Its mask are the masks of `--data`, side by side on
a grid of `--size`, or the first alone where that is as large. Without `--run` a small model is trained on phantoms of
half the edges, in runs/benchmark_whole_volume, if it is not there yet.

Seams: the mean absolute difference of neighbouring voxels across a border, over that across the planes half a tile to
either side, where both voxels are foreground (some modality above 0.05). Borders are those of the windows' own parts
and of the decoder's tiles; `seam_ratio` is the larger of the two figures, all axes together, `seam_worst_axis` the
largest of any axis alone. `no_seam` has, of each, the lowest and the highest for planes that are no borders, at all
other distances from them: so far from 1 anatomy alone takes it, and farther, the fewer borders there are. --compare
adds windows that share half, and windows side by side, without overlap, which is what the figure must be able to see.
The last line is a JSON object.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from fresh_process import in_fresh_process

from latdiff3d import memory, runs, synthesizer
from latdiff3d.cli import door
from latdiff3d.config import CONFIG_FOLDER
from latdiff3d.latent_windows import OVERLAP, LatentWindows
from latdiff3d.model_cases import cases_of_split
from latdiff3d.phantoms import write_phantoms
from latdiff3d.sampling_command import sample
from latdiff3d.synthesis import Model
from latdiff3d.volumes import read_mask

OWN_RUN = Path("runs/benchmark_whole_volume")
SIZE, SHORT_SIZE = (240, 240, 155), (72, 64, 55)
STEPS, SHORT_STEPS = {"autoencoder": 400, "diffusion": 800}, {"autoencoder": 8, "diffusion": 8}
SMALL = {  # networks that train in minutes on two cores
    "crop_to": [40, 40, 40],
    "latent_channels": 4,
    "autoencoder_def::channels": [16, 32],
    "denoiser_def::channels": [32, 64],
}
OVERLAPS = {"ours": OVERLAP, "side by side": 0.0, "half shared": 0.5}
FOREGROUND_ABOVE = 0.05  # in some modality


def main() -> None:
    """Make what is missing, sample, look for seams, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--run", help="stage 2's run or checkpoint")
    arguments.add_argument("--data", help="a data set whose masks are taken")
    arguments.add_argument("--size", type=int, nargs=3, help=f"of the volume, in voxels (default: {SIZE})")
    arguments.add_argument("--memory", default="6GB", help="for the whole process")
    arguments.add_argument("--steps", type=int, default=12, help="of the sampler")
    arguments.add_argument("--sampler", default="ddim", help="as for latdiff3d sample")
    arguments.add_argument("--guidance", type=float, default=1.0, help="its scale")
    arguments.add_argument("--seed", type=int, default=0, help="of the noise")
    arguments.add_argument("--compare", action="store_true", help="other ways to place windows as well")
    arguments.add_argument("--short", action="store_true", help="a small volume, a model of 8 steps")
    arguments.add_argument("--arm", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.arm:
        print(json.dumps(run_arm(**json.loads(given.arm))))
        return

    size = tuple(given.size or (SHORT_SIZE if given.short else SIZE))
    run, data = given.run, given.data
    if run is None or data is None:
        own = OWN_RUN / "short" if given.short else OWN_RUN
        data = data or str(phantoms(own, SHORT_SIZE if given.short else SIZE))
        run = run or trained(own, data, SHORT_STEPS if given.short else STEPS)
    model = Model.load(run)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "whole_seg.nii.gz"
        write_mask(model, data, size, mask)
        for name in OVERLAPS if given.compare else ["ours"]:
            arm = {"run": str(run), "mask": str(mask), "out": f"{folder}/{name}", "memory": given.memory, "arm": name}
            chosen = {"steps": given.steps, "sampler": given.sampler, "guidance": given.guidance, "seed": given.seed}
            made = in_fresh_process(__file__, {**arm, **chosen})
            found[name] = {**made, **seams(model, size, read_volume(Path(folder) / name / "whole", model), made)}
            print_row(name, size, found[name])
    ours = found["ours"]
    figures = {
        **{key: ours[key] for key in ("peak_gb", "seam_ratio", "minutes", "seam_worst_axis", "windows", "tiles")},
        **{key: ours[key] for key in ("no_seam", "num_windows", "num_tiles", "foreground", "cpu_minutes")},
        "memory_gb": memory.gigabytes(given.memory),
        "size": list(size),
        "steps": given.steps,
        **({"arms": {name: arm["seam_ratio"] for name, arm in found.items()}} if given.compare else {}),
    }
    print(json.dumps(figures))


def phantoms(own: Path, size: Sequence[int]) -> Path:
    """Return small phantoms, drawn if they are not there, of which eight side by side are as large as `size`."""
    if not (own / "data").is_dir():
        half = (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))
        write_phantoms(own / "data", num_train=4, num_val=1, shape=half, spacing_mm=1.0, progress=True)
    return own / "data"


def trained(own: Path, data: str, steps: dict[str, int]) -> str:
    """Return the run of this benchmark's own, both stages trained if they are not there."""
    batch_size = {"autoencoder": 1, "diffusion": 4}
    for stage, num_steps in steps.items():
        epochs = max(1, num_steps * batch_size[stage] // 4)
        named = {
            "dataset_dir": data,
            "logdir": str(own),
            "name": stage,
            "batch_size": batch_size[stage],
            "max_epochs": epochs,
            "val_interval": max(1, epochs // 2),
            **SMALL,
        }
        if stage == "autoencoder":
            named |= {"loss::disc_start": int(0.9 * num_steps), "learning_rate": 1.5e-3, "quality_cases": 0}
        else:
            named["first_stage"] = str(own / "autoencoder")
        runs.start([CONFIG_FOLDER / "demo.yaml"], [], named, stage)
    return str(own / "diffusion")


def write_mask(model: Model, data: str, size: Sequence[int], path: Path) -> None:
    """Write the data set's masks side by side on one grid, RAS and of the model's spacing."""
    cases = [case for split in ("train", "val") for case in cases_of_split(model, data, split)]
    parts = itertools.cycle(read_mask(case["mask"])[0] for case in cases)
    labels = np.zeros(size, np.int16)
    edges = read_mask(cases[0]["mask"])[0].shape
    for corner in itertools.product(*(range(0, n, edge) for n, edge in zip(size, edges, strict=True))):
        place = tuple(slice(first, first + edge) for first, edge in zip(corner, edges, strict=True))
        room = labels[place]
        part = next(parts)[tuple(slice(n) for n in room.shape)]
        room[tuple(slice(n) for n in part.shape)] = part
    nib.save(nib.Nifti1Image(labels, np.diag([*model.spacing_mm, 1.0])), path)


def run_arm(
    run: str, mask: str, out: str, memory: str, arm: str, steps: int, sampler: str, guidance: float, seed: int
) -> dict[str, Any]:
    """Sample as the command does, and return peak, time, and the axes of windows and tiles in latent cells."""
    layout: dict[str, Any] = {"windows": None, "tiles": None, "num_windows": 0, "num_tiles": 1}
    note(layout, OVERLAPS[arm])
    begun, used = time.perf_counter(), time.process_time()
    sample(
        run, Path(out), mask=Path(mask), num_samples=1, seed=seed, steps=steps, gpus=None, guidance=guidance,
        sampler=sampler, covariates=None, picture=True, gif=False, like=None, int16=False, label_map=None, whole=True,
        memory=memory,
    )  # fmt: skip
    return {
        "minutes": round((time.perf_counter() - begun) / 60, 2),
        "cpu_minutes": round((time.process_time() - used) / 60, 2),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        **layout,
    }


def note(layout: dict[str, Any], overlap: float) -> None:
    """Have `layout` filled with where windows and tiles are, in latent cells, as they are worked off."""

    class Noting(LatentWindows):
        def prediction(self, *given: Any, **named: Any) -> Any:
            layout["windows"] = [[(part.start, part.stop) for part in axis] for axis in self.per_axis]
            layout["num_windows"] += self.number
            return super().prediction(*given, **named)

    def tiles_within(*given: Any, **named: Any) -> Any:
        tiles = original(*given, **named)
        if tiles is not None:
            boxes = memory.windows(given[2].shape[2:], tiles.tile, tiles.overlap)
            axes = [sorted({(box[axis].start, box[axis].stop) for box, _ in boxes}) for axis in range(3)]
            layout.update(tiles=axes, num_tiles=len(boxes))
        return tiles

    synthesizer.LatentWindows = partial(Noting, overlap=overlap)  # type: ignore[misc, assignment]
    original, memory.tiles_within = memory.tiles_within, tiles_within


def peak_bytes() -> int:
    """Return the most memory that this process has held: by Linux' /proc, elsewhere the largest resident set."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def read_volume(folder: Path, model: Model) -> np.ndarray:
    """Return a case's volume (C, D, H, W)."""
    files = [folder / f"{folder.name}_{modality}.nii.gz" for modality in model.modalities]
    return np.stack([nib.load(file).get_fdata(dtype=np.float32) for file in files])


def seams(model: Model, size: Sequence[int], volume: np.ndarray, layout: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the borders of windows and tiles in a volume on its mask's grid."""
    cell = model.synthesizer.codec.factor
    crop = model.crop_to
    padded = [max(-(-n // cell) * cell, least) for n, least in zip(size, crop, strict=True)]
    offsets = [(there - n) // 2 for there, n in zip(padded, size, strict=True)]
    planes = [differences(volume, axis) for axis in range(3)]

    def figure(axes: Any, moved: int = 0, of: Iterable[int] = range(3)) -> float | None:
        return ratio([(planes[k], *borders(axes[k], cell, offsets[k], moved)) for k in of])

    kinds = {kind: layout[kind] for kind in ("windows", "tiles") if layout[kind]}
    found = {kind: figure(axes) for kind, axes in kinds.items()}
    single = [figure(axes, of=[k]) for axes in kinds.values() for k in range(3)]
    return {
        "windows": found.get("windows"),
        "tiles": found.get("tiles"),
        "seam_ratio": max((value for value in found.values() if value is not None), default=None),
        "seam_worst_axis": max((value for value in single if value is not None), default=None),
        "no_seam": {kind: _ends(figure(axes, moved) for moved in _distances(axes)) for kind, axes in kinds.items()},
        "foreground": round(float((volume > FOREGROUND_ABOVE).any(0).mean()), 3),
    }


def _distances(axes: Sequence[Sequence[Sequence[int]]]) -> range:
    """Return by how many cells borders can be moved without one coming to lie on another."""
    return range(1, min((b[0] - a[0] for axis in axes for a, b in itertools.pairwise(axis)), default=1))


def _ends(values: Iterable[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def differences(volume: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return of each plane between neighbouring voxels along an axis the sum of differences, and how many they are."""
    along = np.moveaxis(volume, axis + 1, 1)  # (C, n, …)
    inside = (along > FOREGROUND_ABOVE).any(0)
    both = inside[1:] & inside[:-1]
    steps = np.abs(np.diff(along, axis=1)).sum(0)  # (n − 1, …)
    return np.where(both, steps, 0).sum((1, 2), dtype=np.float64), both.sum((1, 2)) * len(volume)


def borders(axis: Sequence[Sequence[int]], cell: int, offset: int, moved: int) -> tuple[list[int], list[int]]:
    """Return the planes where windows, (first, end) in cells, meet, moved by so many cells, and those half a tile off.

    A plane has the number of the voxel before it.
    """
    between = [(a[1] + b[0]) // 2 + moved for a, b in itertools.pairwise(axis)]
    half = max(1, round(np.mean([b[0] - a[0] for a, b in itertools.pairwise(axis)]) / 2)) if between else 0
    there = [[cells * cell - offset - 1 for cells in place] for place in (between, [*_around(between, half)])]
    return there[0], there[1]


def _around(places: Iterable[int], distance: int) -> Iterable[int]:
    for place in places:
        yield from (place - distance, place + distance)


def ratio(parts: Iterable[tuple[tuple[np.ndarray, np.ndarray], list[int], list[int]]]) -> float | None:
    """Return the mean difference across the first planes over that across the second, axes together."""
    means = np.zeros((2, 2))  # (of borders or not, sum and count)
    for (sums, counts), *sets in parts:
        for number, places in enumerate(sets):
            known = [place for place in places if 0 <= place < len(sums)]
            means[number] += sums[known].sum(), counts[known].sum()
    if not means[:, 1].all() or not means[1, 0]:
        return None
    return round(float(means[0, 0] / means[0, 1] / (means[1, 0] / means[1, 1])), 4)


def print_row(name: str, size: Sequence[int], found: dict[str, Any]) -> None:
    """Print one arm's figures."""
    print(
        f"{name}: {' × '.join(map(str, size))} in {found['minutes']:.1f} min, {found['num_windows']} windows, "
        f"{found['num_tiles']} tiles, peak {found['peak_gb']:.2f} GB; seams {found['seam_ratio']} (windows "
        f"{found['windows']}, tiles {found['tiles']}, worst axis {found['seam_worst_axis']}; "
        f"without {found['no_seam']})",
        flush=True,
    )


if __name__ == "__main__":
    door(main)
