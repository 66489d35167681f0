"""A run's scalars in MLflow too, where a place for them is named: MONAI's handler, in the run that a run began."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines.workflow import Workflow
from monai.handlers import MLFlowHandler
from monai.utils import optional_import, path_to_sqlite_uri

from latdiff3d.distributed import rank
from latdiff3d.errors import InputError

mlflow, is_installed = optional_import("mlflow")

PACKAGES = "mlflow-skinny sqlalchemy alembic"  # the last two for a folder; a server needs the first alone
FILE = "mlflow.db"  # in a folder
ID_FILE = "mlflow_run"  # in the run's folder: the id of its run in MLflow


class MLflow:
    """Writes what TensorBoard gets to MLflow: the training terms of each step, the metrics of each validation.

    The first rank alone writes. A run that goes on does so in the same run of MLflow, at the steps where it stands;
    steps that a killed run had made after its last checkpoint are there twice.

    Args:
        tracking: a server's or a database's URI, or a folder, in which an SQLite file holds the runs.
        evaluator: whose metrics are written.
        run_dir: the run's folder, where the id of MLflow's run is kept.
        run_name: what MLflow calls the run.
        experiment_name: what MLflow keeps it under.

    Raises:
        InputError: MLflow is not installed, or `tracking` is a URI of plain files, which MLflow no longer writes.
    """

    def __init__(
        self, tracking: str, evaluator: Workflow, run_dir: str, run_name: str, experiment_name: str = "latdiff3d"
    ) -> None:
        if not is_installed:
            raise InputError(f"mlflow is {tracking!r}, but MLflow is not installed; pip install {PACKAGES}.")
        if tracking.startswith("file:"):
            raise InputError(
                f"mlflow is {tracking!r}, and MLflow no longer keeps runs in plain files; give the folder's path, "
                f"whose {FILE} will hold them, or a server's URI."
            )
        self.tracking, self.evaluator = tracking, evaluator
        self.uri = tracking if "://" in tracking else path_to_sqlite_uri(Path(tracking) / FILE)
        self.names = {"run_name": run_name, "experiment_name": experiment_name}
        self.id_file = Path(run_dir) / ID_FILE
        self._handler: _OneRun | None = None

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer and the evaluator; MLflow is looked for when training starts."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: self.handler.iteration_completed(engine))
        engine.add_event_handler(Events.COMPLETED, lambda _: self.handler.close())
        self.evaluator.add_event_handler(Events.COMPLETED, self._write_metrics, engine)

    @property
    def handler(self) -> "_OneRun":
        """MONAI's handler; only while its engine runs, or has run."""
        assert self._handler is not None
        return self._handler

    def _open(self, engine: Engine) -> None:
        chosen = os.environ.get("MLFLOW_TRACKING_URI", self.uri)
        if chosen != self.uri:
            print(f"warning: MLFLOW_TRACKING_URI is {chosen}, which wins over mlflow={self.tracking}.", flush=True)
        try:
            self._handler = _OneRun(self.id_file, tracking_uri=self.uri, output_transform=_named, **self.names)
            self._handler.start(engine)
        except (mlflow.exceptions.MlflowException, ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"mlflow is {self.tracking!r}, where no run can be kept ({reason:.200}); expected a folder that can be "
                f"written, or the URI of a server that answers, and {PACKAGES} installed."
            ) from error

    def _write_metrics(self, evaluator: Workflow, engine: Workflow) -> None:
        metrics = {f"val/{name}": value for name, value in evaluator.state.metrics.items()}
        self.handler.write(metrics, engine.state.iteration)


class _OneRun(MLFlowHandler):
    """MONAI's handler, which would go on in any unfinished run of the same name, in the one that it began.

    Args:
        id_file: where that one's id is kept.
        settings: MONAI's.
    """

    def __init__(self, id_file: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self.id_file = id_file
        self.is_lost = False

    def start(self, engine: Engine) -> None:
        """Begin a run, or go on in the one of before."""
        self._set_experiment()
        experiment: Any = self.experiment
        run: Any = self._run_of_before() or self.client.create_run(experiment.experiment_id, run_name=self.run_name)
        self.cur_run = run
        super().start(engine)
        self.id_file.write_text(run.info.run_id)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        self._log_metrics(dict(metrics), step)

    def close(self) -> None:
        """Call the run finished."""
        self._unless_lost(super().close)

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._unless_lost(partial(super()._log_metrics, metrics, step))

    def _unless_lost(self, write: Callable[[], None]) -> None:
        """Write; a place that no longer answers is told once, and training goes on without it."""
        if self.is_lost:
            return
        try:
            write()
        except mlflow.exceptions.MlflowException as error:
            self.is_lost = True
            reason = " ".join(str(error).split())
            print(
                f"warning: MLflow takes nothing any more ({reason:.200}); training goes on without it, metrics.csv and "
                "tensorboard/ have everything.",
                flush=True,
            )

    def _run_of_before(self) -> Any:
        if not self.id_file.is_file():
            return None
        run_id = self.id_file.read_text().strip()
        try:
            self.client.update_run(run_id, status="RUNNING")
            return self.client.get_run(run_id)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            print(f"MLflow has no run {run_id} here, as {self.id_file} says; a new one begins.", flush=True)
            return None


def _named(output: Mapping[str, float]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in output.items()}
