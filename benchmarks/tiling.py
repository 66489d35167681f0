"""Do tiles within a memory budget give what the whole volume at once gives, and do they keep to the budget?

    python benchmarks/tiling.py [--run RUN_OR_CKPT] [--data DATA] [--budget-gb 4] [--precision fp32] [--short]

Encodes a 182 × 218 × 182 volume and decodes its latents, by tiles and at once, each in a fresh process, and compares
the reconstructions. The volume is the first case of `--data`, or a phantom; the autoencoder is that of `--run`, or the
bundle's after a few epochs on small phantoms, trained in runs/benchmark_tiling if it is not there yet.

Memory is the process's largest resident set, Python and PyTorch included: the budget is for all of it. A seam's zone is
what lies within one latent cell of a place where the result passes from one tile to the next, encoding or decoding.
Differences are absolute, in units of the intensity range. The last line is a JSON object.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fresh_process import in_fresh_process
from monai.bundle import ConfigParser
from monai.transforms import Compose

from latdiff3d import checkpoints, memory, runs
from latdiff3d.cli import door
from latdiff3d.codec import LatentCodec
from latdiff3d.config import CONFIG_FOLDER
from latdiff3d.fidelity import psnr
from latdiff3d.phantoms import MODALITIES, write_phantoms
from latdiff3d.tiling import windows

OWN_RUN = Path("runs/benchmark_tiling")
SHAPE, SHORT_SHAPE = (182, 218, 182), (91, 109, 91)


def main() -> None:
    """Make what is missing, run both arms, print the table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--run", help="stage 1's run or checkpoint")
    arguments.add_argument("--data", help="a data set whose first case is taken")
    arguments.add_argument("--budget-gb", type=float, default=4.0, help="for the whole process, in 1e9 bytes")
    arguments.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="of the passes, in place of the run's")
    arguments.add_argument(
        "--short", action="store_true", help="a phantom of half the edges, an autoencoder of 1 epoch"
    )
    arguments.add_argument("--arm", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.arm:
        print(json.dumps(run_arm(**json.loads(given.arm))))
        return

    run = given.run or trained(given.short)
    with tempfile.TemporaryDirectory() as folder:
        image = whole_volume(run, given.data, SHORT_SHAPE if given.short else SHAPE, Path(folder))
        np.save(f"{folder}/image.npy", image)
        arms = {}
        for name, budget_gb in (("at once", None), ("tiles", given.budget_gb)):
            arm = {"run": run, "folder": folder, "name": name, "budget_gb": budget_gb, "precision": given.precision}
            arms[name] = in_fresh_process(__file__, arm)
        at_once, tiled = (np.load(f"{folder}/{name}.npy") for name in arms)
    seam = seam_zone(image.shape[1:], arms["tiles"]["layouts"], arms["tiles"]["factor"])
    difference = np.abs(at_once - tiled)
    zones = {"seam": difference[:, seam], "elsewhere": difference[:, ~seam]}

    print(f"{run}, {arms['tiles']['precision']}, on a volume of {' × '.join(map(str, image.shape))}")
    for name, layout in arms["tiles"]["layouts"].items():
        count = len(windows(layout["size"], layout["tile"], layout["overlap"], layout["multiple"]))
        print(f"{name}: {count} tiles of {layout['tile']} overlapping by {layout['overlap']}, of {layout['size']}")
    print(f"{'':10}{'peak GB':>9}{'seconds':>9}{'PSNR dB':>9}")
    for (name, arm), reconstruction in zip(arms.items(), (at_once, tiled), strict=True):
        quality = psnr(image, reconstruction.clip(0, 1), np.ones_like(image[:1]))
        print(f"{name:10}{arm['peak_gb']:9.2f}{arm['seconds']:9.1f}{quality:9.2f}")
    print(f"{'':10}{'voxels':>9}{'largest':>11}{'99.9 %':>11}{'mean':>11}")
    for name, values in zones.items():
        if values.size:
            figures = (values.max(), np.quantile(values, 0.999), values.mean())
            print(f"{name:10}{values.size / difference.size:9.1%}" + "".join(f"{figure:11.2e}" for figure in figures))
    print(
        json.dumps(
            {
                "peak_gb": arms["tiles"]["peak_gb"],
                "budget_gb": given.budget_gb,
                "seam_max_difference": float(zones["seam"].max()) if seam.any() else None,
                "elsewhere_max_difference": float(zones["elsewhere"].max()),
                "mean_difference": float(difference.mean()),
                "tiled_seconds": arms["tiles"]["seconds"],
                "untiled_seconds": arms["at once"]["seconds"],
                "untiled_peak_gb": arms["at once"]["peak_gb"],
            }
        )
    )


def trained(short: bool) -> str:
    """Return the run of this benchmark's own, trained if it is not there."""
    data = OWN_RUN / "data"
    if not data.is_dir():
        write_phantoms(data, num_train=8, num_val=2, progress=True)
    epochs = 1 if short else 10
    name = f"autoencoder_{epochs}"
    settings = {"dataset_dir": str(data), "logdir": str(OWN_RUN), "name": name}
    runs.start([CONFIG_FOLDER / "autoencoder.yaml"], [], {**settings, "max_epochs": epochs, "val_interval": epochs})
    return str(OWN_RUN / name)


def whole_volume(run: str, data: str | None, shape: tuple[int, int, int], folder: Path) -> np.ndarray:
    """Return a volume (C, D, H, W) as the run's autoencoder sees it, uncropped."""
    parser, _ = configured(run)
    if data is None:
        write_phantoms(folder / "data", num_train=1, num_val=0, shape=shape, spacing_mm=1.0)
        names = [MODALITIES[i % len(MODALITIES)] for i in range(len(parser["modalities"]))]
        paths = [str(path) for name in names for path in (folder / "data").glob(f"*/*_{name}.nii.gz")]
    else:
        parser["dataset_dir"] = data
        parser.parse(True)
        paths = parser.get_parsed_content("cases")[0]["image"]
    return np.asarray(Compose(parser.get_parsed_content("preprocessing"))({"image": paths})["image"])


def configured(run: str) -> tuple[ConfigParser, dict[str, Any]]:
    """Return a stage-1 checkpoint's configuration and content."""
    content = checkpoints.load(checkpoints.find(run), "autoencoder")
    parser = ConfigParser(yaml.safe_load(content["config"]))
    return parser, content


def run_arm(run: str, folder: str, name: str, budget_gb: float | None, precision: str | None) -> dict[str, Any]:
    """Encode and decode the folder's image, save its reconstruction, and return the arm's figures."""
    parser, content = configured(run)
    if precision:
        parser["precision"] = precision
        parser.parse(True)
    codec: LatentCodec = parser.get_parsed_content("codec")
    checkpoints.load_weights(codec, content["objects"]["codec"], run)
    codec.eval()
    del content
    image = torch.from_numpy(np.load(f"{folder}/image.npy"))[None].to(codec.latent_mean.device)
    layouts: dict[str, dict[str, Any]] = {}

    def noting(
        function: Any, volume: torch.Tensor, tile: Any, overlap: int, margin: int, multiple: int, scale: Any
    ) -> Any:
        step = "encoding" if scale < 1 else "decoding"
        sizes = {"size": list(volume.shape[2:]), "tile": list(tile)}
        layouts[step] = {**sizes, "overlap": overlap, "margin": margin, "multiple": multiple}
        return blended(function, volume, tile, overlap, margin, multiple, scale)

    blended, memory.blended = memory.blended, noting
    begun = time.perf_counter()
    mean, _ = codec.encode(image, left_of(budget_gb))
    reconstruction = codec.decode(mean, image.shape[2:], left_of(budget_gb))
    seconds = time.perf_counter() - begun
    peak = peak_bytes(image.device)
    np.save(f"{folder}/{name}.npy", reconstruction[0].cpu().numpy())
    return {
        "peak_gb": round(peak / 1e9, 3),
        "seconds": round(seconds, 1),
        "layouts": layouts,
        "factor": codec.factor,
        "precision": codec.precision,
    }


def left_of(budget_gb: float | None) -> float | None:
    """Return what of the budget the process does not hold yet."""
    if budget_gb is None:
        return None
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else status_bytes("VmRSS")
    return budget_gb - held / 1e9


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """Return a figure of Linux' /proc; elsewhere the largest resident set stands for both."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


def seam_zone(shape: Sequence[int], layouts: dict[str, dict[str, Any]], factor: int) -> np.ndarray:
    """Return where (D, H, W) the result passes from one tile to the next, one latent cell more on either side."""
    zone = np.zeros(shape, bool)
    for step, layout in layouts.items():
        voxels = 1 if step == "encoding" else factor  # of the image, to one of the layout's
        boxes = windows(layout["size"], layout["tile"], layout["overlap"], layout["multiple"])
        for axis in range(3):
            parts = sorted({(box[axis].start, box[axis].stop) for box, _ in boxes})
            for (_, stop), (start, _) in itertools.pairwise(parts):
                first, last = (start + layout["margin"]) * voxels - factor, (stop - layout["margin"]) * voxels + factor
                zone[(slice(None),) * axis + (slice(first, last),)] = True
    return zone


if __name__ == "__main__":
    door(main)
