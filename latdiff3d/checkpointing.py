"""What a run's checkpoints hold and when they are written, and how a run goes on from one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from latdiff3d import checkpoints, distributed, updates, verdict
from latdiff3d.batches import Seeds
from latdiff3d.errors import InputError
from latdiff3d.interruption import ends_epoch
from latdiff3d.quality import PAGE

PLACE_IN_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")  # of a learning rate's schedule, by PyTorch's names
# What older checkpoints lack: of precision fp16, and of an epoch's middle.
EMPTY: Mapping[str, Mapping[str, Any]] = {"scaler": {}, "discriminator_scaler": {}, "metrics_csv": {}}


@dataclass
class Run:
    """What a checkpoint holds, and when one is written: at the end of each epoch, and in between if asked for.

    Args:
        stage: "autoencoder", "diffusion" or "segmenter".
        run_dir: the run's folder.
        objects: name → anything with `state_dict` and `load_state_dict`.
        evaluator: whose key metric says which epoch is best.
        metric: how to show that metric, such as "PSNR {:.2f} dB".
        next_command: what to type next; `{run}` and `{data}` are filled in.
        data: the data set's folder.
        notes: what sampling must know of the training data.
        first_stage: path and hash of stage 1's checkpoint, for stage 2.
        at_end: called once with the best weights loaded; what it changes in them is kept.
        quality: called after that, to write the codec's page; its figures are kept with the weights.
        seeds: of the training loader, on whose crops `at_end` measures.
        checkpoint_every: updates between checkpoints within an epoch; 0: none.
        keep_checkpoints: how many of the last ones are kept.
        accumulate_grad_batches: batches per update.
    """

    stage: str
    run_dir: str
    objects: Mapping[str, Any]
    evaluator: Evaluator
    metric: str
    next_command: str
    data: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    first_stage: Mapping[str, str] | None = None
    at_end: Callable[[], None] | None = None
    quality: Callable[[], Mapping[str, Any]] | None = None
    seeds: Seeds | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    accumulate_grad_batches: int = 1
    config_text: str = field(default="", init=False)
    figures: Mapping[str, Any] | None = field(default=None, init=False)  # once finished, of `quality`

    def attach(self, engine: Trainer) -> None:
        """Write checkpoints at each epoch's end; validation must be attached before."""
        engine.add_event_handler(Events.STARTED, self._same_weights)
        engine.add_event_handler(Events.EPOCH_STARTED, self._require_space)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        if self.checkpoint_every:
            event = updates.completed(self.accumulate_grad_batches, self.checkpoint_every)
            engine.add_event_handler(event, self._write_within)

    def write(self, engine: Trainer) -> None:
        """Write `last.pt`, and `best.pt` if this epoch's validation was the best so far, on the first rank alone."""
        if distributed.rank() > 0:
            return
        content = self._content(engine)
        if self.evaluator.state.best_metric_epoch == engine.state.epoch:
            checkpoints.save(self._path("best"), content)
        checkpoints.save(self._path("last"), content, self.keep_checkpoints - 1)

    def write_last(self, engine: Trainer) -> None:
        """Write `last.pt` alone, after any step."""
        if distributed.rank() == 0:
            checkpoints.save(self._path("last"), self._content(engine), self.keep_checkpoints - 1)

    def _write_within(self, engine: Trainer) -> None:
        if not ends_epoch(engine):  # whose own one comes after its validation
            self.write_last(engine)

    def restore(self, engine: Trainer, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's content.

        Raises:
            InputError: of other shapes.
        """
        objects = {**EMPTY, **content["objects"]}
        for name, thing in self.objects.items():
            state = objects[name]
            if isinstance(thing, nn.Module):
                checkpoints.load_weights(thing, state, f"the checkpoint of {self.run_dir}")
            elif isinstance(thing, LRScheduler):  # its length and height are this configuration's
                thing.load_state_dict({**thing.state_dict(), **{key: state[key] for key in PLACE_IN_SCHEDULE}})
            else:
                thing.load_state_dict(state)
        self._restore_place(engine, content)
        if self._has_loss_of(content):
            self.evaluator.state.best_metric = content["best_metric"]
            self.evaluator.state.best_metric_epoch = content["best_metric_epoch"]
        else:
            print("the loss is another one from here on: what was best before it no longer counts", flush=True)

    def _restore_place(self, engine: Trainer, content: Mapping[str, Any]) -> None:
        """Begin after the checkpoint's step, or as far into its epoch, should epochs have another length now."""
        length, before = engine.state.epoch_length, content.get("epoch_length", engine.state.epoch_length)
        iteration = content["iteration"]
        if before != length:
            epochs, position = divmod(iteration, before)
            group = self.accumulate_grad_batches
            iteration = epochs * length + position * length // before // group * group
            print(f"an epoch has {length} batches, not {before} as before: going on after step {iteration}", flush=True)
        engine.state.iteration, engine.state.epoch = iteration, iteration // length  # epochs that are completed
        for thing in self.objects.values():
            if isinstance(thing, LRScheduler):
                thing.last_epoch = updates.num_updates_done(engine, self.accumulate_grad_batches)

    def _has_loss_of(self, content: Mapping[str, Any]) -> bool:
        ours, theirs = (yaml.safe_load(text).get("loss") for text in (self.config_text, content["config"]))
        return ours == theirs

    def finish(self) -> None:
        """Do what is due once, at the end of training, on the best weights, and keep its result with them.

        Raises:
            InputError: when no epoch was validated.
        """
        path = self._path("best")
        distributed.gather(None)  # the first rank has written it
        if not path.is_file() or self.evaluator.state.best_metric_epoch < 1:  # or the best one is by another loss
            raise InputError(f"{self.run_dir} was never validated; set val_interval to at most max_epochs.")
        best = checkpoints.load(path)
        if best["finished"]:
            self.figures = best.get("quality")
            return
        networks = {name: thing for name, thing in self.objects.items() if isinstance(thing, nn.Module)}
        for name, network in networks.items():
            network.load_state_dict(best["objects"][name])
        if self.at_end:
            print("measuring the latents over the training set", flush=True)
            if self.seeds is not None:
                self.seeds.at_epoch()
            self.at_end()
        if distributed.rank() > 0:
            return
        if self.quality:
            print("measuring the codec on the validation set", flush=True)
            self.figures = self.quality()
        weights = {name: network.state_dict() for name, network in networks.items()}
        kept = {"objects": {**best["objects"], **weights}, "quality": self.figures, "finished": True}
        checkpoints.save(path, {**best, **kept})

    def summary(self, engine: Trainer, seconds: float) -> str:
        """Return what was reached and the command that uses it."""
        state = self.evaluator.state
        command = self.next_command.format(run=self.run_dir, data=self.data)
        page = f"{Path(self.run_dir) / PAGE}: {verdict.summary(self.figures)}\n" if self.figures else ""
        return (
            f"Stage '{self.stage}' is trained: {engine.state.epoch} epochs, {engine.state.iteration} steps, this time "
            f"in {seconds / 60:.1f} min; best at epoch {state.best_metric_epoch}: "
            f"{self.metric.format(state.best_metric)}.\n{self._path('best')}\n{page}Next: {command}"
        )

    def _same_weights(self, engine: Trainer) -> None:
        modules = [thing for thing in self.objects.values() if isinstance(thing, nn.Module)]
        distributed.same_as_first(tensor for module in modules for tensor in module.state_dict().values())

    def _require_space(self, engine: Trainer) -> None:
        path = self._path("last")
        distributed.together(lambda: checkpoints.require_space(path) if distributed.rank() == 0 else None)

    def _path(self, which: str) -> Path:
        return Path(self.run_dir) / checkpoints.FOLDER / f"{which}.pt"

    def _content(self, engine: Trainer) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "config": self.config_text,
            "notes": dict(self.notes),
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "best_metric": self.evaluator.state.best_metric,
            "best_metric_epoch": self.evaluator.state.best_metric_epoch,
            "first_stage": dict(self.first_stage) if self.first_stage else None,
            "finished": False,
            "objects": {name: thing.state_dict() for name, thing in self.objects.items()},
        }
