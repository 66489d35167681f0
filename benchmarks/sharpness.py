"""What do the adversarial, feature-matching, perceptual and spectral terms change, from the same start?

    python benchmarks/sharpness.py --data DATA --run runs/ae [--segmenter runs/seg] [--minutes 6] [--each]

Goes on from a finished stage 1 in arms of `--minutes` each, on the same crops in the same order: with L1 + KL alone,
and with all terms at the weights of configs/sharp.yaml. For the first `WARMUP` steps the learning rate rises and the
discriminator trains alone; then its terms are ramped in, and the learning rate falls to 0 by a cosine. `--each` adds an
arm for each term alone. Prints for each check the PSNR in dB (own voxels, mean over the validation volumes) and the
energy of the reconstructions above half the Nyquist frequency over the real volumes': 1 is right, below 0.7 is blurred.
The perceptual term looks through the encoder of `--segmenter`; without one it is left out, and said so. The last line
is a JSON object, whose `psnr_fall_db` is the largest fall below the start at any check with all terms.
"""

import argparse
import json
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.utils import set_determinism

from latdiff3d import checkpoints
from latdiff3d.cli import door
from latdiff3d.config import CONFIG_FOLDER, read_yaml
from latdiff3d.errors import InputError
from latdiff3d.fidelity import own_voxels
from latdiff3d.losses import AutoencoderLoss
from latdiff3d.perceptual import segmenter_perceptual
from latdiff3d.segmentation import load_segmenter
from latdiff3d.spectrum import high_frequency_energy
from latdiff3d.training import AutoencoderValidation

LEARNING_RATE, WARMUP = 1.5e-4, 50
PERCEPTUAL_WEIGHT = 0.02
NUM_CHECKS = 6


def main() -> None:
    """Train both arms and print their curves."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--data", required=True, help="the data set's folder")
    arguments.add_argument("--run", required=True, help="stage 1's run or checkpoint, the start of both arms")
    arguments.add_argument("--segmenter", help="run of a segmenter, for the perceptual term")
    arguments.add_argument("--each", action="store_true", help="an arm for each term alone too")
    arguments.add_argument("--minutes", type=float, default=6, help="for each arm")
    given = arguments.parse_args()
    if given.minutes <= 0:
        raise InputError(f"--minutes is {given.minutes}; expected a number above 0.")
    perceptual = segmenter_perceptual(load_segmenter(given.segmenter)) if given.segmenter else None
    if perceptual is None:
        print("no --segmenter: the perceptual term is left out", flush=True)
    arms = losses(perceptual, each=given.each)
    curves = {name: continued(given, name, AutoencoderLoss(**loss)) for name, loss in arms.items()}
    for name, curve in curves.items():
        print(f"{name:18}{curve[-1]['psnr_db']:8.2f} dB{curve[-1]['spectrum_ratio']:8.2f} of the real energy")
    start, off, on = curves["on"][0], curves["off"][-1], curves["on"][-1]
    print(
        json.dumps(
            {
                "start_db": start["psnr_db"],
                "start_spectrum_ratio": start["spectrum_ratio"],
                "off_db": off["psnr_db"],
                "off_spectrum_ratio": off["spectrum_ratio"],
                "on_db": on["psnr_db"],
                "on_spectrum_ratio": on["spectrum_ratio"],
                "psnr_fall_db": round(max(start["psnr_db"] - point["psnr_db"] for point in curves["on"]), 3),
                "steps": on["step"],
                "each": {name: curve[-1] for name, curve in curves.items() if name not in ("off", "on")},
            }
        )
    )


def losses(perceptual: Any, each: bool) -> dict[str, dict[str, Any]]:
    """Return the arguments of `AutoencoderLoss` for each arm."""
    overlay = read_yaml(CONFIG_FOLDER / "sharp.yaml")
    sharp = {key.removeprefix("loss::"): value for key, value in overlay.items() if key.startswith("loss::")}
    schedule = {"disc_start": WARMUP, "disc_ramp": sharp.pop("disc_ramp")}
    if perceptual is not None:
        sharp["perceptual_weight"] = PERCEPTUAL_WEIGHT
    weights = {name: value for name, value in sharp.items() if name.endswith("_weight")}
    alone = {name.removesuffix("_weight"): {name: value} for name, value in weights.items()} if each else {}
    arms: dict[str, dict[str, Any]] = {"off": {}, "on": sharp, **alone}
    for arm in arms.values():
        arm["perceptual"] = perceptual if "perceptual_weight" in arm else None
    return {name: {"disc_weight": 0.0, **schedule, **arm} for name, arm in arms.items()}


def continued(given: argparse.Namespace, name: str, loss: AutoencoderLoss) -> list[dict[str, float]]:
    """Train on with `loss`; return what was reached at the start and at each check."""
    set_determinism(0)
    path = checkpoints.find(given.run)
    content = checkpoints.load(path, "autoencoder")
    parser = ConfigParser({**yaml.safe_load(content["config"]), "dataset_dir": given.data})
    parser.parse(True)
    checkpoints.load_weights(parser.get_parsed_content("codec"), content["objects"]["codec"], str(path))
    step = parser.get_parsed_content("train::step")
    step.loss = loss
    dataset = parser.get_parsed_content("train::dataset")
    loader = DataLoader(dataset, batch_size=1, shuffle=True, generator=torch.Generator().manual_seed(0))
    curve, spent, iteration, batches = [measured(step, parser, 0, 0.0)], 0.0, 0, iter(())
    while len(curve) <= NUM_CHECKS:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            continue
        began = time.monotonic()
        iteration += 1
        for group in step.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, spent / (60 * given.minutes))
        step(SimpleNamespace(state=SimpleNamespace(iteration=iteration)), batch)
        spent += time.monotonic() - began
        if spent >= len(curve) * given.minutes * 60 / NUM_CHECKS:
            curve.append(measured(step, parser, iteration, spent))
            print(name, curve[-1], flush=True)
    return curve


def learning_rate(iteration: int, share: float) -> float:
    """Return the learning rate: up over `WARMUP` steps, for Adam begins anew, and down to 0 by a cosine of the time."""
    return LEARNING_RATE * min(1.0, iteration / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def measured(step: Any, parser: ConfigParser, iteration: int, seconds: float) -> dict[str, float]:
    """Return PSNR and spectrum ratio over the validation volumes."""
    validation = AutoencoderValidation(step.autoencoder, step.device, step.precision)
    engine = SimpleNamespace(state=SimpleNamespace(iteration=0))
    psnr_db, energy, real_energy = [], 0.0, 0.0
    for batch in DataLoader(parser.get_parsed_content("validate::dataset"), batch_size=1):
        output = validation(engine, batch)
        own = own_voxels(np.asarray(batch["valid"][0]))
        psnr_db.append(output["psnr"])
        energy += high_frequency_energy(output["reconstruction"][0].cpu().numpy()[own]).sum()
        real_energy += high_frequency_energy(np.asarray(batch["image"][0])[own]).sum()
    return {
        "step": iteration,
        "seconds": round(seconds, 1),
        "psnr_db": round(float(np.mean(psnr_db)), 3),
        "spectrum_ratio": round(float(energy / real_energy), 3),
    }


if __name__ == "__main__":
    door(main)
