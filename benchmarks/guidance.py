"""Do volumes lie on their masks, are they as sharp as real ones, and what does guidance do to both?

    python benchmarks/guidance.py --data DATA --run runs/diffusion --segmenter runs/judge [--at 2] [--cases 5]

For each validation mask and each guidance scale, a volume from the same noise, sampled as the run's configuration says.
Three measures:

- Mask fidelity, (D − S) / (R − S): the evaluation segmenter's mean Dice on the volumes and their masks (D), on real
  volumes (R), and on the volumes and all other cases' masks (S), which overlap by chance.
- Energy above half the Nyquist frequency, over that of the real volumes, on their own voxels: below 0.7 is blurred.
- The squared MMD to the real volumes on the segmenter's features, with the kernel of the kernel inception distance and
  with a Gaussian one (see sampling.py), beside that of masks painted with each label's mean intensity and noise of its
  standard deviation over the training volumes.

`mask_fidelity`, `spectrum_ratio`, `mmd` and `mmd_painted` are those at scale `--at`. Intervals, of 95 %, are by
bootstrap over cases. A plot of all against the scale goes to `--run`. Runs are trained where they are missing. The last
line is a JSON object.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judging import Judging, arguments, real_volumes
from matplotlib.figure import Figure

from latdiff3d.bootstrap import interval
from latdiff3d.cli import door
from latdiff3d.errors import InputError
from latdiff3d.fidelity import own_voxels
from latdiff3d.kernel_distance import (
    gaussian_kernel,
    median_distance,
    paired_squared_mmd,
    polynomial_kernel,
    similarities,
    standardised,
)
from latdiff3d.mask_fidelity import dice_table, matched_dice, mismatched_dice, normalised_fidelity, segmented
from latdiff3d.model_cases import cases_of_split
from latdiff3d.plain_figures import rounded
from latdiff3d.spectrum import high_frequency_energy
from latdiff3d.synthesis import Model

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
NUM_PAINTERS = 40  # training volumes whose intensities the painted ones have


def main() -> None:
    """Sample at each scale, measure, print and plot."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--at", type=float, default=2.0, help="the scale whose figures lead; added if it is not among")
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES), help="all that are looked at")
    given = parser.parse_args()
    if min(given.scales) <= 0 or given.at <= 0:
        raise InputError(f"the scales are {[given.at, *given.scales]}; expected numbers above 0.")
    judging = Judging.prepared(given)
    model = judging.model
    real_table = table_of(judging, judging.reals)
    rows: dict[float, dict[str, Any]] = {}
    for scale in sorted({*given.scales, given.at}):
        begun = time.perf_counter()
        guided = replace(model, synthesizer=replace(model.synthesizer, guidance=guided_by(model, scale)))
        volumes = [guided.sample(case["mask"], seed).volume for seed, case in enumerate(judging.cases)]
        seconds = (time.perf_counter() - begun) / len(volumes)
        rows[scale] = measured(judging, volumes, real_table) | {"seconds": rounded(seconds)}
        print_row(f"guidance {scale:g}", rows[scale])
    painted = measured(judging, painted_masks(judging, given.data), real_table)
    print_row("painted masks", painted)
    print(f"real volumes: Dice {matched_dice(real_table):.3f}, chance {mismatched_dice(real_table):.3f}")
    plot(Path(given.run) / "guidance.png", rows, painted)
    leading = rows[given.at]
    names = ("mask_fidelity", "mask_fidelity_interval", "spectrum_ratio", "mmd", "gaussian_mmd")
    summary = {
        "at": given.at,
        **{name: leading[name] for name in names},
        "mmd_painted": painted["mmd"],
        "gaussian_mmd_painted": painted["gaussian_mmd"],
        "dice_real": rounded(matched_dice(real_table)),
        "scales": {f"{scale:g}": row for scale, row in rows.items()},
        "painted": painted,
        "num_cases": len(judging.cases),
    }
    print(json.dumps(summary))


def guided_by(model: Model, scale: float) -> Any:
    """Return the model's guidance at another scale.

    Raises:
        InputError: a model that was trained without condition dropout, at another scale than 1.
    """
    if scale != 1 and not model.config["condition_dropout"]:
        raise InputError(f"{model.path} was trained with condition_dropout 0; look at --scales 1 --at 1 alone.")
    return replace(model.synthesizer.guidance, scale=scale)


def table_of(judging: Judging, volumes: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the Dice of what the judge sees in volumes with all masks, (N, N, K − 1)."""
    predictions = [segmented(judging.judge, volume) for volume in volumes]
    return dice_table(predictions, judging.masks, judging.own, judging.model.synthesizer.condition.num_classes)


def measured(judging: Judging, volumes: Sequence[torch.Tensor], real_table: np.ndarray) -> dict[str, Any]:
    """Return all figures of one volume for each mask."""
    table = table_of(judging, volumes)
    fidelity = normalised_fidelity(table, real_table)
    energies = np.array([(energy(v, own), energy(real, own)) for v, real, own in triples(judging, volumes)])  # (N, 2)
    reference = judging.features(judging.reals)
    scaled = standardised(reference)
    reference, features = scaled(reference), scaled(judging.features(volumes))
    kid = similarities(reference, features, polynomial_kernel)
    gaussian = similarities(reference, features, gaussian_kernel(median_distance(reference)))
    num_cases = len(volumes)
    return {
        "mask_fidelity": rounded(fidelity),
        "mask_fidelity_interval": interval(lambda w: normalised_fidelity(table, real_table, w), num_cases),
        "dice": rounded(matched_dice(table)),
        "dice_shuffled": rounded(mismatched_dice(table)),
        "spectrum_ratio": rounded(float(energies[:, 0].sum() / energies[:, 1].sum())),
        "spectrum_ratio_interval": interval(lambda w: float(w @ energies[:, 0] / (w @ energies[:, 1])), num_cases),
        "mmd": rounded(paired_squared_mmd(kid)),
        "mmd_interval": interval(lambda w: paired_squared_mmd(kid, w), num_cases),
        "gaussian_mmd": rounded(paired_squared_mmd(gaussian)),
    }


def triples(judging: Judging, volumes: Sequence[torch.Tensor]) -> Any:
    """Return each volume, its real one and its own voxels."""
    return zip(volumes, judging.reals, judging.own, strict=True)


def energy(volume: torch.Tensor, own: torch.Tensor) -> float:
    """Return the energy above half the Nyquist frequency of a volume's own voxels, its modalities together."""
    return float(high_frequency_energy(volume.numpy()[own_voxels(own.numpy())]).sum())


def painted_masks(judging: Judging, data: str) -> list[torch.Tensor]:
    """Return the masks, each label in its mean intensity over training volumes plus noise of its spread."""
    cases = cases_of_split(judging.model, data, "train")[:NUM_PAINTERS]
    volumes, masks, own = real_volumes(judging.model, cases)
    generator = torch.Generator().manual_seed(0)
    painted = [torch.zeros_like(volume) for volume in judging.reals]
    for label in range(judging.model.synthesizer.condition.num_classes):
        inside = [(m == label) & (o > 0) for m, o in zip(masks, own, strict=True)]
        values = torch.cat([v[:, i[0]] for v, i in zip(volumes, inside, strict=True)], dim=1)  # (C, voxels)
        if not values.numel():
            continue
        mean, std = values.mean(1).view(-1, 1, 1, 1), values.std(1).view(-1, 1, 1, 1)
        for volume, mask in zip(painted, judging.masks, strict=True):
            noise = torch.randn(volume.shape, generator=generator)
            volume += (mask == label) * (mean + std * noise)
    return [volume.clamp(0, 1) for volume in painted]


def print_row(name: str, row: dict[str, Any]) -> None:
    """Print one arm's figures."""
    low, high = row["mask_fidelity_interval"]
    print(
        f"{name:14} fidelity {row['mask_fidelity']:6.3f} ({low} to {high})   Dice {row['dice']:.3f}   "
        f"energy {row['spectrum_ratio']:6.3f}   MMD² {row['mmd']:8.3g}   Gaussian {row['gaussian_mmd']:8.3g}",
        flush=True,
    )


def plot(path: Path, rows: dict[float, dict[str, Any]], painted: dict[str, Any]) -> None:
    """Draw fidelity, energy and MMD against the guidance scale."""
    drawn = Figure(figsize=(11, 3.2), layout="constrained")
    titles = {
        "mask_fidelity": "mask fidelity, (D − S) / (R − S)",
        "spectrum_ratio": "energy above half Nyquist, of the real",
        "mmd": "squared MMD to the real volumes",
    }
    for axes, (name, title) in zip(drawn.subplots(1, len(titles)), titles.items(), strict=True):
        scales, values = list(rows), [row[name] for row in rows.values()]
        bounds = np.array([row[f"{name}_interval"] for row in rows.values()], dtype=float)
        axes.fill_between(scales, bounds[:, 0], bounds[:, 1], alpha=0.2, label="95 %")
        axes.plot(scales, values, marker="o")
        if name == "mmd":
            axes.axhline(painted[name], color="grey", linestyle="--", label="painted masks")
            axes.set_yscale("symlog", linthresh=max(1e-3, 0.1 * float(np.abs(values).max())))
        axes.set(title=title, xlabel="guidance scale")
        axes.legend(frameon=False)
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    door(main)
