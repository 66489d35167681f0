"""How long does an autoencoder train for its quality: MONAI's published recipe, our plain network, our fast one?

    python benchmarks/autoencoder.py --data DATA [--config configs/hippocampus.yaml] [--run FOLDER] [--minutes 15]

Each arm trains for `--minutes` of its own clock (validation excluded, the linear start included), in turn, on the same
crops in the same order, and is validated at the same times: PSNR in dB, data range 1, on each validation volume's own
voxels, mean over the volumes. Beside them stands block PCA, the best linear code at the same rate, fitted on the
training cases' crops. What `--run` holds already is not trained again. Writes FOLDER/autoencoder.json and .png.

- monai: stage 1 of the Model Zoo's brats_mri_generative_diffusion, in float32; see monai_recipe.py.
- plain: MONAI's AutoencoderKL of (16, 32, 64) channels, L1 + KL, bfloat16, as configs/plain.yaml.
- fast: the wavelet stem around (32, 64) channels, the same losses.

The last two have no adversarial term, and a learning rate that falls to 0 by a cosine over their time.
The last line is a JSON object.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.utils import set_determinism
from monai_recipe import AutoencoderRecipe

from latdiff3d.cli import door
from latdiff3d.config import CONFIG_FOLDER, training_workflow
from latdiff3d.errors import InputError
from latdiff3d.fidelity import psnr
from latdiff3d.linear_codes import BlockPCA
from latdiff3d.networks import downsampling
from latdiff3d.training import AutoencoderValidation
from latdiff3d.wavelets import LinearStart

ARMS = ("monai", "plain", "fast")
OURS: dict[str, dict[str, Any]] = {
    "plain": {"autoencoder_def::channels": [16, 32, 64], "autoencoder_def::attention_levels": [False] * 3},
    "fast": {"autoencoder_def::channels": [32, 64], "autoencoder_def::attention_levels": [False] * 2},
}
OURS_COMMON = {"loss::disc_weight": 0.0, "batch_size": 1, "learning_rate": 1e-3}
# Shares of an arm's time after which it is validated: dense at first, where a fast network's curve is steep.
CHECKS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
WARMUP_STEPS = 50

Step = Callable[[int, dict[str, Any]], object]
Curve = list[dict[str, float]]


def main() -> None:
    """Train what is missing, print the table, draw the curves."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--data", required=True, help="the data set's folder")
    arguments.add_argument("--config", default=str(CONFIG_FOLDER / "hippocampus.yaml"), help="overlay for the data set")
    arguments.add_argument("--run", default="runs/benchmark_autoencoder", help="folder of the results")
    arguments.add_argument("--minutes", type=float, default=15, help="for each arm; a tenth is a quick look")
    given = arguments.parse_args()
    if given.minutes <= 0:
        raise InputError(f"--minutes is {given.minutes}; expected a number above 0.")
    folder = Path(given.run)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "autoencoder.json"
    results = json.loads(file.read_text()) if file.is_file() else {"minutes": given.minutes, "arms": {}}
    if results["minutes"] != given.minutes:
        raise InputError(f"{folder} holds arms of {results['minutes']} minutes; give another --run, or those minutes.")

    data = parsed(given, {})
    if "pca_db" not in results:
        results["pca_db"] = pca_db(data)
    for arm in ARMS:
        if arm not in results["arms"]:
            set_determinism(0)
            curve, steps = trained(arm, given, data)
            results["arms"][arm] = {"curve": curve, "steps": steps}
            file.write_text(json.dumps(results, indent=1))
    summary = summarised(results)
    draw(results, folder / "autoencoder.png")
    print_table(results)
    print(json.dumps(summary))


def parsed(given: argparse.Namespace, settings: dict[str, Any], *overlays: str) -> ConfigParser:
    """Return stage 1's configuration for the data set, with overlays and settings on top."""
    named = {"dataset_dir": given.data, **OURS_COMMON, **settings}
    return training_workflow([given.config, *overlays], named, "autoencoder").parser


def trained(arm: str, given: argparse.Namespace, data: ConfigParser) -> tuple[Curve, int]:
    """Train an arm for its time; return its validated curve and how many steps it made."""
    start = time.monotonic()
    if arm == "monai":
        recipe = AutoencoderRecipe(data.get_parsed_content("num_channels"), data.get_parsed_content("latent_channels"))
        autoencoder, step = recipe.autoencoder, lambda _, batch: recipe.step(batch)
        precision = "fp32"
    else:
        overlays = [str(CONFIG_FOLDER / "plain.yaml")] if arm == "plain" else []
        own = parsed(given, OURS[arm], *overlays)
        autoencoder, step = our_recipe(own, given.minutes * 60)
        precision = own.get_parsed_content("precision")
        loader = batches_of(data)
        LinearStart(autoencoder, loader)(SimpleNamespace(state=SimpleNamespace(iteration=0)))
    spent = time.monotonic() - start if arm != "monai" else 0.0  # building ours; the peer is given its building free
    num_parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    print(f"{arm}: {num_parameters / 1e6:.2f} million parameters, {spent:.1f} s to start", flush=True)

    validation = AutoencoderValidation(autoencoder, data.get_parsed_content("device"), precision)
    curve: Curve = []
    batches = endless(batches_of(data))
    checks = [share * given.minutes * 60 for share in CHECKS]
    iteration = 0
    while checks:
        began = time.monotonic()
        iteration += 1
        step(iteration, {**next(batches), "spent": spent})
        spent += time.monotonic() - began
        if spent >= checks[0]:
            checks = [check for check in checks if check > spent]
            curve.append(
                {"seconds": round(spent, 1), "step": iteration, "psnr_db": round(psnr_db(validation, data), 3)}
            )
            print(f"{arm} {spent:7.0f} s  step {iteration:6}  {curve[-1]['psnr_db']:.2f} dB", flush=True)
    return curve, iteration


def our_recipe(parser: ConfigParser, seconds: float) -> tuple[torch.nn.Module, Step]:
    """Return the configured autoencoder and a step of the configured kind, its learning rate a cosine over time."""
    update = parser.get_parsed_content("train::step")
    base = parser.get_parsed_content("learning_rate")

    def step(iteration: int, batch: dict[str, Any]) -> None:
        warm, done = min(1.0, iteration / WARMUP_STEPS), min(1.0, batch["spent"] / seconds)
        for group in update.optimizer.param_groups:
            group["lr"] = base * warm * 0.5 * (1 + math.cos(math.pi * done))
        update(SimpleNamespace(state=SimpleNamespace(iteration=iteration)), batch)

    return update.autoencoder, step


def batches_of(data: ConfigParser) -> DataLoader:
    """Return the training loader, one volume a batch, in an order that the seed decides."""
    dataset = data.get_parsed_content("train::dataset")
    return DataLoader(dataset, batch_size=1, shuffle=True, generator=torch.Generator().manual_seed(0))


def endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Yield epoch after epoch."""
    while True:
        yield from loader


def psnr_db(validation: AutoencoderValidation, data: ConfigParser) -> float:
    """Return the mean PSNR over the validation volumes."""
    engine = SimpleNamespace(state=SimpleNamespace(iteration=0))
    loader = DataLoader(data.get_parsed_content("validate::dataset"), batch_size=1)
    return float(np.mean([validation(engine, batch)["psnr"] for batch in loader]))


def pca_db(data: ConfigParser) -> float:
    """Return the mean PSNR of block PCA, fitted on the training crops, over the validation volumes."""
    factor = downsampling(data.get_parsed_content("autoencoder"))
    crops = (np.asarray(item["image"]) for item in data.get_parsed_content("train::dataset"))
    pca = BlockPCA().fit(crops, data.get_parsed_content("latent_channels"), factor)
    scores = []
    for item in data.get_parsed_content("validate::dataset"):
        image = np.asarray(item["image"])
        scores.append(psnr(image, pca.reconstruct(image).clip(0, 1), np.asarray(item["valid"])))
    return round(float(np.mean(scores)), 3)


def seconds_to(curve: Curve, psnr_db: float) -> float:
    """Return when a curve was first seen at `psnr_db` or above; infinity if never."""
    return next((point["seconds"] for point in curve if point["psnr_db"] >= psnr_db), math.inf)


def summarised(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the last line."""
    curves = {arm: results["arms"][arm]["curve"] for arm in ARMS}
    final = {arm: curve[-1]["psnr_db"] for arm, curve in curves.items()}

    def ratio(peer: str) -> float:
        return round(seconds_to(curves["fast"], final[peer]) / curves[peer][-1]["seconds"], 4)

    return {
        "minutes": results["minutes"],
        "time_to_plain_ratio": ratio("plain"),
        "time_to_quality_ratio": ratio("monai"),
        "psnr_gain_db": round(final["fast"] - final["plain"], 2),
        "psnr_over_pca_db": round(final["fast"] - results["pca_db"], 2),
        "pca_db": results["pca_db"],
        **{f"{arm}_db": value for arm, value in final.items()},
        **{f"{arm}_steps": results["arms"][arm]["steps"] for arm in ARMS},
    }


def print_table(results: dict[str, Any]) -> None:
    """Print each arm's end."""
    print(f"block PCA: {results['pca_db']:.2f} dB")
    for arm in ARMS:
        end, steps = results["arms"][arm]["curve"][-1], results["arms"][arm]["steps"]
        print(f"{arm:6} {steps:6} steps, {end['seconds'] / steps:.3f} s a step: {end['psnr_db']:.2f} dB")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the curves as a picture."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = {"monai": "MONAI's published recipe", "plain": "plain AutoencoderKL", "fast": "wavelet stem (default)"}
    for arm in ARMS:
        curve = results["arms"][arm]["curve"]
        axes.plot([p["seconds"] / 60 for p in curve], [p["psnr_db"] for p in curve], "o-", ms=3, label=names[arm])
    axes.axhline(results["pca_db"], color="grey", ls="--", lw=1, label="block PCA")
    axes.set_xlabel("training time, minutes")
    axes.set_ylabel("validation PSNR, dB")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    door(main)
