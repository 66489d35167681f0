"""What a run shows and keeps: the moving average, and what the bundle's handlers rest on."""

import time
from itertools import pairwise

import pytest
import torch
from ignite.engine import Engine, Events

from latdiff3d.handlers import EMA, MetricsCSV, TensorBoard, existing, read_metrics

EPOCH_LENGTH, WARM_UP = 4, 7


def averaging():
    """Return an engine whose step adds 1 to a weight, its average, and the momenta it goes through."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)

    def step(engine, batch):
        model.weight.data += 1

    engine, momenta = Engine(step), []
    ema = EMA(model, momentum=0.01, momentum_warmup=0.5, warmup_iters=WARM_UP)
    ema.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: momenta.append(engine.state.ema_momentum))
    return engine, model, ema, momenta


def test_the_averages_warm_up_goes_on_after_a_resume():
    engine, _, whole, momenta = averaging()
    engine.run(range(EPOCH_LENGTH), max_epochs=3)
    assert momenta[0] == 0.5 and momenta[WARM_UP - 1 :] == pytest.approx([0.01] * 6)
    assert all(one > other for one, other in pairwise(momenta[:WARM_UP]))

    engine, model, ema, first = averaging()
    engine.run(range(EPOCH_LENGTH), max_epochs=1)
    again, resumed_model, resumed, rest = averaging()
    resumed_model.load_state_dict(model.state_dict())
    resumed.ema_model.load_state_dict(ema.ema_model.state_dict())
    again.load_state_dict({"iteration": EPOCH_LENGTH, "max_epochs": 3, "epoch_length": EPOCH_LENGTH})
    again.run(range(EPOCH_LENGTH))
    assert first + rest == momenta
    assert torch.equal(resumed.ema_model.weight, whole.ema_model.weight)


def test_an_average_without_warm_up_has_one_momentum():
    model = torch.nn.Linear(1, 1)
    engine = Engine(lambda engine, batch: None)
    EMA(model, momentum=0.25).attach(engine)
    engine.run(range(EPOCH_LENGTH))
    assert engine.state.ema_momentum == 0.25


def test_an_existing_handler_is_itself():
    handler = object()
    assert existing(handler) is handler


def test_tensorboards_folder_appears_when_training_starts(tmp_path):
    trainer, evaluator = Engine(lambda engine, batch: {"l1": 0.5}), Engine(lambda engine, batch: None)
    tensorboard = TensorBoard(str(tmp_path / "tensorboard"), evaluator)
    tensorboard.attach(trainer)
    assert not (tmp_path / "tensorboard").exists()
    trainer.run(range(2))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert tensorboard.writer is not None


def metrics_of(tmp_path, loader, step, max_epochs=2):
    """Run a trainer with a MetricsCSV, and return the rows and the handler."""
    evaluator = Engine(lambda engine, batch: None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    handler, engine = MetricsCSV(str(tmp_path / "metrics.csv"), evaluator, optimizer), Engine(step)
    handler.attach(engine)
    engine.run(loader, max_epochs=max_epochs)
    return read_metrics(tmp_path / "metrics.csv"), handler


class Slow:
    """Three batches, each of which takes its time to load."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(3):
            time.sleep(self.seconds)
            yield number


@pytest.mark.parametrize(("loading", "working", "low", "high"), [(0.1, 0.02, 0.5, 0.95), (0.0, 0.05, 0.0, 0.3)])
def test_the_wait_for_data_is_written_down(tmp_path, loading, working, low, high):
    def step(engine, batch):
        time.sleep(working)
        return {"loss": float(batch)}

    rows, _ = metrics_of(tmp_path, Slow(loading), step)
    assert [float(row["train_loss"]) for row in rows] == [1.0, 1.0]
    assert all(low <= float(row["data_wait"]) <= high for row in rows)


def test_an_epochs_terms_go_through_a_checkpoint(tmp_path):
    _, handler = metrics_of(tmp_path, range(3), lambda engine, batch: {"loss": float(batch)})
    handler.load_state_dict({"loss": [3.0, 5.0]})
    state = handler.state_dict()
    handler.sums["loss"].append(7.0)
    assert state == {"loss": [3.0, 5.0]}  # of the moment it was taken
