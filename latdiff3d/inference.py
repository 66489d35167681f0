"""A bundle's programs behind training: sample volumes, and measure trained weights on the validation cases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.bundle import ConfigParser
from torch.utils.data import Dataset

from latdiff3d import checkpoints, config, distributed, runs, sample_folders
from latdiff3d.errors import SOME_LEFT_OUT, InputError
from latdiff3d.memory import gigabytes
from latdiff3d.sample_folders import Job, Writing
from latdiff3d.sampling_jobs import Request
from latdiff3d.synthesis import SAMPLING_SETTINGS, Model

# Of common.yaml: what sampling takes from this configuration, not from the model's own.
OF_SAMPLING = ("bundle_root", "dataset_dir", "seed", "gpus")
EVALUATED = ("codec", "ema", "segmenter")  # what a checkpoint calls the weights that are used in the end


def begin(*files: str) -> None:
    """Do what `runs.begin` does, and refuse settings of the model, which come with it.

    Raises:
        InputExit: see `runs.begin`; or a setting that sampling would take no notice of.
    """
    runs.begin(*files)
    resolved = config.calling_parser().get()
    with runs.one_line():
        folder = Path(str(resolved["bundle_root"])) / "configs"
        own, overlay = config.merged(folder / file for file in files), folder / config.OVERLAY
        usual = [own, own | (config.read_yaml(overlay) if overlay.is_file() else {})]
        for key in config.read_yaml(folder / config.COMMON):
            if key not in OF_SAMPLING and resolved[key] not in [values[key] for values in usual]:
                advice = f"say sampling::{key}" if key in SAMPLING_SETTINGS else "leave it out"
                raise InputError(f"{key} is set, and sampling takes the model's own; {advice}.")


def begin_evaluation(*files: str) -> None:
    """Do what `runs.begin` does, the bundle's `files` and that of the stage being what is known.

    Raises:
        InputExit: see `runs.begin`; or a configuration of no stage.
    """
    parser = config.calling_parser()
    with runs.one_line():
        stage = parser.get("train::run::stage")
        if stage not in config.STAGE_FILES:
            raise InputError(
                "evaluate.yaml is read without a stage; give train_autoencoder.yaml, or another, before it."
            )
    runs.begin(*files, config.STAGE_FILES[stage])


def sample() -> None:
    """Make the volumes of the calling workflow's `dataset`, each rank a share of them; a bundle's `inference` program.

    Raises:
        InputExit: for anything wrong in the configuration, or where no mask can be used.
        SystemExit: with `SOME_LEFT_OUT`, after the others are done, where some masks cannot.
    """
    parser = config.calling_parser()
    with runs.one_line(), runs.one_of_the_ranks():
        jobs: Jobs = parser.get_parsed_content("dataset")
        if len(jobs):
            parser.get_parsed_content("evaluator").run()
        print(jobs.work.said(parser["out"]), flush=True)
    if jobs.work.refused:
        raise SystemExit(SOME_LEFT_OUT)


def evaluate() -> None:
    """Print the validation metrics of trained weights; a bundle's `evaluate` program.

    Raises:
        InputExit: for anything wrong in the configuration, the data or the checkpoint.
    """
    parser = config.calling_parser()
    with runs.one_line(), runs.one_of_the_ranks():
        stage, place = parser.get_parsed_content("train::run::stage"), parser.get_parsed_content("model")
        path = checkpoints.find(place, stage=stage)
        _load_weights(parser, checkpoints.load(path, stage)["objects"], path)
        evaluator = parser.get_parsed_content("evaluator")
        evaluator.run()
        metrics = {name: value for name, value in evaluator.state.metrics.items() if isinstance(value, (int, float))}
        told = {"stage": stage, "model": str(path), "cases": len(parser.get_parsed_content("dataset")), **metrics}
        for name, value in told.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
        if parser["figures"] and distributed.rank() == 0:
            file = Path(parser["figures"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told, indent=2) + "\n")


def loaded(
    model: str,
    gpus: str,
    sampling: Mapping[str, Any],
    label_map: Mapping[int, int],
    whole: bool = False,
    memory: str = "",
) -> Model:
    """Return the model at `model`, a place that `checkpoints.find` knows, with settings of sampling; None: its own.

    Args:
        whole: for volumes as large as their masks; `memory`, as `memory.gigabytes` reads it, is what they may take.
    """
    given = {key: value for key, value in sampling.items() if value is not None}
    found = Model.load(model, gpus=gpus or None, settings=given)
    numbers = {int(label): int(ours) for label, ours in label_map.items()}
    found = found.with_label_map(numbers) if numbers else found
    return found.for_whole_masks(gigabytes(memory)) if whole else found


def writing(model: Model, picture: bool, gif: bool, like: str, int16: bool) -> Writing:
    """Return how volumes are written; see `sample_folders.Writing` and `sample_folders.reference_for`."""
    return Writing(picture, gif, sample_folders.reference_for(model, like), int16)


class Jobs(Dataset[Job]):
    """This rank's share of the volumes that are to be made and are not there yet.

    Args:
        model: from `loaded`.
        out: the folder.
        mask: a file or a folder; '' for those of a split of `data`, or for a model without masks.
        data: a data set's folder.
        num_samples: for each mask, or in all for an unconditional model.
        seed: of the first.
        grid: "mask", the mask file's own, or "crop", the model's.
        known: covariates by name, the same for all; a split's cases have their own beside them.
        writing: see there.

    Attributes:
        work: of all ranks.
        jobs: this rank's share of what is left of it.

    Raises:
        InputError: a number of volumes that is none, or see `sampling_jobs.Request`.
    """

    def __init__(
        self,
        model: Model,
        out: str,
        mask: str,
        data: str,
        split: str,
        num_samples: int,
        seed: int,
        grid: str,
        known: Mapping[str, Any],
        writing: Writing,
    ) -> None:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise InputError(f"num_samples is {num_samples!r}; expected a whole number from 1 on.")
        of_split = None if mask or not model.is_conditional else data
        request = Request(mask or None, of_split, split, num_samples, seed, grid, known)
        self.work = request.work(model, out, writing)
        distributed.gather(None)  # none is made before every rank has looked which are there
        self.jobs = self.work.left[distributed.rank() :: distributed.num_ranks()]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> Job:
        return self.jobs[number]


class Make:
    """Makes a job's volume, as an engine's iteration."""

    def __init__(self, model: Model, out: str) -> None:
        self.model = model
        self.out = out

    def __call__(self, engine: Engine, job: Job) -> dict[str, Any]:
        """Write the volume and return `case`, `pred` (C, D, H, W) in [0, 1] on the model's grid, and `files`."""
        [(case, sample, files)] = sample_folders.make(self.model, [job], self.out)
        return {"case": case, "pred": sample.volume, "files": [str(file) for file in files]}


def _load_weights(parser: ConfigParser, weights: Mapping[str, Any], path: Path) -> None:
    for name in parser.get("train::run::objects"):
        if name in EVALUATED:
            network = parser.get_parsed_content(f"train::run::objects::{name}")
            checkpoints.load_weights(network, weights[name], str(path))
