"""An exported bundle's folder: where things are in it, and its weights read back as the checkpoint they came from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIGS = "configs"
METADATA = f"{CONFIGS}/metadata.json"
COMMON = f"{CONFIGS}/common.yaml"
TRAINING = "training"  # in the metadata: what a checkpoint has beside weights and configuration
# By stage: the file, its metadata, and the prefix of its weights, which are those of a module of tensor_networks.
WEIGHTS = {
    "diffusion": ("models/model.pt", METADATA, "denoiser."),
    "autoencoder": ("models/model_autoencoder.pt", f"{CONFIGS}/metadata_autoencoder.json", "codec."),
}
OBJECTS = {"diffusion": "ema", "autoencoder": "codec"}  # what checkpoints call the weights

Weights = Mapping[str, Any]


def weights_file(folder: Path, stage: str | None = None) -> Path:
    """Return where an exported bundle in `folder` has the weights of a stage, of stage 2 where none is named."""
    return folder / WEIGHTS[stage or "diffusion"][0] if stage in (None, *WEIGHTS) else folder / "models" / f"{stage}.pt"


def is_weights_file(path: Path) -> bool:
    """Say whether `path` is a weights file in an exported bundle's folder."""
    root = path.parent.parent
    return path.name in {Path(file).name for file, _, _ in WEIGHTS.values()} and all(
        (root / file).is_file() for file in (METADATA, COMMON)
    )


def as_checkpoint(path: Path, read: Callable[[Path], Weights], format: int) -> dict[str, Any]:
    """Return the weights file `path` of an exported bundle as a checkpoint's content; stage 2's has the codec as well.

    Args:
        path: see `is_weights_file`.
        read: reads such a file.
        format: of the content that is returned.

    Raises:
        OSError, ValueError: the folder lacks something, or has something else in its place.
    """
    root = path.parent.parent
    metadata = json.loads((root / METADATA).read_text())
    stage = next(stage for stage, (file, _, _) in WEIGHTS.items() if Path(file).name == path.name)
    stages = ("diffusion", "autoencoder") if stage == "diffusion" else ("autoencoder",)
    if TRAINING not in metadata:
        raise ValueError(f"{root / METADATA} does not say what the model was trained on")
    return {
        "format": format,
        "stage": stage,
        "config": (root / COMMON).read_text(),
        "objects": {OBJECTS[one]: _without_prefix(read(weights_file(root, one)), WEIGHTS[one][2]) for one in stages},
        "first_stage": None,
        "finished": True,
        **metadata[TRAINING][stage],
    }


def _without_prefix(weights: Weights, prefix: str) -> dict[str, Any]:
    wrong = next((key for key in weights if not key.startswith(prefix)), None)
    if wrong is not None:
        raise ValueError(f"it has {wrong}, where names begin with {prefix}")
    return {key.removeprefix(prefix): value for key, value in weights.items()}
