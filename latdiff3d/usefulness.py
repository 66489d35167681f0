"""Usefulness, a section of an evaluation: segmenters trained on synthetic, on real and on both, tested on real volumes.

All arms begin from the same weights, for one seed, and make the same number of updates: an epoch of each has as many
items, for which an arm with fewer cases takes them several times. So `both` has seen each real case half as often.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from monai.networks.nets import UNet

from latdiff3d import checkpoints, runs
from latdiff3d.bootstrap import crossed_interval
from latdiff3d.config import read_yaml
from latdiff3d.datalist import read_cases
from latdiff3d.dice import label_dice
from latdiff3d.errors import InputError
from latdiff3d.html_page import notes, number, table, with_interval
from latdiff3d.layouts import Case
from latdiff3d.mask_fidelity import segmented
from latdiff3d.model_cases import known_of
from latdiff3d.plain_figures import write_json
from latdiff3d.sample_folders import Writing, is_made, jobs_for, make
from latdiff3d.segmentation import STAGE, load_segmenter
from latdiff3d.synthesis import Model
from latdiff3d.volumes import sidecar_file

REAL, SYNTHETIC, BOTH = "real", "synthetic", "both"
ARMS = (REAL, SYNTHETIC, BOTH)
SEEDS = (0, 1, 2)


class Labelled(Protocol):
    """A real volume with its mask, as a segmenter sees it."""

    @property
    def image(self) -> np.ndarray:
        """Return its voxels, (C, D, H, W) in [0, 1]."""

    @property
    def mask(self) -> np.ndarray | None:
        """Return its classes 0 … K − 1, (1, D, H, W)."""

    @property
    def own(self) -> np.ndarray:
        """Return 1 on the voxels that are its own, (1, D, H, W)."""


def make_synthetic(model: Model, training: Sequence[Mapping[str, Any]], out: Path, seed: int = 0) -> Path:
    """Write a volume for each training mask into `out`, those that are there left as they are, and return it.

    Raises:
        InputError: for a mask that no volume can be made for.
    """
    masks, known = [case["mask"] for case in training], [known_of(model, case) for case in training]
    writing = Writing(picture=False)
    jobs, refused = jobs_for(model, masks, seed=seed, known=known, writing=writing, noise_apart=True)
    if refused:
        raise InputError(next(iter(refused.values())))
    left = [job for job in jobs if not is_made(job, out)]
    for _ in make(model, left, out):
        pass
    return out


def measure(
    out: str | Path,
    segmenter: str | Path,
    training: Sequence[Mapping[str, Any]],
    synthetic: str | Path,
    cases: Sequence[Mapping[str, Any]],
    volumes: Sequence[Labelled],
    seeds: Sequence[int] = SEEDS,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Train all arms, each where it is not trained yet, test them, and return the figures; there are no pictures.

    Args:
        out: a folder, which gets a run for each arm and seed, `<arm>-<seed>`; the same call goes on where it stopped.
        segmenter: a finished run of `latdiff3d train segmenter`, whose configuration and number of updates all have.
        training: the real training cases.
        synthetic: a folder that `latdiff3d sample` wrote for their masks.
        cases: the real held-out ones.
        volumes: of these, on one grid.
        seeds: of weights and batches.

    Raises:
        InputError: no cases in an arm, synthetic volumes for held-out masks, or what training refuses.
    """
    out, (wanted, settings) = Path(out), _recipe(segmenter)
    made = read_cases(synthetic, "brats", settings["modalities"])
    if not training or not made or not cases:
        raise InputError(
            f"{len(training)} real and {len(made)} synthetic training cases, {len(cases)} held-out ones; expected at "
            "least 1 of each."
        )
    _refuse_leaks(synthetic, made, cases)
    arms: dict[str, Sequence[Mapping[str, Any]]] = {REAL: training, SYNTHETIC: made, BOTH: [*training, *made]}
    num_items = len(arms[BOTH])
    num_batches = max(1, num_items // int(settings["batch_size"]))
    num_epochs = max(1, round(wanted / num_batches))
    tables = {}
    for arm, of_arm in arms.items():
        listed = _write_datalist(out / f"{arm}.json", of_arm, num_items, cases)
        rows = []
        for seed in seeds:
            run = out / f"{arm}-{seed}"
            if not _is_finished(run):
                named = {
                    "dataset_dir": str(listed), "split_dir": str(listed), "layout": "json", "run_dir": str(run),
                    "name": run.name, "resume": "", "seed": seed, "max_epochs": num_epochs, "val_interval": num_epochs,
                }  # fmt: skip
                runs.start([Path(segmenter) / runs.CONFIG_FILE], [], named, STAGE)
            rows.append(_tested(run, str(settings["purpose"]), volumes))
        tables[arm] = np.array(rows)  # (seeds, cases)
    numbers = {"num_training": len(training), "num_synthetic": len(made), "num_held_out": len(cases)}
    num_updates = num_epochs * num_batches // int(settings["accumulate_grad_batches"])
    return {**numbers, "seeds": list(seeds), "num_updates": num_updates, **summary(tables)}, {}


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    rows = []
    for arm, found in figures["arms"].items():
        more = figures.get(f"{arm}_minus_{REAL}")
        off = more is not None and more["interval"][1] < 0
        shown = number(None, 3) if more is None else with_interval(more["dice"], more["interval"], 3)
        by_seed = ", ".join(number(dice, 3) for dice in found["by_seed"])
        rows.append(
            [arm, with_interval(found["dice"], found["interval"], 3), by_seed, shown + (" worse" if off else "")]
        )
    said = [
        f"Mean Dice over labels and {figures['num_held_out']} real held-out cases of segmenters trained on "
        f"{figures['num_training']} real cases, {figures['num_synthetic']} synthetic ones made for training masks, or "
        f"both, in {figures['num_updates']} updates each, from each of the seeds {figures['seeds']}.",
        "Intervals, of 95 %, are by bootstrap over seeds and cases at once.",
    ]
    return table(["trained on", "Dice", "by seed", "more than real alone"], rows) + notes(said)


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a model card says of it."""
    arms = figures["arms"]
    more = figures[f"{BOTH}_minus_{REAL}"]
    return (
        f"Segmenters trained on real, on synthetic and on both kinds of volumes reach a Dice of "
        f"{', '.join(with_interval(arms[arm]['dice'], arms[arm]['interval'], 3) for arm in ARMS)} on real held-out "
        f"cases; both have {with_interval(more['dice'], more['interval'], 3)} more than real alone."
    )


def summary(tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return of each arm the mean Dice with its interval and each seed's, and what arms have more than `REAL`.

    Args:
        tables: by arm, (seeds, cases), the mean over labels of each held-out case's Dice; NaN where it has no label.
    """
    arms = {
        arm: {**_with_interval(table), "by_seed": [float(mean) for mean in np.nanmean(table, axis=1)]}
        for arm, table in tables.items()
    }
    more = {f"{arm}_minus_{REAL}": _with_interval(tables[arm] - tables[REAL]) for arm in tables if arm != REAL}
    return {"arms": arms, **more}


def _with_interval(table: np.ndarray) -> dict[str, Any]:
    known = table[:, ~np.isnan(table).any(axis=0)]
    if not known.size:
        raise InputError("no held-out mask has a label but the background; hold out labelled cases.")
    return {"dice": float(known.mean()), "interval": list(crossed_interval(known))}


def _recipe(segmenter: str | Path) -> tuple[int, dict[str, Any]]:
    """Return how many batches a run was trained on, and its settings."""
    config = Path(segmenter) / runs.CONFIG_FILE
    if not config.is_file():
        raise InputError(f"there is no run at {segmenter}; expected the folder of one, of latdiff3d train segmenter.")
    content = checkpoints.load(checkpoints.find(segmenter, checkpoints.LAST.removesuffix(".pt")), STAGE)
    return int(content["iteration"]), read_yaml(config)


def _refuse_leaks(folder: str | Path, made: Sequence[Case], held_out: Sequence[Mapping[str, Any]]) -> None:
    """Refuse synthetic volumes whose sidecars say that they were made for a mask that is tested on."""
    tested = {checkpoints.sha256(Path(case["mask"])): case["case"] for case in held_out}
    for case in made:
        sidecar = sidecar_file(Path(folder), case["case"])
        said = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        other = tested.get(str((said.get("Mask") or {}).get("SHA256")))
        if other is not None:
            raise InputError(
                f"{sidecar.parent} was made for the mask of {other}, on which segmenters are tested; expected volumes "
                "for training masks: latdiff3d sample --split train."
            )


def _write_datalist(
    path: Path, cases: Sequence[Mapping[str, Any]], num_items: int, held_out: Sequence[Mapping[str, Any]]
) -> Path:
    """Write a datalist whose training section takes `cases` in turn until it has `num_items` entries."""

    def entry(case: Mapping[str, Any], name: str) -> dict[str, Any]:
        mask = str(Path(case["mask"]).resolve())
        return {"case": name, "image": [str(Path(image).resolve()) for image in case["image"]], "label": mask}

    turns = [(place, cases[place % len(cases)]) for place in range(num_items)]
    training = [entry(case, f"{place}_{Path(str(case['case'])).name}") for place, case in turns]
    validation = [entry(case, f"held_out_{place}") for place, case in enumerate(held_out)]
    write_json(path, {"training": training, "validation": validation})
    return path


def _is_finished(run: Path) -> bool:
    path = run / checkpoints.FOLDER / "best.pt"
    return path.is_file() and bool(checkpoints.load(path)["finished"])


def _tested(run: Path, purpose: str, volumes: Sequence[Labelled]) -> list[float]:
    """Return the mean over labels of each held-out volume's Dice, NaN where the mask has none."""
    network = load_segmenter(run, purpose)
    assert isinstance(network, UNet)
    rows = []
    for volume in volumes:
        prediction = segmented(network, torch.as_tensor(volume.image)).float()  # (1, D, H, W)
        mask, own = torch.as_tensor(volume.mask).float(), torch.as_tensor(volume.own)
        dice = label_dice(prediction[None], mask[None], own[None], network.out_channels)
        rows.append(float(dice.nanmean()))
    return rows
