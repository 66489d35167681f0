"""Does an edited scan stay itself outside the region, is its border without a step, and is the new lesion found?

    python benchmarks/edit.py --data DATA --run runs/diffusion --segmenter runs/judge [--cases 5] [--guidance 1]

Of each validation case, the lesions of the next one that has room are moved to a place in its brain that holds none,
and edited in, through files, as `latdiff3d edit` does: the region is the lesion and a latent cell around it. Measured:

- `outside_identical`: the share of cases where every stored number outside the region is the scan's.
- `border_gradient_ratio`: the mean absolute difference of neighbours across the region's border, over the mean of those
  across the borders of the region grown by 2 and by 3 voxels and shrunk by 2 and by 3; of voxels of tissue alone, in
  the model's units, all modalities together. Beside it the same of the scan before (`…_before`), which no edit has
  touched, of what is decoded pasted in as it is (`…_pasted`), and against the grown borders alone (`…_outside`).
- `segmenter_dice`: the evaluation segmenter's Dice with what was drawn, all labels together, within the region; beside
  it that on the scans' own lesions (`…_real`), and in the same region before the edit (`…_before`).
- `lesions_found`: the share of drawn lesions of whose voxels it labels half or more.
- `noise_ratio`: the noise (see `scan_noise`) of the region outside the lesion, over that of the scan there.

Intervals, of 95 %, are by bootstrap over cases. Runs are trained where they are missing. Pictures of the edits go to
`RUN/edited`. The last line is a JSON object.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from judging import Judging, arguments
from scipy import ndimage

from latdiff3d import edit_folders
from latdiff3d.bootstrap import interval
from latdiff3d.cli import door
from latdiff3d.editing import Site
from latdiff3d.errors import InputError
from latdiff3d.mask_fidelity import segmented
from latdiff3d.plain_figures import rounded
from latdiff3d.readers import read_volume
from latdiff3d.sample_folders import Writing
from latdiff3d.scan_noise import noise_level
from latdiff3d.synthesis import Model
from latdiff3d.volumes import read_mask

TRIES = 2000  # places that are looked at for a lesion
SHELLS = (2, 3)  # voxels


def main() -> None:
    """Edit, measure and print."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="edits of each case")
    parser.add_argument("--guidance", type=float, help="of the edits; 1: none (default: that of the command)")
    parser.add_argument("--short", action="store_true", help="two cases in five steps, to see that it runs")
    given = parser.parse_args()
    given.cases = 2 if given.short else given.cases
    judging = Judging.prepared(given)
    model = judging.model
    if given.short:
        model = replace(model, synthesizer=replace(model.synthesizer, num_steps=5))
    out = Path(given.run) / "edited"
    shutil.rmtree(out, ignore_errors=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(judging.cases):
            drawn = drawn_into(case, judging.cases[number + 1 :] + judging.cases[:number], model, number, Path(folder))
            if drawn is None:
                print(f"{case['case']}: no place for another case's lesion", flush=True)
                continue
            for row in measured(judging, model, case, *drawn, given.seeds, given.guidance, out):
                print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), f" {case['case']}", flush=True)
                rows.append(row)
    if not rows:
        raise InputError(f"no validation case of {given.data} has room for another's lesion; expected some.")
    values = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    summary: dict[str, Any] = {key: rounded(float(np.nanmean(each))) for key, each in values.items()}
    for key in ("border_gradient_ratio", "segmenter_dice"):
        of_key = values[key]
        summary[f"{key}_interval"] = interval(lambda w, each=of_key: float(w @ each / w.sum()), len(rows))
    pairs = zip(judging.reals, judging.masks, strict=True)
    real = [dice(segmented(judging.judge, volume) > 0, mask > 0) for volume, mask in pairs]
    summary["segmenter_dice_real"] = rounded(float(np.mean(real)))
    print(json.dumps({**summary, "num_edits": len(rows)}))


def drawn_into(
    case: dict[str, Any], others: list[dict[str, Any]], model: Model, seed: int, folder: Path
) -> tuple[Path, Path] | None:
    """Write a case's mask with another's lesion moved to where there is tissue without any, and the region of it."""
    own, affine = read_mask(case["mask"])
    tissue = ndimage.binary_erosion(ndimage.binary_fill_holes(tissue_of(case)))
    reach = model.synthesizer.codec.factor
    taken = ndimage.binary_dilation(own > 0, ball(reach + 1))
    generator = np.random.default_rng(seed)
    for other in others:
        lesion = read_mask(other["mask"])[0]
        lesion = lesion[ndimage.find_objects(lesion > 0)[0]] if lesion.any() else lesion[:0]
        room = np.array(own.shape) - lesion.shape
        span = np.array(lesion.shape) + 2 * reach  # of the region, which must leave a latent cell of the crop around it
        is_held = (span + 2 * reach <= max(model.crop_to)).all() or (np.array(own.shape) <= min(model.crop_to)).all()
        if not lesion.size or (room < 0).any() or not is_held:
            continue
        for start in generator.integers(0, room + 1, (TRIES, 3)):
            place = tuple(slice(first, first + size) for first, size in zip(start, lesion.shape, strict=True))
            if not tissue[place][lesion > 0].all() or taken[place][lesion > 0].any():
                continue
            new = np.zeros(own.shape, bool)
            new[place] = lesion > 0
            mask, region = own.copy(), ndimage.binary_dilation(new, ball(reach))
            mask[place][lesion > 0] = lesion[lesion > 0]
            paths = folder / f"{case['case']}_drawn_seg.nii.gz", folder / f"{case['case']}_region.nii.gz"
            for path, voxels in zip(paths, (mask, region), strict=True):
                nib.save(nib.Nifti1Image(voxels.astype(np.uint8), affine), path)
            return paths
    return None


def measured(
    judging: Judging,
    model: Model,
    case: dict[str, Any],
    mask: Path,
    region: Path,
    num_seeds: int,
    guidance: float | None,
    out: Path,
) -> Iterator[dict[str, float]]:
    """Edit a case and yield the figures of each edit."""
    scan = ",".join(str(file) for file in case["image"])
    writing = Writing(picture=True)
    site, jobs = edit_folders.jobs_for(model, scan, mask, region, num_seeds, writing=writing, guidance=guidance)
    wanted = nib.load(region).get_fdata() > 0
    for _, edit, files in edit_folders.make(model, site, jobs, out):
        stored = [
            raw(old)[~wanted].tobytes() == raw(new)[~wanted].tobytes()
            for old, new in zip(site.files, files, strict=True)
        ]
        before, after = scaled(site, site.channels), scaled(site, edit.channels)
        pasted = np.where(site.region, site.grid.to_mask_grid(edit.decoded), before)
        seen, was = (labels(judging, model, site, paths) for paths in (files, site.files))
        inside = site.free[0].numpy() > 0
        drawn = (np.asarray(site.grid.mask[0]) > 0) & inside
        around = site.region & (site.labels == 0)
        yield {
            "outside_identical": float(all(stored)),
            "border_gradient_ratio": ratio(after, site),
            "border_gradient_ratio_before": ratio(before, site),
            "border_gradient_ratio_pasted": ratio(pasted, site),
            "border_gradient_ratio_outside": ratio(after, site, inwards=False),
            "segmenter_dice": dice(seen & inside, drawn),
            "segmenter_dice_before": dice(was & inside, drawn),
            "lesions_found": float((seen & drawn).sum() >= drawn.sum() / 2),
            "noise_ratio": noise(after, around) / max(noise(before, around), 1e-9),
        }


def scaled(site: Site, channels: Any) -> np.ndarray:
    """Return channels in the model's units, not clipped."""
    ranges = site.reference.ranges
    pairs = zip(channels, ranges, strict=True)
    return np.stack([(channel.intensities - each.low) / (each.high - each.low) for channel, each in pairs])


def labels(judging: Judging, model: Model, site: Site, files: Any) -> np.ndarray:
    """Return where the judge sees a lesion in a scan's files, (D, H, W) on the site's crop."""
    image = model.preprocessing({"image": [str(file) for file in files]})["image"]
    crop = site.grid.crop(site.grid.pad(image))
    return segmented(judging.judge, torch.as_tensor(crop).float())[0].numpy() > 0


def ratio(volume: np.ndarray, site: Site, inwards: bool = True) -> float:
    """Return the step across the region's border over those across borders a little further out, and further in."""
    grown = [ndimage.binary_dilation(site.region, ball(distance)) for distance in SHELLS]
    shrunk = [ndimage.binary_erosion(site.region, ball(distance)) for distance in SHELLS] if inwards else []
    others = np.concatenate([steps(volume, shell, ~site.air) for shell in grown + shrunk])
    return float(steps(volume, site.region, ~site.air).mean() / others.mean())


def steps(volume: np.ndarray, region: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Return |difference| of all neighbours, both tissue, of which one is in a region and the other is not."""
    found = []
    for axis in range(3):
        inside, counts = np.moveaxis(region, axis, 0), np.moveaxis(tissue, axis, 0)
        between = (inside[1:] != inside[:-1]) & counts[1:] & counts[:-1]
        differences = np.abs(np.diff(np.moveaxis(volume, axis + 1, 1), axis=1))
        found.append(differences[:, between].ravel())
    return np.concatenate(found)


def noise(volume: np.ndarray, where: np.ndarray) -> float:
    """Return the mean noise level of the modalities."""
    return float(np.mean([noise_level(channel, where) for channel in volume]))


def dice(a: Any, b: Any) -> float:
    """Return the Dice overlap of two masks, of which one at least is not empty."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def tissue_of(case: dict[str, Any]) -> np.ndarray:
    """Return where any modality of a case differs from its most frequent value, its background."""
    found = False
    for file in case["image"]:
        for channel in read_volume(str(file)).numpy():
            values, counts = np.unique(channel, return_counts=True)
            found = found | (channel != values[counts.argmax()])
    return np.asarray(found)


def ball(radius: int) -> np.ndarray:
    """Return a ball of voxels, to grow a mask by."""
    return sum(np.square(axis) for axis in np.ogrid[(slice(-radius, radius + 1),) * 3]) <= radius**2


def raw(path: str | Path) -> np.ndarray:
    """Return a NIfTI file's numbers as they are stored."""
    return np.asarray(nib.load(path).dataobj.get_unscaled())


if __name__ == "__main__":
    door(main)
