"""The two iteration updates, for `monai.engines.Trainer(iteration_update=…)`, and what the evaluators measure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine
from torch import nn
from torch.nn import functional as F

from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import Condition, MaskCondition, NoCondition, dropped
from latdiff3d.devices import autocast
from latdiff3d.distributed import mean_over_ranks, num_ranks, rank
from latdiff3d.losses import AutoencoderLoss, discriminator_loss, masked_psnr, volume_l1
from latdiff3d.networks import last_layer
from latdiff3d.noise_schedules import schedule_of
from latdiff3d.objectives import Objective, check_objective, min_snr_weight
from latdiff3d.updates import Group, LossScaler, group_of, update

Batch = Mapping[str, Any]
NUM_BUCKETS = 4  # of noise levels, whose losses are logged one by one


@dataclass
class AutoencoderStep:
    """A batch's part in one generator update and, once it trains, one discriminator update.

    A batch holds `image` (B, C, D, H, W) in [0, 1] and `valid` (B, 1, D, H, W), 1 on the volume's own voxels. Padding
    is kept out of the reconstruction loss, and looks the same to other networks in real and reconstructed volumes.
    Over several ranks the update is that of their joint batch; `accumulate_grad_batches` of those share an update.
    """

    autoencoder: nn.Module
    discriminator: nn.Module
    loss: AutoencoderLoss
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "bf16"
    max_grad_norm: float = 1.0
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        self.scaler = LossScaler(self.device, self.precision)
        self.discriminator_scaler = LossScaler(self.device, self.precision)

    def __call__(self, engine: Engine, batch: Batch) -> dict[str, float]:
        """Update the weights and return the loss's terms, raw and weighted, means over the ranks."""
        group = group_of(engine, self.accumulate_grad_batches, batch)
        self.autoencoder.train()
        self.discriminator.train()
        image, valid = to_device(self.device, batch["image"], batch["valid"])
        with autocast(self.device, self.precision):
            reconstruction, *latents = self.autoencoder(image)  # (B, C, D, H, W), then moments or the quantiser's terms
        reconstruction = reconstruction.float()
        shown = torch.where(valid > 0, reconstruction, image)
        terms = self.loss.reconstruction_terms(reconstruction, image, valid, shown)
        self.loss.add_regularisation(terms, *latents)
        if self.loss.generator_sees_discriminator(group.number):
            self.discriminator.requires_grad_(False)
            real = self._features(image) if self.loss.feature_matching_weight > 0 else None
            layer, scale = last_layer(self.autoencoder), self.scaler.get_scale() / group.size
            self.loss.add_adversarial(terms, group.number, self._features(shown), real, layer, scale)
        del reconstruction  # as large as the volumes, and of no use on the way back, where memory peaks
        update(terms.total(), self.autoencoder, self.optimizer, self.max_grad_norm, group, self.scaler)
        logged, scales = terms.logged(), self.scaler.logged()
        if self.loss.discriminator_trains(group.number):
            logged["discriminator"] = self._update_discriminator(image, shown.detach(), group)
            scales |= self.discriminator_scaler.logged("discriminator_")
        means = mean_over_ranks(torch.stack([term.detach().float() for term in logged.values()]))
        return dict(zip(logged, means.tolist(), strict=True)) | scales

    def _update_discriminator(self, image: torch.Tensor, shown: torch.Tensor, group: Group) -> torch.Tensor:
        self.discriminator.requires_grad_(True)
        real, fake = self._features(image)[-1], self._features(shown)[-1]
        loss = discriminator_loss(real.float(), fake.float(), self.loss.adversarial)
        optimizer, scaler = self.discriminator_optimizer, self.discriminator_scaler
        update(loss, self.discriminator, optimizer, self.max_grad_norm, group, scaler)
        return loss

    def _features(self, image: torch.Tensor) -> list[torch.Tensor]:
        with autocast(self.device, self.precision):
            return [features.float() for features in self.discriminator(image)]  # every layer's, the scores last


@dataclass
class AutoencoderValidation:
    """Reconstructs from the posterior's mean and measures it on the volume's own voxels."""

    autoencoder: Any
    device: torch.device
    precision: str = "bf16"

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch) -> dict[str, Any]:
        """Return `psnr` in dB and `l1`, means over the batch, and `image` and `reconstruction` for the previews.

        `code_counts` says how often each code of a VQ autoencoder was chosen; None of a KL autoencoder. Batches of one
        volume, so that the means over batches are means over volumes.
        """
        self.autoencoder.eval()
        image, valid = to_device(self.device, batch["image"], batch["valid"])
        with autocast(self.device, self.precision):
            latents, _ = self.autoencoder.encode(image)
            reconstruction = self.autoencoder.decode(latents)
        reconstruction = reconstruction.float()
        quantizer = getattr(self.autoencoder, "quantizer", None)
        return {
            "code_counts": quantizer.counts(latents) if quantizer is not None else None,
            "psnr": masked_psnr(reconstruction, image, valid).mean().item(),
            "l1": volume_l1(reconstruction, image, valid).mean().item(),
            "image": image,
            "reconstruction": torch.where(valid > 0, reconstruction.clamp(0, 1), image),
        }


@dataclass
class DiffusionStep:
    """A regression on latents: noise them to a random time and ask the denoiser what `objective` wants.

    A batch holds `mean` and `std`, moments of the normalised posterior (see latents.py), or `image`, which is then
    encoded here; beside them `mask` and `covariates` (B, N), for a model conditioned on them, which each volume loses
    together with probability `condition_dropout`. `accumulate_grad_batches` batches share an update.
    """

    denoiser: nn.Module
    codec: LatentCodec
    condition: MaskCondition | NoCondition
    noise_schedule: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "bf16"
    max_grad_norm: float = 1.0
    condition_dropout: float = 0.0
    time_distribution: str = "uniform"
    min_snr_gamma: float | None = None
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.noise_schedule)
        check_objective(self.objective, self.noise_schedule)
        self.scaler = LossScaler(self.device, self.precision)

    def __call__(self, engine: Engine, batch: Batch) -> dict[str, float]:
        """Update the weights and return the loss, its mean over the ranks."""
        self.denoiser.train()
        mean, std, condition = latent_batch(batch, self.codec, self.condition, self.device)
        condition = dropped(condition, self.condition_dropout, self.condition.null_value)
        latents = mean + std * torch.randn_like(std)
        noise = torch.randn_like(latents)
        timesteps = self.schedule.draw(len(latents), self.time_distribution, self.device)
        loss = diffusion_loss(self, self.denoiser, latents, noise, timesteps, condition)
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(self.objective, *self.schedule.alpha_sigma(timesteps), self.min_snr_gamma)
        loss = loss.mean()
        group = group_of(engine, self.accumulate_grad_batches, batch)
        update(loss, self.denoiser, self.optimizer, self.max_grad_norm, group, self.scaler)
        return {"loss": mean_over_ranks(loss).item()} | self.scaler.logged()


@dataclass
class DiffusionValidation:
    """The loss of the EMA weights at fixed noise and timesteps, so that curves compare between epochs and runs.

    Each volume is looked at `num_times` times, at timesteps spread evenly over the schedule; its noise depends on
    `seed` and the volume's position in the validation set alone.
    """

    denoiser: nn.Module
    codec: LatentCodec
    condition: MaskCondition | NoCondition
    noise_schedule: nn.Module
    objective: Objective
    device: torch.device
    precision: str = "bf16"
    num_times: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.noise_schedule)

    @torch.no_grad()
    def __call__(self, engine: Engine, batch: Batch) -> dict[str, float]:
        """Return `loss`, its mean over the batch and the timesteps, and `loss_k`, over the k-th quarter of the times.

        The first quarter is the least noisy.
        """
        self.denoiser.eval()
        mean, _, condition = latent_batch(batch, self.codec, self.condition, self.device)
        number = 1 + (engine.state.iteration - 1) * num_ranks() + rank()  # of the volume, see batches.EveryNth
        generator = torch.Generator().manual_seed(self.seed + number)
        losses = []
        for k in range(self.num_times):
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            timesteps = self.schedule.time_at(torch.full((len(mean),), (k + 0.5) / self.num_times, device=mean.device))
            losses.append(diffusion_loss(self, self.denoiser, mean, noise, timesteps, condition).mean())
        quarters = torch.stack(losses).chunk(NUM_BUCKETS)
        by_noise = {f"loss_{number}": quarter.mean().item() for number, quarter in enumerate(quarters, start=1)}
        return {"loss": torch.stack(losses).mean().item(), **by_noise}


def latent_batch(
    batch: Batch, codec: LatentCodec, condition: MaskCondition | NoCondition, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Return posterior mean, std and condition of a batch, from the cache's entries or by encoding its images."""
    if "mean" in batch:
        mean, std = to_device(device, batch["mean"], batch["std"])
    else:
        [image] = to_device(device, batch["image"])
        mean, std = codec.encode(image)
    grid = condition(*to_device(device, batch["mask"])) if "mask" in batch else None
    covariates = to_device(device, batch["covariates"])[0] if "covariates" in batch else None
    return mean, std, Condition(grid, covariates)


def predicted(denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Return the denoiser's prediction (B, C, D, H, W) of noisy latents of that shape at `timesteps` (B,)."""
    x = with_condition(noisy, condition.grid)  # (B, C + K, D, H, W)
    if condition.covariates is None:
        return denoiser(x, timesteps)
    return denoiser(x, timesteps, class_labels=condition.covariates)  # MONAI's name of what joins the time


def with_condition(latents: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
    """Return the denoiser's input (B, C + K, D, H, W): the noisy latents and, behind them, the condition's grid."""
    return latents if grid is None else torch.cat([latents, grid.to(latents)], dim=1)


def diffusion_loss(
    how: DiffusionStep | DiffusionValidation,
    denoiser: nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
) -> torch.Tensor:
    """Return the mean squared error (B,) of the denoiser at `timesteps` (B,)."""
    alpha, sigma = (level.to(latents).view(-1, 1, 1, 1, 1) for level in how.schedule.alpha_sigma(timesteps))
    noisy = alpha * latents + sigma * noise
    with autocast(how.device, how.precision):
        prediction = predicted(denoiser, noisy, timesteps, condition)  # (B, C, D, H, W)
    target = how.objective.target(latents, noise, alpha, sigma)
    return F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3, 4))


def to_device(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Move to `device` as plain tensors: MONAI's metadata has done its work by now, and costs time in every op."""
    return [(t.as_tensor() if hasattr(t, "as_tensor") else t).to(device, non_blocking=True) for t in tensors]
