"""Does the memorisation audit see what it should, and nothing else?

    python benchmarks/memorisation.py --data DATA --run runs/memorisation [--all runs/dm] [--segmenter RUN] [--short]

Models are audited as `latdiff3d evaluate` does it, on `-n` samples for each validation mask:

- `overfitted`: trained here, in `--run`, on five training cases spread over the split, until it knows them by heart.
  The audit should flag nearly all of its samples.
- `all`: that of `--all`, trained before on the whole split, as docs/benchmarks/hippocampus.md does. About as many of
  its samples should be flagged as of the real validation volumes. Left out where there is none.

Of planted copies of training volumes all should be found in both. The segmenter is trained where none is given. A run
that is there is not trained again; the overfitted one's stage 2 may be of another kind, as `--diffusion-config
configs/unconditional.yaml configs/flow.yaml --diffusion-settings denoiser_def.channels=[32,64,128]`. `--short` trains
for an epoch, which shows that all of it runs, and no more. The last line is a JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from latdiff3d import checkpoints, config, runs
from latdiff3d.cli import door
from latdiff3d.errors import InputError
from latdiff3d.evaluation import memorisation_of
from latdiff3d.evaluation_files import LEFT_OUT
from latdiff3d.evidence import Evidence, judge_of
from latdiff3d.memorisation import ANY, sentence
from latdiff3d.real_volumes import spread
from latdiff3d.synthesis import Model

NUM_CASES = 5  # that are learnt by heart
STEPS = {
    "autoencoder": {"max_epochs": 80, "batch_size": 1, "loss::disc_weight": 0},
    "diffusion": {"max_epochs": 500, "batch_size": NUM_CASES},
    "segmenter": {"max_epochs": 20, "purpose": "evaluation"},
}


def main() -> None:
    """Train what is missing, audit, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="the data set's folder")
    parser.add_argument("--run", required=True, type=Path, help="a folder for what is trained and looked at here")
    parser.add_argument("--first-stage", help="stage 1's run; trained on the five cases as well if left out")
    parser.add_argument("--all", help="stage 2's run on the whole training split")
    parser.add_argument("--segmenter", help="the evaluation segmenter's run")
    parser.add_argument(
        "--config", nargs="+", default=[str(config.CONFIG_FOLDER / "hippocampus.yaml")], help="overlays"
    )
    parser.add_argument("--diffusion-config", nargs="+", default=[], help="overlays of stage 2, behind those")
    parser.add_argument("--diffusion-settings", nargs="+", default=[], help="key=value of stage 2")
    parser.add_argument("-n", type=int, default=1, help="samples for each mask")
    parser.add_argument("--short", action="store_true", help="train for an epoch")
    given = parser.parse_args()
    if given.n < 1:
        raise InputError(f"-n is {given.n}; expected at least 1 sample for each mask.")
    few = str(few_cases(given))
    first = given.first_stage or str(trained(given, "autoencoder", split_dir=few))
    models = {"overfitted": trained(given, "diffusion", first_stage=first, split_dir=few)}
    if given.all:
        models["all"] = Path(given.all)
    judge = Path(given.segmenter) if given.segmenter else trained(given, "segmenter")
    found = {arm: audited(given, arm, place, judge) for arm, place in models.items()}
    print(json.dumps({arm: summary(figures) for arm, figures in found.items()}))


def few_cases(given: argparse.Namespace) -> Path:
    """Return a folder that lists `NUM_CASES` of the training cases, and all validation cases."""
    folder: Path = given.run / "few_cases"
    if not (folder / "val.list").is_file():
        settings = {"dataset_dir": given.data, "run_dir": str(given.run / "autoencoder")}
        splits = config.training_workflow(given.config, settings, "autoencoder").parser.get_parsed_content("splits")
        folder.mkdir(parents=True, exist_ok=True)
        for split, cases in {"train": spread(splits["train"], NUM_CASES), "val": splits["val"]}.items():
            (folder / f"{split}.list").write_text("".join(f"{case['case']}\n" for case in cases))
    return folder


def trained(given: argparse.Namespace, stage: str, **settings: Any) -> Path:
    """Return the run of a stage in `--run`, trained first if need be."""
    run: Path = given.run / stage
    if not (run / checkpoints.FOLDER / "best.pt").is_file():
        steps = {**STEPS[stage], "max_epochs": 1} if given.short else STEPS[stage]
        named = {"dataset_dir": given.data, "run_dir": str(run), "val_interval": steps["max_epochs"]}
        overlays, words = (given.diffusion_config, given.diffusion_settings) if stage == "diffusion" else ([], [])
        runs.start([*given.config, *overlays], words, {**named, **steps, **settings}, stage)
    return run


def audited(given: argparse.Namespace, arm: str, place: Path, judge: Path) -> dict[str, Any]:
    """Return the figures of the audit of a model."""
    model = Model.load(place)
    seen_by = judge_of(model, judge)
    folder = given.run / f"audit_{arm}"
    evidence = Evidence.gathered(folder, model, Path(given.data), "val", seen_by, [], given.n, 0, seed=0)
    figures, _ = memorisation_of(evidence)
    if LEFT_OUT in figures:
        raise InputError(f"{given.data}: {figures[LEFT_OUT]}. Name more cases in val.list.")
    print(f"{arm}: {sentence(figures)}", flush=True)
    return figures


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what an arm's audit comes to."""
    copies = figures["planted"].values()
    return {
        "num_training": figures["num_training"],
        "num_samples": figures["num_samples"],
        "flagged": figures[ANY]["share"],
        "flagged_interval": figures[ANY]["interval"],
        "held_out_flagged": figures[ANY]["held_out_share"],
        "points_above_held_out": 100 * (figures[ANY]["share"] - figures[ANY]["held_out_share"]),
        "planted_found": sum(kind[ANY] for kind in copies) / sum(kind["num"] for kind in copies),
        "flagged_by_space": {name: space["share"] for name, space in figures["spaces"].items()},
    }


if __name__ == "__main__":
    door(main)
