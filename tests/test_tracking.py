"""MLflow: what TensorBoard gets, in one run of MLflow's, on one rank; and one line where it cannot be."""

import pytest
from conftest import refused, run_here, train_here
from ignite.engine import Engine
from test_runs import Stopped, raising

from latdiff3d import config, tracking, training
from latdiff3d.errors import InputError
from latdiff3d.handlers import read_metrics
from latdiff3d.tracking import MLflow


def test_without_the_package_the_line_says_what_to_install(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", False)
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", mlflow=str(tmp_path / "mlflow")))
    assert "MLflow is not installed; pip install mlflow-skinny sqlalchemy alembic" in line
    assert not list(tmp_path.iterdir())


def test_it_is_off_by_default():
    for stage in config.STAGE_FILES:
        assert config.merged(config.bundle_files(config.DEFAULT_BUNDLE, stage))["mlflow"] == ""


def test_plain_files_are_refused(monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", True)
    with pytest.raises(InputError, match=r"mlflow is 'file:///x', and MLflow no longer keeps runs in plain files"):
        MLflow("file:///x", Engine(lambda *_: None), "run", "run")


def test_another_rank_does_not_even_look_for_it(monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", True)
    monkeypatch.setattr(tracking, "rank", lambda: 1)
    trainer, evaluator = Engine(lambda *_: {"l1": 1.0}), Engine(lambda *_: None)
    MLflow("https://nowhere.invalid", evaluator, "run", "run").attach(trainer)
    trainer.run(range(2))
    assert trainer.state.iteration == 2 and not list(evaluator._event_handlers.values())


# With the package


@pytest.fixture
def client(tmp_path):
    """MLflow's client of the folder that the runs below log to."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")


def logged(client):
    """Return the runs that are there, and the steps and values of each of their metrics."""
    experiment = client.get_experiment_by_name("latdiff3d")
    runs = client.search_runs(experiment.experiment_id)
    histories = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for run in runs
        for name in run.data.metrics
    }
    return runs, {name: sorted(points) for name, points in histories.items()}


def test_the_metrics_are_there_and_a_run_that_goes_on_goes_on_in_the_same_one(client, phantoms, tmp_path, monkeypatch):
    settings = {"mlflow": str(tmp_path / "mlflow"), "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(training.AutoencoderStep, "__call__", raising(4, training.AutoencoderStep.__call__))
        with pytest.raises(RuntimeError) as error:
            train_here("autoencoder", phantoms, tmp_path, "ae", **settings)
    assert isinstance(error.value.__cause__ or error.value.__context__, (Stopped, RuntimeError))
    [run], _ = logged(client)
    assert run.info.run_name == "ae" and run.info.status == "RUNNING"
    again = train_here("autoencoder", phantoms, tmp_path, "ae", **settings)
    assert again.code == 0, again.err
    [same], metrics = logged(client)
    assert same.info.run_id == run.info.run_id and same.info.status == "FINISHED"
    assert [step for step, _ in metrics["train/l1"]] == [1, 2, 3, 4]
    rows = read_metrics(tmp_path / "ae" / "metrics.csv")
    psnr = [(int(row["iteration"]), pytest.approx(float(row["val_psnr"]))) for row in rows]
    assert metrics["val/psnr"] == psnr and [step for step, _ in psnr] == [2, 4]

    more = run_here("train", "autoencoder", "-r", tmp_path / "ae", "max_epochs=3")
    assert more.code == 0, more.err
    [same], metrics = logged(client)
    assert same.info.run_id == run.info.run_id and same.info.status == "FINISHED"
    assert [step for step, _ in metrics["train/l1"]] == [1, 2, 3, 4, 5, 6]


def trained(folder, run_dir, step=lambda *_: {"l1": 1.0}):
    """Train two steps by nothing, and return the handler."""
    run_dir.mkdir(parents=True, exist_ok=True)
    evaluator, trainer = Engine(lambda *_: None), Engine(step)
    handler = MLflow(str(folder), evaluator, str(run_dir), "ae")
    handler.attach(trainer)
    trainer.run(range(2))
    return handler


def test_a_run_of_the_same_name_in_another_folder_is_another_run(client, tmp_path):
    for name in ("one", "other"):
        trained(tmp_path / "mlflow", tmp_path / name)
    assert [run.info.run_name for run in logged(client)[0]] == ["ae", "ae"]
    (tmp_path / "one" / tracking.ID_FILE).write_text("0" * 32)
    trained(tmp_path / "mlflow", tmp_path / "one")
    assert len(logged(client)[0]) == 3


def test_a_place_where_nothing_can_be_kept_is_told_at_the_start(client, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"mlflow is '.*taken', where no run can be kept \(.*\); expected a folder"):
        trained(tmp_path / "taken", tmp_path / "run")


def test_a_place_that_is_lost_is_told_once_and_training_goes_on(client, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise tracking.mlflow.exceptions.MlflowException("the server is gone")

    def step(engine, batch):
        monkeypatch.setattr(tracking.MLFlowHandler, "_log_metrics", fail)
        return {"l1": 1.0}

    trained(tmp_path / "mlflow", tmp_path / "run", step)
    assert capsys.readouterr().out.count("warning: MLflow takes nothing any more (the server is gone)") == 1
