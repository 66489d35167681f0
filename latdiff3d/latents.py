"""Latents of a data set, encoded once before stage 2 instead of at every step."""

from typing import Any

import torch
from monai.data import DataLoader, Dataset

from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import MaskCondition, NoCondition
from latdiff3d.handlers import progress_bar


def encode_dataset(
    dataset: Dataset,
    codec: LatentCodec,
    condition: MaskCondition | NoCondition,
    num_crops: int,
    seed: int,
    device: torch.device,
) -> Dataset:
    """Return the data set to train stage 2 on: moments of the posterior, or `dataset` itself for `num_crops` 0.

    The moments, not a draw, are kept: each training step draws anew.

    Args:
        dataset: gives `case`, `image` (C, D, H, W) and, for a conditioned model, `mask` (1, D, H, W).
        codec: measured.
        condition: of the denoiser.
        num_crops: how many random crops of each volume are encoded; they are drawn once. 0 encodes at every step.
        seed: of the crops.
        device: where to encode.

    Returns:
        a data set of `case`, `mean`, `std` (C', D/f, H/f, W/f) and, for a conditioned model, `condition`.
    """
    if num_crops == 0:
        return dataset
    # MONAI's loader seeds the transforms from its generator, once, when it is made: the passes draw different crops.
    loader = DataLoader(dataset, batch_size=1, num_workers=0, generator=torch.Generator().manual_seed(seed))
    with progress_bar(total=num_crops * len(loader), desc="encoding", unit="volume") as bar:
        entries = []
        for _ in range(num_crops):
            for batch in loader:
                entries.append(_encode(batch, codec, condition, device))
                bar.update()
    return Dataset(entries)


def _encode(
    batch: dict[str, Any], codec: LatentCodec, condition: MaskCondition | NoCondition, device: torch.device
) -> dict[str, Any]:
    mean, std = codec.encode(batch["image"].as_tensor().to(device))
    entry = {"case": batch["case"][0], "mean": mean[0].cpu(), "std": std[0].cpu()}
    fractions = condition(batch["mask"].as_tensor()) if "mask" in batch else None
    return entry if fractions is None else entry | {"condition": fractions[0]}

