"""What does MONAI's published recipe reach in so many minutes, both stages? A model that `latdiff3d evaluate` measures.

    python benchmarks/monai_recipe.py --data DATA --run runs/monai [--minutes 25 25]
    latdiff3d evaluate --model runs/monai/model.pt --data DATA --segmenter runs/judge --out evaluation

Trains MONAI's networks by MONAI's inferer as the Model Zoo's brats_mri_generative_diffusion does, in float32, each
stage for its minutes of its own clock, and imports the weights by `latdiff3d import`:

- stage 1: L1 + 1e-7 KL (summed) + 0.1 adversarial (least squares, from the first step), 5 discriminator updates for
  each of the generator's, Adam at 2e-5, 2 residual blocks a level; its channels (64, 128, 256) quartered, and one
  volume a batch instead of 4, which is four times the steps in the same time. Its perceptual term is left out: as
  published it looks through a ResNet50 that nobody trained, and costs time.
- stage 2: epsilon, 1000 steps of its scaled linear betas, Adam at 2e-5, batches of 5 that are encoded anew at each
  step, latents multiplied by one over their standard deviation in a first batch; 2 residual blocks a level, heads of
  32; its channels (128, 256, 512) halved, which are ours. The published one knows no masks: here they are concatenated
  as numbers, label / (K − 1), as CompVis-style models have them.

A stage that has had its minutes in `--run` is not trained again; one that was interrupted goes on with its clock, its
weights and its optimisers. Sampling is that of the recipe, 50 steps of DDIM, with ours' right times. The last line is a
JSON object.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.inferers import LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDPMScheduler
from monai.utils import set_determinism

from latdiff3d import checkpoints
from latdiff3d.cli import door
from latdiff3d.conditioning import ScalarCondition
from latdiff3d.config import CONFIG_FOLDER, read_yaml, training_workflow
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.importing import import_weights

CHANNELS, NORM_NUM_GROUPS = (16, 32, 64), 16
DENOISER_CHANNELS, HEAD_CHANNELS = (64, 128, 256), 32
LEARNING_RATE, KL_WEIGHT, ADVERSARIAL_WEIGHT, DISCRIMINATOR_STEPS = 2e-5, 1e-7, 0.1, 5
BATCH_SIZES = {"autoencoder": 1, "denoiser": 5}
KEPT_EVERY_S = 60
OF_NETWORKS = ("autoencoder_def", "denoiser_def", "latent_noise")  # what an overlay says of ours
FACTOR = 2 ** (len(CHANNELS) - 1)  # of downsampling

Batch = dict[str, Any]


class Recipe(Protocol):
    """A stage of the recipe."""

    def step(self, batch: Batch) -> float:
        """Make one update and return its loss."""

    def stateful(self) -> dict[str, Any]:
        """Return what a stopped training needs, by name; the network is `network`."""


class AutoencoderRecipe:
    """Stage 1 as published; see the top of this file."""

    def __init__(self, num_channels: int, latent_channels: int) -> None:
        self.autoencoder = AutoencoderKL(
            spatial_dims=3, in_channels=num_channels, out_channels=num_channels, channels=CHANNELS,
            latent_channels=latent_channels, num_res_blocks=2, norm_num_groups=NORM_NUM_GROUPS,
            attention_levels=(False,) * 3, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip
        self.discriminator = PatchDiscriminator(
            spatial_dims=3, in_channels=num_channels, channels=32, num_layers_d=3, norm="INSTANCE"
        )
        self.adversarial = PatchAdversarialLoss(criterion="least_squares")
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), LEARNING_RATE)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), LEARNING_RATE)

    def step(self, batch: Batch) -> float:
        """Make the discriminator's updates and one of the autoencoder; return the latter's loss."""
        image = batch["image"].as_tensor()
        self.autoencoder.train()
        reconstruction, mean, std = self.autoencoder(image)
        for _ in range(DISCRIMINATOR_STEPS):
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            fake = self.adversarial(self.discriminator(reconstruction.detach())[-1], False, True)
            real = self.adversarial(self.discriminator(image)[-1], True, True)
            (ADVERSARIAL_WEIGHT * 0.5 * (fake + real)).backward()
            self.discriminator_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        kl = 0.5 * (mean**2 + std**2 - (std**2).log() - 1).sum() / len(image)
        heard = self.adversarial(self.discriminator(reconstruction)[-1], True, False)
        loss = (reconstruction - image).abs().mean() + KL_WEIGHT * kl + ADVERSARIAL_WEIGHT * heard
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def stateful(self) -> dict[str, Any]:
        """Return networks and optimisers."""
        return {
            "network": self.autoencoder, "optimizer": self.optimizer,
            "discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer,
        }  # fmt: skip


class DenoiserRecipe:
    """Stage 2 as published, with masks beside; see the top of this file.

    Args:
        autoencoder: stage 1's, which is not trained.
        condition: of masks; None where there are none.
        latent_channels: of its latents.
        scale_factor: what these are multiplied by.
    """

    def __init__(
        self, autoencoder: AutoencoderKL, condition: ScalarCondition | None, latent_channels: int, scale_factor: float
    ) -> None:
        self.autoencoder, self.condition = autoencoder.eval().requires_grad_(False), condition
        self.denoiser = DiffusionModelUNet(
            spatial_dims=3, in_channels=latent_channels + (condition.num_channels if condition else 0),
            out_channels=latent_channels, channels=DENOISER_CHANNELS, attention_levels=(False, True, True),
            num_head_channels=(0, HEAD_CHANNELS, HEAD_CHANNELS), num_res_blocks=2, use_flash_attention=True,
        )  # fmt: skip
        self.inferer = LatentDiffusionInferer(
            DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195),
            scale_factor=scale_factor,
        )
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), LEARNING_RATE)

    def step(self, batch: Batch) -> float:
        """Encode, noise, and make one update; return its loss."""
        image = batch["image"].as_tensor()
        noise = torch.randn(len(image), self.denoiser.out_channels, *(size // FACTOR for size in image.shape[2:]))
        timesteps = torch.randint(0, self.inferer.scheduler.num_train_timesteps, (len(image),))
        told = {} if self.condition is None else {"condition": self.condition(batch["mask"]), "mode": "concat"}
        self.denoiser.train()
        self.optimizer.zero_grad(set_to_none=True)
        prediction = self.inferer(
            inputs=image, autoencoder_model=self.autoencoder, diffusion_model=self.denoiser, noise=noise,
            timesteps=timesteps, **told,
        )  # fmt: skip
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def stateful(self) -> dict[str, Any]:
        """Return the network and its optimiser."""
        return {"network": self.denoiser, "optimizer": self.optimizer}


def main() -> None:
    """Train both stages where they are not trained yet, import them, and say what they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="the data set's folder")
    parser.add_argument("--run", required=True, type=Path, help="a folder for both stages")
    parser.add_argument("--config", default=str(CONFIG_FOLDER / "hippocampus.yaml"), help="overlay for the data set")
    parser.add_argument("--minutes", type=float, nargs=2, default=[25, 25], help="for each stage; 0.1 is a quick look")
    given = parser.parse_args()
    if min(given.minutes) <= 0:
        raise InputError(f"--minutes is {given.minutes}; expected two numbers above 0.")
    set_determinism(0)
    data = training_workflow([given.config], {"dataset_dir": given.data}, "autoencoder").parser
    has_masks = all("mask" in case for case in data.get_parsed_content("splits")["train"])
    condition = ScalarCondition(data.get_parsed_content("num_classes"), FACTOR) if has_masks else None
    latent_channels = data.get_parsed_content("latent_channels")

    first = AutoencoderRecipe(data.get_parsed_content("num_channels"), latent_channels)
    steps = {"autoencoder": trained(first, "autoencoder", data, given.minutes[0], given.run)}
    scale_factor = latents_scale(first.autoencoder, data)
    second = DenoiserRecipe(first.autoencoder, condition, latent_channels, scale_factor)
    steps["denoiser"] = trained(second, "denoiser", data, given.minutes[1], given.run)

    model, stage_1 = given.run / "model.pt", given.run / "autoencoder.pt"
    if not model.is_file():
        for leftover in (stage_1, stage_1.with_suffix(".yaml")):
            leftover.unlink(missing_ok=True)
        groups = {"autoencoder_def.norm_num_groups": NORM_NUM_GROUPS}
        of_data = {key: value for key, value in read_yaml(given.config).items() if not key.startswith(OF_NETWORKS)}
        import_weights(state_of(given.run, "autoencoder"), stage_1, [], {**of_data, **groups}, scale_factor)
        settings = {
            **of_data, "dataset_dir": given.data, "first_stage": str(stage_1),
            "denoiser_def.num_head_channels": HEAD_CHANNELS, "conditioning": "scalar" if has_masks else "none",
            "condition_dropout": 0, "sampler": "ddim", "sampling_steps": 50, "precision": "fp32",
        }  # fmt: skip
        import_weights(state_of(given.run, "denoiser"), model, [], settings)
    print(f"{model} is the recipe's model. Next: latdiff3d evaluate --model {model} --data {given.data}")
    print(json.dumps({"minutes": given.minutes, "steps": steps, "scale_factor": round(scale_factor, 4)}))


def trained(recipe: Recipe, stage: str, data: ConfigParser, minutes: float, folder: Path) -> int:
    """Train a stage until it has had its minutes, from where it stopped; return how many updates it made."""
    objects, state = recipe.stateful(), state_of(folder, stage)
    spent, num_steps = 0.0, 0
    if state.is_file():
        content = checkpoints.load(state, stage)
        if content["minutes"] != minutes:
            raise InputError(f"{state} is of {content['minutes']:g} minutes; give another --run, or those minutes.")
        spent, num_steps = content["spent"], content["num_steps"]
        states = {**content["objects"], "network": content["state_dict"]}
        for name, thing in objects.items():
            thing.load_state_dict(states[name])
    batches, kept = endless(data, BATCH_SIZES[stage], num_steps), spent
    with progress_bar(total=round(60 * minutes), initial=round(spent), desc=stage, unit="s") as bar:
        while spent < 60 * minutes or num_steps == 0:
            begun = time.monotonic()
            loss = recipe.step(next(batches))
            spent, num_steps = spent + time.monotonic() - begun, num_steps + 1
            bar.set_postfix(step=num_steps, loss=f"{loss:.3g}", refresh=False)
            bar.update(round(spent) - bar.n)
            if spent - kept > KEPT_EVERY_S or spent >= 60 * minutes:
                states = {name: thing.state_dict() for name, thing in objects.items()}
                content = {"stage": stage, "minutes": minutes, "spent": spent, "num_steps": num_steps}
                checkpoints.save(state, {**content, "state_dict": states.pop("network"), "objects": states})
                kept = spent
    return num_steps


def state_of(folder: Path, stage: str) -> Path:
    """Return where a stage's training stands, its weights under "state_dict", as the import takes them."""
    return folder / f"{stage}_state.pt"


def endless(data: ConfigParser, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield training batches epoch after epoch, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    dataset = data.get_parsed_content("train::dataset")
    size = min(batch_size, len(dataset))  # below a whole batch there would be none, for ever
    loader = DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True, generator=generator)
    while True:
        yield from loader


@torch.no_grad()
def latents_scale(autoencoder: AutoencoderKL, data: ConfigParser) -> float:
    """Return one over the standard deviation of a batch's latents, drawn from the posterior."""
    torch.manual_seed(0)
    image = next(endless(data, BATCH_SIZES["denoiser"], 0))["image"].as_tensor()
    return 1 / float(autoencoder.eval().encode_stage_2_inputs(image).std())


if __name__ == "__main__":
    door(main)
