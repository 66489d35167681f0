"""Handlers of a run's numbers: averages, schedules, progress and metrics, where MONAI and Ignite have none that do."""

import csv
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines.workflow import Workflow
from monai.handlers import LrScheduleHandler
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from latdiff3d import updates
from latdiff3d.distributed import rank


class EMA(EMAHandler):
    """Ignite's moving average of the weights, by updates; a resumed run goes on with its warm-up.

    Args:
        model: whose weights are averaged.
        momentum: share of the new weights in each update, after the warm-up.
        momentum_warmup: the share it begins with; None for no warm-up.
        warmup_iters: of the warm-up, in updates.
        accumulate_grad_batches: batches per update.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(model, momentum, momentum_warmup, warmup_iters)
        self.accumulate_grad_batches = accumulate_grad_batches

    def attach(
        self, engine: Engine, name: str = "ema_momentum", warn_if_exists: bool = True, event: Any = None
    ) -> None:
        """Average after each update; the warm-up counts the engine's updates, not this process'."""
        super().attach(engine, name, warn_if_exists, event or updates.completed(self.accumulate_grad_batches))
        engine.add_event_handler(Events.STARTED, self._catch_up)

    def _catch_up(self, engine: Engine) -> None:
        if self._momentum_lambda_obj is not None and self.momentum_scheduler is not None:
            self.momentum_scheduler.event_index = updates.num_updates_done(engine, self.accumulate_grad_batches)


class LrSchedule(LrScheduleHandler):
    """MONAI's handler of a learning rate's schedule, by updates.

    Args:
        lr_scheduler: PyTorch's.
        accumulate_grad_batches: batches per update.
    """

    def __init__(self, lr_scheduler: Any, accumulate_grad_batches: int = 1) -> None:
        super().__init__(lr_scheduler, print_lr=False, epoch_level=False)
        self.accumulate_grad_batches = accumulate_grad_batches

    def attach(self, engine: Engine) -> None:
        """Step after each update."""
        engine.add_event_handler(updates.completed(self.accumulate_grad_batches), self)

    def __call__(self, engine: Engine) -> None:
        """Step; an update that float16's scaler has skipped counts, even the first, at which PyTorch wonders."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            super().__call__(engine)


def existing(handler: Any) -> Any:
    """Return `handler`: an item of `train::handlers` must be a dict for MONAI's check of a bundle's properties."""
    return handler


class Progress:
    """A progress bar over the whole run, with the time left and the latest losses.

    Args:
        title: what is going on, shown at its left.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def attach(self, engine: Workflow) -> None:
        """Follow `engine` from start to end."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._abandon)

    def _start(self, engine: Workflow) -> None:
        self.bar = progress_bar(
            total=engine.state.max_epochs * engine.state.epoch_length,
            desc=self.title,
            unit="step",
            initial=engine.state.iteration,
        )

    def _advance(self, engine: Workflow) -> None:
        assert self.bar is not None
        shown = {name: f"{value:.3g}" for name, value in engine.state.output.items()}
        self.bar.set_postfix({"epoch": engine.state.epoch, **shown}, refresh=False)
        self.bar.update()

    def _close(self, engine: Workflow) -> None:
        if self.bar is not None:
            self.bar.close()

    def _abandon(self, engine: Workflow, error: BaseException) -> None:
        self._close(engine)
        raise error


class MetricsCSV:
    """A row an epoch: means of the training terms, validation metrics, learning rate, seconds and the wait for data.

    `data_wait` is the share of the training steps' time, loading included, in which the step waited for its batch.

    A resumed run drops the rows after its checkpoint and goes on below them.

    Args:
        path: the file.
        evaluator: whose metrics are written beside the training's.
        optimizer: whose learning rate is written.
    """

    def __init__(self, path: str, evaluator: Workflow, optimizer: torch.optim.Optimizer) -> None:
        self.path = Path(path)
        self.evaluator = evaluator
        self.optimizer = optimizer
        self.sums: dict[str, list[float]] = {}
        self.validated = False
        self.waited, self.worked, self.since = 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, list[float]]:
        """Return the terms of the epoch so far, for a checkpoint in the middle of one."""
        return {name: list(values) for name, values in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on with an epoch's terms."""
        self.sums = {name: list(values) for name, values in state.items()}

    def attach(self, engine: Workflow) -> None:
        """Collect each step's terms and write each epoch's row; validation must be attached before."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._note_time)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._note_wait)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        self.evaluator.add_event_handler(Events.COMPLETED, self._note_validation)

    def _start(self, engine: Workflow) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        completed = engine.state.iteration // engine.state.epoch_length
        rows = [row for row in read_metrics(self.path) if int(row["epoch"]) <= completed]
        self._write_rows(rows)

    def _note_time(self, engine: Workflow) -> None:
        self.since = time.monotonic()

    def _note_wait(self, engine: Workflow) -> None:
        self.waited += time.monotonic() - self.since
        self.since = time.monotonic()

    def _collect(self, engine: Workflow) -> None:
        self.worked += time.monotonic() - self.since
        for name, value in engine.state.output.items():
            self.sums.setdefault(name, []).append(value)

    def _note_validation(self, engine: Workflow) -> None:
        self.validated = True

    def _write(self, engine: Workflow) -> None:
        row = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        row["seconds"] = round(engine.state.times[Events.EPOCH_COMPLETED.name], 2)
        row["data_wait"] = round(self.waited / (self.waited + self.worked), 4)
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row |= {f"train_{name}": sum(values) / len(values) for name, values in self.sums.items()}
        if self.validated:
            row |= {f"val_{name}": value for name, value in self.evaluator.state.metrics.items()}
        self.sums, self.validated, self.waited, self.worked = {}, False, 0.0, 0.0
        self._write_rows([*read_metrics(self.path), row])

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.csv, empty cells left out; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


class TensorBoard:
    """Writes the training terms of each step and the metrics of each validation to TensorBoard.

    Its writer is opened at the start of training, so that a run refused before that leaves no folder behind.

    Args:
        log_dir: where the event files go.
        evaluator: whose metrics are written.
    """

    def __init__(self, log_dir: str, evaluator: Workflow) -> None:
        self.log_dir = log_dir
        self.evaluator = evaluator
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter:
        """The open writer; only while its engine runs, or has run."""
        assert self._writer is not None
        return self._writer

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer and the evaluator."""
        if rank() > 0:
            return

        def open_writer(engine: Workflow) -> None:
            self._writer = SummaryWriter(self.log_dir, purge_step=engine.state.iteration + 1)

        def write_terms(engine: Workflow) -> None:
            for name, value in engine.state.output.items():
                self.writer.add_scalar(f"train/{name}", value, engine.state.iteration)

        def write_metrics(evaluator: Workflow) -> None:
            for name, value in evaluator.state.metrics.items():
                self.writer.add_scalar(f"val/{name}", value, engine.state.iteration)

        engine.add_event_handler(Events.STARTED, open_writer)
        engine.add_event_handler(Events.ITERATION_COMPLETED, write_terms)
        engine.add_event_handler(Events.COMPLETED, lambda _: self.writer.close())
        self.evaluator.add_event_handler(Events.COMPLETED, write_metrics)


def progress_bar(*args: Any, disable: bool = False, **kwargs: Any) -> tqdm:
    """Return a tqdm bar that redraws often on a terminal, every 20 s in a log file, and on the first rank alone."""
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(*args, mininterval=interval, dynamic_ncols=True, disable=disable or rank() > 0, **kwargs)
