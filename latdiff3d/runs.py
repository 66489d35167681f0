"""A run and its folder: begin, go on where it stopped, train, finish. The bundle's programs, behind every door."""

import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser
from monai.engines import Trainer
from monai.utils import set_determinism

from latdiff3d import checkpoints, config, distributed, verdict
from latdiff3d.checkpointing import Run
from latdiff3d.codec import LatentCodec
from latdiff3d.errors import DivergedError, InputError, InputExit, place_error, root_input_error
from latdiff3d.interruption import stopping_on_signals
from latdiff3d.settings import check_settings, refuse_unused

CONFIG_FILE = "config.yaml"
LOST_RANK = r"Connection (closed|reset|refused)|gloo|NCCL|DistBackendError|Broken pipe"
# May differ between a run and its continuation.
NOT_OF_THE_RUN = (
    "resume", "logdir", "name", "run_dir", "device", "gpus", "bundle_root", "latent_cache", "encode_memory_gb",
    "cache", "cache_rate", "image_cache", "num_workers", "prefetch_factor", "checkpoint_every",
    "keep_checkpoints", "mlflow",
)  # fmt: skip


def begin(*files: str) -> None:
    """Check the configuration against the bundle's own `files`, and seed; a bundle's `initialize`.

    Raises:
        InputExit: for an unknown key, a setting that is not what it must be, or one that nothing would use.
    """
    parser = config.calling_parser()
    with one_line():
        resolved = _own_config(parser)
        folder = Path(str(resolved["bundle_root"])) / "configs"
        if not all((folder / file).is_file() for file in files):
            raise InputError(f"bundle_root is {resolved['bundle_root']!r}; expected the bundle's folder.")
        own = config.merged(folder / file for file in files)
        config.refuse_unknown_keys(resolved, own, "the configuration")
        check_settings(resolved)
        refuse_unused(resolved, own)
        set_determinism(int(resolved["seed"]), use_deterministic_algorithms=None)
        distributed.start()


def train(stage: str) -> None:
    """Train `stage` as the calling workflow's configuration says; a bundle's `training` program.

    A run folder that holds a checkpoint is gone on with; one that is finished is only reported.

    Raises:
        InputExit: for anything wrong in the configuration or the data.
    """
    parser = config.calling_parser()
    with one_line(), one_of_the_ranks():
        own = _own_config(parser)
        run_dir = Path(parser.get_parsed_content("run_dir"))
        _refuse_foreign_folder(run_dir, own, resuming=bool(own["resume"]))
        content = _start_content(run_dir, parser.get_parsed_content("resume"), stage)
        if content and content["first_stage"]:
            _refuse_other_first_stage(run_dir, content["first_stage"], parser.get_parsed_content("first_stage"))
        trainer: Trainer = parser.get_parsed_content("train::trainer")
        run: Run = parser.get_parsed_content("train::run")
        run.config_text = config.as_yaml(own)
        if content:
            run.restore(trainer, content)
        _require_same_start(trainer)
        if distributed.rank() == 0:
            _write_config(run_dir, run.config_text)
        started = time.monotonic()
        if trainer.state.epoch < trainer.state.max_epochs:
            last = run_dir / checkpoints.FOLDER / checkpoints.LAST
            signals = stopping_on_signals(trainer, run.write_last, last, run.accumulate_grad_batches)
            with _naming_the_last_checkpoint(last), signals:
                trainer.run()
        run.finish()
        print(run.summary(trainer, time.monotonic() - started), flush=True)


def start(
    overlays: Sequence[str | Path],
    settings: Sequence[str],
    named: Mapping[str, Any],
    stage: str | None = None,
    resume: str | None = None,
) -> None:
    """Train as overlays, `key=value` words and named settings (None: not given) say; what the doors call.

    Args:
        resume: a run's folder or a checkpoint in it; its configuration comes first.

    Raises:
        InputError, InputExit: for a user's mistake.
    """
    given = {key: value for key, value in named.items() if value is not None}
    if resume:
        run_dir = folder_of(resume)
        overlays = [run_dir / CONFIG_FILE, *overlays]
        given = {"run_dir": str(run_dir), **given, "resume": resume}
    workflow = config.training_workflow(overlays, {**given, **config.parse_settings(settings)}, stage)
    workflow.run()
    workflow.finalize()


def folder_of(place: str) -> Path:
    """Return the folder of the run that `place`, the folder itself or a checkpoint in it, names.

    Raises:
        InputError: when there is no run.
    """
    path = Path(place)
    folder = path if path.is_dir() else path.parent.parent
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"there is no run at {place}; expected a run's folder, with {CONFIG_FILE} in it, or its .pt.")
    return folder


def first_stage_codec(first_stage: str, codec: LatentCodec, settings: Mapping[str, Any]) -> LatentCodec:
    """Return `codec` with the weights and statistics of stage 1's checkpoint, frozen; warn if it is a poor one.

    Args:
        first_stage: the checkpoint, or the folder of its run.
        codec: as this configuration builds it.
        settings: this configuration's values of what both stages must share.

    Raises:
        InputError: no checkpoint, one of stage 2, unmeasured latents, other shapes, or other settings.
    """
    if not first_stage:
        raise InputError("stage 2 needs stage 1's checkpoint; give first_stage=RUN_OR_CKPT, such as runs/autoencoder.")
    path = checkpoints.find(first_stage)
    content = checkpoints.load(path, "autoencoder")
    there = yaml.safe_load(content["config"])
    for key, value in settings.items():
        if there[key] != value:
            raise InputError(f"{path} was trained with {key} {there[key]}, this run has {value}; use the same in both.")
    checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
    if codec.num_volumes.item() == 0:
        raise InputError(f"{path} has no latent statistics; finish stage 1, whose best.pt holds them, and use that.")
    if reasons := verdict.poor(content["quality"]) if content.get("quality") else []:
        print(f"warning: stage 2 begins on a poor codec, {path}: {'; '.join(reasons)}.", flush=True)
    return codec.requires_grad_(False).eval()


@contextmanager
def one_line() -> Iterator[None]:
    """Let a user's mistake out of MONAI's wrappers as the one line it is."""
    try:
        yield
    except Exception as error:
        mistake = root_input_error(error) or _settings_error(error)
        if mistake is None:
            raise
        raise InputExit(str(mistake)) from None


def _settings_error(error: BaseException) -> InputError | None:
    """Return what the system or a component of the configuration refused, if that is what `error` comes from."""
    refused = ""
    cause: BaseException | None = error
    while cause is not None:
        refused = refused or "".join(re.findall(r"^Failed to instantiate component '([^']+)'", str(cause)))
        if place_error(cause):
            return place_error(cause)
        is_theirs = refused and not refused.startswith("latdiff3d.") and not refused.endswith("Dataset")
        if is_theirs and isinstance(cause, (ValueError, TypeError)):
            return InputError(f"{refused} refuses its settings: {' '.join(str(cause).split())}")
        cause = cause.__cause__
    return None


def _own_config(parser: ConfigParser) -> dict[str, Any]:
    return {key: value for key, value in parser.get().items() if key != "_meta_"}


@contextmanager
def one_of_the_ranks() -> Iterator[None]:
    """Leave standard output to the first rank, and the others when done; tell a lost rank from an error of our own."""
    ranks = distributed.num_ranks()
    try:
        with nullcontext() if distributed.rank() == 0 else redirect_stdout(io.StringIO()):
            yield
            distributed.gather(None)  # what the first writes last is there
    except RuntimeError as error:
        if ranks == 1 or root_input_error(error) or not re.search(LOST_RANK, _told_by(error)):
            raise
        raise InputError(
            f"rank {distributed.rank()} has lost another rank, which says why above or in its own output, or cannot "
            f"reach it ({str(error).splitlines()[0]}); the same command goes on from the last checkpoint."
        ) from error
    finally:
        distributed.end()


@contextmanager
def _naming_the_last_checkpoint(last: Path) -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        there = f"{last} is from before this step." if last.is_file() else "There is no checkpoint yet."
        raise InputError(f"{error} {there}") from error


def _told_by(error: BaseException | None) -> str:
    """Return what an error and those it comes from say."""
    return "" if error is None else f"{error}\n{_told_by(error.__cause__ or error.__context__)}"


def _require_same_start(trainer: Trainer) -> None:
    """Refuse ranks that begin at different steps, for they see different files."""
    starts = distributed.gather(trainer.state.iteration)
    if len(set(starts)) > 1:
        raise InputError(
            f"the ranks begin after steps {starts}: they do not all see the same run folder; put it where every "
            "machine can read it."
        )


def _refuse_foreign_folder(run_dir: Path, own: Mapping[str, Any], resuming: bool) -> None:
    file = run_dir / CONFIG_FILE
    if resuming or not file.is_file():
        return
    there = config.read_yaml(file)
    comparable = [{k: v for k, v in one.items() if k not in NOT_OF_THE_RUN} for one in (own, there)]
    key = config.first_difference(*comparable)
    if key is not None:
        raise InputError(
            f"{run_dir} holds a run with another configuration: {key} is {there.get(key)} there, {own.get(key)} here. "
            "Choose another --name, or go on with that run by -r."
        )


def _refuse_other_first_stage(run_dir: Path, trained_on: Mapping[str, str], first_stage: str) -> None:
    given = checkpoints.record(first_stage)
    if trained_on["sha256"] != given["sha256"]:
        raise InputError(
            f"{run_dir} was trained on the latents of {trained_on['path']}, which is not {given['path']} as it is now; "
            "give that checkpoint, or another --name."
        )


def _start_content(run_dir: Path, resume: str, stage: str) -> dict[str, Any] | None:
    """Return the content of the checkpoint to go on from, None to begin."""
    if not resume or Path(resume).is_dir():
        place = Path(resume) if resume else run_dir
        content = checkpoints.load_last(place, stage)
        if content is None and resume:
            raise InputError(f"there is no checkpoint at {resume!s:.300}; expected a .pt file or the folder of a run.")
        return content
    return checkpoints.load(checkpoints.find(resume), stage)


def _write_config(run_dir: Path, text: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{CONFIG_FILE}.tmp"
    temporary.write_text(text)
    temporary.replace(run_dir / CONFIG_FILE)
