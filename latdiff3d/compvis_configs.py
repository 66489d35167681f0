"""A CompVis-style configuration, `target` and `params` all the way down, becomes an overlay: `latdiff3d convert`."""

from dataclasses import dataclass
from pathlib import Path

from latdiff3d import config
from latdiff3d.compvis_autoencoder import KL, VQ, class_of, convert_autoencoder, convert_loss
from latdiff3d.compvis_diffusion import convert_diffusion
from latdiff3d.conversion import CARRIED, LEFT, SAME, Ledger, leaves_of
from latdiff3d.errors import InputError

DIFFUSION = ("LatentDiffusion",)
FOLDERS = ("data_root", "data_dir", "root", "datadir")  # a data set's folder, by the names that such classes have
BY_RUN = "a run keeps its own checkpoints, previews and logs; see docs/training.md"


@dataclass(frozen=True)
class Conversion:
    """What a CompVis-style configuration becomes.

    Attributes:
        stage: "autoencoder" or "diffusion".
        ledger: its keys and the overlay.
        source: the file's name.
    """

    stage: str
    ledger: Ledger
    source: str

    def text(self) -> str:
        """Return the overlay as YAML."""
        return self.ledger.text(
            [f"From {self.source} by `latdiff3d convert`; behind each setting the key that it comes from."]
        )

    def report(self, overlay: Path) -> str:
        """Return the fate of each key, their numbers, and what to type next."""
        counts = self.ledger.counts()
        first_stage = " first_stage=RUN" if self.stage == "diffusion" else ""
        return (
            f"{self.ledger.table()}\n{sum(counts.values())} keys: {counts[CARRIED]} carried, {counts[SAME]} as here "
            f"without a setting, {counts[LEFT]} not carried. The overlay is {overlay}\n"
            f"Next: latdiff3d train {self.stage} --data DATA --config {overlay}{first_stage}"
        )


def convert(path: Path, num_ranks: int = 1, is_scaled: bool = True) -> Conversion:
    """Return what the CompVis-style configuration at `path` is here, each of its keys accounted for.

    Args:
        path: YAML of one `model`, an autoencoder or a latent diffusion model, and its `data` and `lightning` sections.
        num_ranks: processes that it was trained on, which its learning rate was multiplied by.
        is_scaled: CompVis' `--scale_lr`: the learning rate is base_learning_rate × batches accumulated × ranks × batch
            size; if not, base_learning_rate alone.

    Raises:
        InputError: not such a file; a model, a part of one or a choice that has no counterpart here.
    """
    leaves = leaves_of(config.read_yaml(path))
    for key, value in leaves.items():
        if isinstance(value, str) and "${" in value:
            raise InputError(f"{path} has {key}: {value}, a reference; put the value in its place.")
    ledger = Ledger(leaves)
    model, params = ledger.part("model"), ledger.part("model.params")
    name = class_of(model)
    if name not in (*KL, *VQ, *DIFFUSION):
        raise InputError(
            f"{path} has the model.target {model.value('target')!r}; expected a class that ends in "
            f"{', '.join((*KL, *VQ, *DIFFUSION))}: others have no counterpart here."
        )
    _data(ledger)
    _lightning(ledger.part("lightning"))
    if name in DIFFUSION:
        stage = "diffusion"
        model.same("target", "the stage `diffusion`")
        first = params.part("first_stage_config")
        factor = convert_autoencoder(first, is_trained=False)
        first.part("params.lossconfig").leave_rest("a first stage that is frozen has no loss")
        first.leave("params.lossconfig", "a first stage that is frozen has no loss")
        convert_diffusion(params, factor)
    else:
        stage = "autoencoder"
        factor = convert_autoencoder(model, is_trained=True)
        convert_loss(params, name in KL, factor)
    _learning_rate(ledger, stage, num_ranks, is_scaled)
    ledger.leave_rest("no key of this format that is known here")
    return Conversion(stage, ledger, path.name)


def _learning_rate(ledger: Ledger, stage: str, num_ranks: int, is_scaled: bool) -> None:
    model = ledger.part("model")
    rate, note = model.number("base_learning_rate"), "as it is: --no-scale-lr"
    if is_scaled:
        accumulated = ledger.whole("lightning.trainer.accumulate_grad_batches", 1)
        batch_size = ledger.whole("data.params.batch_size")
        rate *= accumulated * num_ranks * batch_size
        note = f"× {accumulated} accumulated × {num_ranks} ranks × batch size {batch_size}: CompVis' --scale_lr"
    ours = {"learning_rate": rate}
    if stage == "autoencoder":
        ours = {"learning_rate": rate * model.number("params.lr_g_factor", 1.0), "disc_learning_rate": rate}
        model.part("params").same("lr_g_factor", "multiplied into learning_rate")
    model.carry("base_learning_rate", ours=ours, note=note)
    schedule = model.part("params.scheduler_config")
    if schedule.has("params.warm_up_steps"):
        steps = schedule.wholes("params.warm_up_steps")[0]
        schedule.carry("params.warm_up_steps", ours={"warmup_steps": steps}, note="of the first cycle")
    schedule.leave_rest("behind the warm-up the learning rate falls as a cosine; train::lr_scheduler is another")
    model.part("params").same("scheduler_config", "none is set")


def _data(ledger: Ledger) -> None:
    data = ledger.part("data")
    params = data.part("params")
    data.leave("target", "cases are found by `layout`")
    if params.has("batch_size"):
        params.carry("batch_size", ours={"batch_size": params.whole("batch_size")}, note="of each rank")
    if params.has("num_workers"):
        params.carry("num_workers", ours={"num_workers": params.value("num_workers")})
    params.compare("wrap", False, "an epoch is each case once", "an epoch is each case once; raise max_epochs")
    train = params.part("train")
    if "brats" in str(train.value("target")).lower():
        train.carry("target", ours={"layout": "brats"})
    crop = train.value("params.crop_to")
    if crop is not None:
        train.carry("params.crop_to", ours={"crop_to": train.size("params.crop_to")})
    for folder in FOLDERS:
        if train.has(f"params.{folder}"):
            train.carry(f"params.{folder}", ours={"dataset_dir": train.value(f"params.{folder}")})
    for part, split in ((train, "train"), (params.part("validation"), "val"), (params.part("test"), "test")):
        part.compare("params.split", split, f"the split {split}", "splits are train.list, val.list and test.list")
        if part is not train:
            part.compare("params.crop_to", crop, "crop_to is one for all splits", "crop_to is one for all splits")
        part.leave_rest("cases are found by `layout` and prepared by `preprocessing`; see `latdiff3d doctor`")
    data.leave_rest("cases are found by `layout` and prepared by `preprocessing`; see `latdiff3d doctor`")


def _lightning(lightning: Ledger) -> None:
    trainer = lightning.part("trainer")
    for key, ours in (
        ("max_epochs", "max_epochs"),
        ("accumulate_grad_batches", "accumulate_grad_batches"),
        ("check_val_every_n_epoch", "val_interval"),
    ):
        if trainer.has(key):
            trainer.carry(key, ours={ours: trainer.value(key)})
    precision = {"16": "fp16", "32": "fp32", "bf16": "bf16"}.get(str(trainer.value("precision")))
    if precision:
        trainer.carry("precision", ours={"precision": precision})
    for key in ("gpus", "devices", "num_nodes", "accelerator", "distributed_backend", "strategy"):
        trainer.leave(key, "the launcher's: torchrun --nproc_per_node N main.py")
    trainer.leave_rest("no setting of the trainer's that has a counterpart here")
    lightning.leave_rest(BY_RUN)
