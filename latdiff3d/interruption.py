"""A stop that a signal asks for waits for the update's end and a checkpoint, from which the same command goes on."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ignite.engine import Engine, Events

from latdiff3d import updates
from latdiff3d.distributed import any_rank, rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command will do it


class Interrupted(SystemExit):
    """Training stopped because it was told to, after a checkpoint; exit code `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


def ends_epoch(engine: Engine) -> bool:
    """Say whether the step that has just been made is the last of its epoch."""
    assert engine.state.epoch_length is not None
    return engine.state.iteration % engine.state.epoch_length == 0


@contextmanager
def stopping_on_signals(
    engine: Engine, write: Callable[[Any], None], path: str | Path, accumulate_grad_batches: int = 1
) -> Iterator[None]:
    """While `engine` runs within, let SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint after the update and stop.

    A signal to one rank stops all. After an epoch's last step its validation and its own checkpoint come first. A
    second Ctrl-C does not wait.

    Args:
        engine: a trainer, at whose epochs' ends a checkpoint is written already.
        write: writes the checkpoint after any other update.
        path: of the checkpoint.
        accumulate_grad_batches: batches per update.

    Raises:
        Interrupted: from within the engine's run.
    """
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    def stop(engine: Engine) -> None:
        if rank() == 0:
            name = received[0].name if received else "a signal to another rank"
            print(
                f"\nstopped by {name} after step {engine.state.iteration}; the same command goes on from {path}.",
                file=sys.stderr,
                flush=True,
            )
        raise Interrupted

    def after_step(engine: Engine) -> None:
        if not ends_epoch(engine) and any_rank(bool(received)):
            write(engine)
            stop(engine)

    def after_epoch(engine: Engine) -> None:
        if engine.state.epoch < (engine.state.max_epochs or 0) and any_rank(bool(received)):
            stop(engine)

    engine.add_event_handler(updates.completed(accumulate_grad_batches), after_step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may hear signals
    before = {number: signal.signal(number, note) for number in SIGNALS} if in_main_thread else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
