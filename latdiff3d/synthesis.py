"""Masks in, volumes out: a trained model's checkpoint becomes something that samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import nn

from latdiff3d import checkpoints, samplers
from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import MaskCondition, NoCondition
from latdiff3d.devices import autocast, device
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.networks import downsampling
from latdiff3d.objectives import Epsilon
from latdiff3d.training import latent_batch, with_condition
from latdiff3d.volumes import (
    case_name,
    centred_affine,
    mask_on_model_grid,
    read_mask,
    write_synthetic,
)


@dataclass
class Synthesizer:
    """Noise and condition → latents by DDIM → volumes.

    Args:
        num_steps: how often the denoiser is called for a volume.
    """

    denoiser: nn.Module
    codec: LatentCodec
    condition: MaskCondition | NoCondition
    noise_schedule: nn.Module
    objective: Epsilon
    device: torch.device
    precision: str = "bf16"
    num_steps: int = 50

    def __call__(self, batch: Mapping[str, Any], seed: int = 0) -> torch.Tensor:
        """Return volumes (B, C, D, H, W) for the conditions of a batch as stage 2 trains on."""
        mean, _, condition = latent_batch(batch, self.codec, self.condition, self.device)
        return self.sample(mean.shape[1:], condition, [seed] * len(mean))

    @torch.no_grad()
    def sample(
        self, shape: Sequence[int], condition: torch.Tensor | None, seeds: Sequence[int]
    ) -> torch.Tensor:
        """Return one volume a seed, (B, C, D, H, W) in [0, 1].

        Args:
            shape: of one volume's latents, (C', D/f, H/f, W/f).
            condition: (B, K, D/f, H/f, W/f), or None for an unconditional model.
            seeds: one a volume; its noise depends on it alone.
        """
        self.denoiser.eval()
        noise = torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        alphas_cumprod = self.noise_schedule.alphas_cumprod.to(self.device)

        def split(z: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
            timesteps = torch.full((len(z),), t, device=z.device)
            with autocast(self.device, self.precision):
                prediction = self.denoiser(with_condition(z, condition), timesteps).float()
            return self.objective.split(prediction, z, alphas_cumprod[t])

        times = samplers.time_pairs(self.num_steps, len(alphas_cumprod))
        latents = samplers.ddim(split, noise.to(self.device), times, alphas_cumprod)
        return self.codec.decode(latents).clamp(0, 1)


@dataclass
class Model:
    """A stage-2 checkpoint, ready to sample: what it was trained on travels in it.

    Attributes:
        path: the checkpoint.
        config: its configuration, to read further settings from.
    """

    path: Path
    config: ConfigParser
    synthesizer: Synthesizer
    preprocessing: Compose
    crop_to: list[int]
    modalities: list[str]
    spacing_mm: list[float]

    @classmethod
    def load(cls, place: str | Path, num_steps: int | None = None, gpus: str | None = None) -> "Model":
        """Read a checkpoint, or the best one of a run's folder.

        Args:
            place: the .pt file or the folder.
            num_steps: of the sampler; the configuration's where None.
            gpus: the number of one GPU; see `devices.device`.

        Raises:
            InputError: no such checkpoint, damaged, or of stage 1.
        """
        path = checkpoints.find(place)
        content = checkpoints.load(path, "diffusion")
        parser = ConfigParser(yaml.safe_load(content["config"]))
        parser["device"] = device(gpus)
        parser.parse(True)
        denoiser, codec = parser.get_parsed_content("denoiser"), parser.get_parsed_content("codec")
        checkpoints.load_weights(denoiser, content["objects"]["ema"], str(path))
        checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
        synthesizer = Synthesizer(
            denoiser,
            codec.requires_grad_(False).eval(),
            parser.get_parsed_content("condition"),
            parser.get_parsed_content("noise_schedule"),
            parser.get_parsed_content("objective"),
            parser.get_parsed_content("device"),
            parser.get_parsed_content("precision"),
            num_steps or parser.get_parsed_content("sampling_steps"),
        )
        return cls(
            path,
            parser,
            synthesizer,
            Compose(parser.get_parsed_content("preprocessing")),
            list(parser["crop_to"]),
            list(parser["modalities"]),
            list(content["notes"]["spacing_mm"]),
        )

    @property
    def is_conditional(self) -> bool:
        """Say whether it needs a mask."""
        return isinstance(self.synthesizer.condition, MaskCondition)

    def sample(self, mask: str | Path | None, seed: int, grid: str = "mask") -> tuple[np.ndarray, np.ndarray]:
        """Return a volume (C, D, H, W) in [0, 1] and its affine (4, 4), voxel to RAS mm.

        Args:
            mask: a NIfTI file; None for an unconditional model.
            seed: the volume depends on it and on the mask alone.
            grid: "mask" for the mask file's own grid, 0 where it is larger than the model's crop; "crop" for the
                model's grid.

        Raises:
            InputError: a mask for an unconditional model or none for a conditional one, or a mask it cannot read.
        """
        if (mask is None) == self.is_conditional:
            raise InputError(
                f"{self.path} is conditioned on masks; give --mask FILE_OR_FOLDER."
                if self.is_conditional
                else f"{self.path} is an unconditional model; leave --mask out."
            )
        factor = downsampling(self.synthesizer.codec.autoencoder)
        shape = (len(self.synthesizer.codec.latent_mean), *(size // factor for size in self.crop_to))
        if mask is None:
            volume = self.synthesizer.sample(shape, None, [seed])[0]
            return volume.cpu().numpy(), centred_affine(self.crop_to, self.spacing_mm)
        placed = mask_on_model_grid(mask, self.preprocessing, self.crop_to)
        condition = self.synthesizer.condition(placed.mask.as_tensor()[None])
        if condition is not None:
            condition = condition.to(self.synthesizer.device)
        volume = self.synthesizer.sample(shape, condition, [seed])[0].cpu()
        if grid == "crop":
            return volume.numpy(), np.asarray(placed.mask.affine, dtype=float)
        return placed.to_mask_grid(volume), read_mask(mask)[1]


def sample_to_folder(
    model: Model,
    masks: Sequence[str | Path],
    out: str | Path,
    num_samples: int = 1,
    seed: int = 0,
    grid: str = "mask",
) -> list[Path]:
    """Write `num_samples` volumes for each mask, or in all for an unconditional model, and return their files.

    Args:
        model: from `Model.load`.
        masks: NIfTI files; none for an unconditional model.
        out: the folder; each case gets one below it.
        num_samples: the k-th has seed + k.
        seed: of the first.
        grid: see `Model.sample`.

    Raises:
        InputError: two masks of one name, or what `Model.sample` refuses.
    """
    named = {case_name(mask): mask for mask in masks}
    if len(named) != len(masks):
        raise InputError(f"{len(masks)} masks have only {len(named)} different names; expected a name of its own each.")
    digest = checkpoints.sha256(model.path)
    jobs: list[tuple[str, str | Path | None]] = list(named.items()) or [("synthetic", None)]
    written: list[Path] = []
    with progress_bar(total=len(jobs) * num_samples, desc="sampling", unit="volume") as bar:
        for case, mask in jobs:
            for k in range(num_samples):
                name = case if num_samples == 1 and mask is not None else f"{case}_seed{seed + k:04d}"
                volume, affine = model.sample(mask, seed + k, grid)
                provenance = {
                    "Checkpoint": {"Path": str(model.path), "SHA256": digest},
                    "Seed": seed + k,
                    "Sampler": "DDIM",
                    "Steps": model.synthesizer.num_steps,
                    "Mask": None if mask is None else {"Name": Path(mask).name, "SHA256": checkpoints.sha256(Path(mask))},
                    "Units": "normalised intensity, 0 to 1",
                }
                labels = read_mask(mask)[0] if mask is not None and grid == "mask" else None
                written += write_synthetic(Path(out), name, volume, affine, model.modalities, provenance, labels)
                bar.update()
    return written


def masks_at(place: str | Path) -> list[Path]:
    """Return the masks that `place` names: the file itself, or the NIfTI files of a folder, sorted.

    Raises:
        InputError: when there is none.
    """
    path = Path(place)
    masks = sorted(path.glob("*.nii*")) if path.is_dir() else [path] if path.is_file() else []
    if not masks:
        raise InputError(f"there is no mask at {path}; expected a .nii.gz or .nii file, or a folder of them.")
    return masks


def masks_of_split(model: Model, dataset_dir: str | Path, split: str) -> list[Path]:
    """Return the masks of a data set's split, read as the model's configuration reads data.

    Raises:
        InputError: for another split than train, val or test, or for a data set that cannot be read.
    """
    model.config["dataset_dir"] = str(dataset_dir)
    if split not in ("train", "val", "test"):
        raise InputError(f"split is {split!r}; expected train, val or test.")
    model.config.ref_resolver.reset()
    return [Path(case["mask"]) for case in model.config.get_parsed_content("splits")[split]]
