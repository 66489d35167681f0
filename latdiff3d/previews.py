"""What a run shows of itself at each validation: slices of volumes, as a PNG and in TensorBoard, by the first rank."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines.workflow import Workflow
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from latdiff3d.distributed import rank
from latdiff3d.figures import slices_preview
from latdiff3d.handlers import TensorBoard


class ReconstructionPreviews:
    """At each validation, the first volumes and their reconstructions as a PNG and in TensorBoard.

    Args:
        folder: where the PNGs go.
        evaluator: whose output holds `image` and `reconstruction`, (B, C, D, H, W).
        tensorboard: where the picture goes too.
        num_volumes: how many volumes are shown.
    """

    def __init__(self, folder: str, evaluator: Workflow, tensorboard: TensorBoard, num_volumes: int = 2) -> None:
        self.folder = Path(folder)
        self.evaluator = evaluator
        self.tensorboard = tensorboard
        self.num_volumes = num_volumes
        self.shown: list[tuple[str, np.ndarray]] = []

    def attach(self, engine: Workflow) -> None:
        """Collect from the evaluator and write under the trainer's epoch."""
        if rank() > 0:
            return

        def write(evaluator: Workflow) -> None:
            path = self.folder / f"epoch_{engine.state.epoch:04d}.png"
            write_preview(path, self.shown, self.tensorboard.writer, "reconstruction", engine.state.epoch)
            self.shown = []

        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self.evaluator.add_event_handler(Events.COMPLETED, write)

    def _collect(self, engine: Workflow) -> None:
        output, names = engine.state.output, engine.state.batch["case"]
        for name, image, reconstruction in zip(names, output["image"], output["reconstruction"], strict=True):
            if len(self.shown) < 2 * self.num_volumes:
                self.shown.append((f"{name} real", image.cpu().numpy()))
                self.shown.append((f"{name} reconstructed", reconstruction.cpu().numpy()))


class SamplePreviews:
    """At each validation, volumes sampled for the first validation masks, as a PNG and in TensorBoard.

    Args:
        folder: where the PNGs go.
        evaluator: after whose runs volumes are sampled.
        tensorboard: where the picture goes too.
        synthesize: takes a validation batch and returns volumes (B, C, D, H, W) for its conditions.
        loader: the validation loader, whose first batch is sampled for, each time alike.
    """

    def __init__(
        self,
        folder: str,
        evaluator: Workflow,
        tensorboard: TensorBoard,
        synthesize: Callable[[Mapping[str, Any]], torch.Tensor],
        loader: DataLoader,
    ) -> None:
        self.folder = Path(folder)
        self.evaluator = evaluator
        self.tensorboard = tensorboard
        self.synthesize = synthesize
        self.loader = loader

    def attach(self, engine: Workflow) -> None:
        """Sample after each validation of `engine`'s evaluator."""
        if rank() > 0:
            return

        def write(evaluator: Workflow) -> None:
            batch = next(iter(self.loader))
            volumes = self.synthesize(batch)
            shown = [(f"{n} synthetic", v.cpu().numpy()) for n, v in zip(batch["case"], volumes, strict=True)]
            path = self.folder / f"epoch_{engine.state.epoch:04d}.png"
            write_preview(path, shown, self.tensorboard.writer, "synthetic", engine.state.epoch)

        self.evaluator.add_event_handler(Events.COMPLETED, write)


def write_preview(path: Path, shown: list[tuple[str, np.ndarray]], writer: SummaryWriter, tag: str, epoch: int) -> None:
    """Write named volumes (C, D, H, W) as slices to a PNG and to TensorBoard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slices_preview(path, [image for _, image in shown], [name for name, _ in shown])
    writer.add_image(tag, np.asarray(Image.open(path).convert("RGB")), epoch, dataformats="HWC")
