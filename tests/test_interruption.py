"""Signals: a checkpoint after the step, exit code 75, and a run that then ends as if nothing had been."""

import signal

import pytest
import torch
from conftest import TINY, as_words, run_here, run_process
from ignite.engine import Engine

from latdiff3d import checkpoints
from latdiff3d.interruption import EXIT_CODE, Interrupted, stopping_on_signals

# Signals itself in the step whose number is the first argument; the second is the signal's.
SIGNALLED = """
import os, sys
from latdiff3d import cli, training
at, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
step = training.AutoencoderStep.__call__
def step_with_signal(self, engine, batch):
    if engine.state.iteration == at:
        os.kill(os.getpid(), number)
    return step(self, engine, batch)
training.AutoencoderStep.__call__ = step_with_signal
cli.main()
"""


@pytest.mark.parametrize(
    ("at", "number"), [(3, signal.SIGTERM), (2, signal.SIGUSR1), (1, signal.SIGINT)], ids=lambda value: str(value)
)
def test_a_run_told_to_stop_writes_a_checkpoint_and_goes_on_bit_for_bit(phantoms, tiny_runs, tmp_path, at, number):
    words = ["train", "autoencoder", "--data", phantoms, "-l", tmp_path, "--name", "first"]
    words += as_words(TINY["autoencoder"])
    stopped = run_process("-c", SIGNALLED, at, int(number), *words)
    last = tmp_path / "first" / "checkpoints" / "last.pt"
    assert stopped.code == EXIT_CODE == 75
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {at}; the same command goes on from {last}." in stopped.err
    assert "Traceback" not in stopped.err
    assert checkpoints.load(last)["iteration"] == at
    again = run_here(*words)
    assert again.code == 0, again.err
    for which in ("last", "best"):
        ours, theirs = (
            checkpoints.load(run / "checkpoints" / f"{which}.pt") for run in (last.parent.parent, tiny_runs.autoencoder)
        )
        assert ours["best_metric"] == theirs["best_metric"] and ours["epoch"] == theirs["epoch"]
        for name, weight in theirs["objects"]["codec"].items():
            assert torch.equal(ours["objects"]["codec"][name], weight), (which, name)


def engine_that(steps):
    """Return an engine whose n-th step calls `steps[n]`, and how many it made."""
    made = []

    def step(engine, batch):
        made.append(batch)
        steps.get(len(made), lambda: None)()

    return Engine(step), made


def test_the_signal_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    engine, made = engine_that({2: lambda: signal.raise_signal(signal.SIGTERM)})
    written = []
    with pytest.raises(Interrupted), stopping_on_signals(engine, lambda engine: written.append(1), "last.pt"):
        engine.run(range(4), max_epochs=2)
    assert signal.getsignal(signal.SIGTERM) is before and written == [1] and len(made) == 2


def test_a_stop_in_the_last_step_of_all_ends_the_run_as_it_would_have_ended():
    engine, made = engine_that({8: lambda: signal.raise_signal(signal.SIGTERM)})
    with stopping_on_signals(engine, lambda engine: None, "last.pt"):
        engine.run(range(4), max_epochs=2)
    assert len(made) == 8


def test_a_second_interrupt_does_not_wait():
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    engine, made = engine_that({2: twice})
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(engine, lambda engine: None, "last.pt"):
        engine.run(range(4), max_epochs=2)
    assert len(made) == 2
