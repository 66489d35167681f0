"""Masks in, volumes out: a trained model's checkpoint becomes something that samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.transforms import Compose, MapLabelValued

from latdiff3d import checkpoints
from latdiff3d.compilation import compiled
from latdiff3d.conditioning import Condition, MaskCondition
from latdiff3d.config import refuse_unknown_keys
from latdiff3d.covariates import SPACING, Covariates
from latdiff3d.devices import device
from latdiff3d.editing import Edit, Site, edited, site_of
from latdiff3d.errors import InputError
from latdiff3d.layouts import scan_files
from latdiff3d.memory import left_of
from latdiff3d.settings import check_settings
from latdiff3d.synthesizer import Synthesizer
from latdiff3d.transforms import LoadVolumed
from latdiff3d.volumes import ModelGrid, centred_affine, mask_on_model_grid

# What may differ between samples of one model; all else is as it was trained.
SAMPLING_SETTINGS = (
    "sampler", "sampling_steps", "sampling_spacing", "sampling_eta", "guidance", "guidance_interval",
    "guidance_in_sequence", "precision", "compile",
    "mask_mode",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A synthetic volume where it lies.

    Attributes:
        volume: (C, D, H, W) in [0, 1], on the model's grid.
        affine: (4, 4), voxel to RAS mm, of the model's grid.
        grid: the mask it was made for, or None.
        known: the covariates it was made for by name, None where nothing is known.
    """

    volume: torch.Tensor
    affine: np.ndarray
    grid: ModelGrid | None
    known: dict[str, Any]

    def on_mask_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return volume (C, D, H, W) and affine on the mask file's own grid, 0 where that is larger than the crop."""
        assert self.grid is not None
        return self.grid.to_mask_grid(self.volume), np.asarray(self.grid.stored.affine, dtype=float)


@dataclass
class Model:
    """A stage-2 checkpoint, ready to sample: what it was trained on travels in it.

    Attributes:
        path: the checkpoint.
        config: its configuration, to read further settings from.
        labels: that masks may hold, as in the files of the training set.
        training_masks: see `training_masks.summary`; None of a checkpoint of an earlier version, or without masks.
        training_intensities: see `training_intensities.summary`; None of a checkpoint of an earlier version.
        label_map: what masks hold → one of `labels`; see `with_label_map`.
        is_whole: volumes are as large as their masks; see `for_whole_masks`.
        memory_gb: what is given for these; None: decoding is done at once.
    """

    path: Path
    config: ConfigParser
    synthesizer: Synthesizer
    preprocessing: Compose
    crop_to: list[int]
    modalities: list[str]
    spacing_mm: list[float]
    covariates: Covariates
    labels: list[int] = field(default_factory=list)
    training_masks: Mapping[str, Any] | None = None
    training_intensities: Mapping[str, Any] | None = None
    label_map: Mapping[int, int] = field(default_factory=dict)
    is_whole: bool = False
    memory_gb: float | None = None

    @classmethod
    def load(
        cls,
        place: str | Path,
        num_steps: int | None = None,
        gpus: str | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "Model":
        """Read a checkpoint, or the best one of a run's folder.

        Args:
            place: the .pt file or the folder.
            num_steps: of the sampler; the configuration's where None.
            gpus: the number of one GPU; see `devices.device`.
            guidance: its scale; the configuration's where None.
            sampler: one of `samplers.SAMPLERS`; the configuration's where None.
            settings: others of `SAMPLING_SETTINGS`, in place of the configuration's.

        Raises:
            InputError: no such checkpoint, damaged, of stage 1, or of a version with fewer settings; guidance that it
                was not trained for; a setting that is not of sampling, or not what it must be.
        """
        chosen = dict(settings or {})
        refuse_unknown_keys(chosen, dict.fromkeys(SAMPLING_SETTINGS), "sampling")
        check_settings(chosen)
        named = {"guidance": guidance, "sampler": sampler, "sampling_steps": num_steps}
        chosen |= {key: value for key, value in named.items() if value is not None}
        path = checkpoints.find(place)
        content = checkpoints.load(path, "diffusion")
        if "codec" not in content["objects"]:
            raise InputError(
                f"{path} holds no codec, so its latents become no volumes; expected a checkpoint of stage 2 as a run "
                "writes it, with stage 1's weights and statistics."
            )
        parser = ConfigParser(yaml.safe_load(content["config"]))
        parser["device"] = device(gpus)
        _check_mask_mode(chosen, parser.get(), path)
        for key, value in chosen.items():
            parser[key] = value
        compile = parser.get("compile", False)
        parser["compile"] = False  # done below, for a model of an earlier version too, whose configuration lacks it
        missing = [key for key in SAMPLING_SETTINGS if key not in parser.get()]
        if missing:
            raise InputError(f"{path} is of an earlier version, without {', '.join(missing)}; give key=value for each.")
        parser.parse(True)
        denoiser, codec = parser.get_parsed_content("denoiser"), parser.get_parsed_content("codec")
        checkpoints.load_weights(denoiser, content["objects"]["ema"], str(path))
        checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
        for network in (denoiser, codec.autoencoder):
            compiled(network, compile)
        synthesizer = Synthesizer(
            denoiser,
            codec.requires_grad_(False).eval(),
            parser.get_parsed_content("condition"),
            parser.get_parsed_content("noise_schedule"),
            parser.get_parsed_content("objective"),
            parser.get_parsed_content("device"),
            parser.get_parsed_content("precision"),
            parser.get_parsed_content("sampling_steps"),
            parser.get_parsed_content("guided"),
            parser.get_parsed_content("sampler"),
            parser.get_parsed_content("sampling_spacing"),
            parser.get_parsed_content("sampling_eta"),
        )
        return cls(
            path,
            parser,
            synthesizer,
            Compose(parser.get_parsed_content("preprocessing")),
            list(parser["crop_to"]),
            list(parser["modalities"]),
            list(content["notes"]["spacing_mm"]),
            # A checkpoint of an earlier version has none.
            parser.get_parsed_content("known_covariates") if "covariates" in parser.get() else Covariates(),
            list(parser["labels"]),
            content["notes"].get("masks"),
            content["notes"].get("intensities"),
        )

    @property
    def is_conditional(self) -> bool:
        """Say whether it needs a mask."""
        return isinstance(self.synthesizer.condition, MaskCondition)

    @property
    def is_resampling(self) -> bool:
        """Say whether masks are brought to one spacing, `spacing_mm`; else each keeps its own."""
        return self.config.get()["spacing"] is not None

    @property
    def whole_cell(self) -> int | None:
        """Return the voxels along a latent cell's edge for whole masks, None for crops; see `volumes.place_mask`."""
        return self.synthesizer.codec.factor if self.is_whole else None

    @property
    def num_classes(self) -> int:
        """Return K: masks on the model's grid hold 0 … K − 1."""
        condition = self.synthesizer.condition
        assert isinstance(condition, MaskCondition)
        return condition.num_classes

    @property
    def class_names(self) -> list[str]:
        """Return of each class 0 … K − 1 the label in files that it stands for, "above 0" of coarse masks' one."""
        names = [str(label) for label in self.labels]
        if self.config.get().get("num_fine_cases") is not None:
            return [*names, "above 0"]
        return names if self.config.get()["mask_mode"] == "fine" else [names[0], "above 0"]

    def with_label_map(self, label_map: Mapping[int, int]) -> "Model":
        """Return the same model for masks whose labels have other numbers.

        Args:
            label_map: what masks hold → one of `labels`; labels that it does not name stay as they are.

        Raises:
            InputError: for a label that the model does not know, or a model without masks.
        """
        unknown = sorted(set(label_map.values()) - set(self.labels))
        if unknown:
            known = ", ".join(map(str, self.labels))
            raise InputError(f"--label-map maps to {unknown}; this model knows {{{known}}}. Map to one of them.")
        if not self.is_conditional:
            raise InputError(f"--label-map is given, and {self.path} is an unconditional model; leave it out.")
        load, *others = self.preprocessing.transforms
        assert isinstance(load, LoadVolumed)
        relabel = MapLabelValued("mask", list(label_map), list(label_map.values()), allow_missing_keys=True)
        return replace(self, preprocessing=Compose([load, relabel, *others]), label_map=dict(label_map))

    def for_whole_masks(self, memory_gb: float | None = None) -> "Model":
        """Return the same model for volumes as large as their masks, not the training crop around the labels.

        Latents are denoised by windows of the crop's size, see `latent_windows`, and decoded by tiles, see
        `LatentCodec.decode`. A mask that is no larger than the crop makes the volume that it makes without.

        Args:
            memory_gb: that the process may hold in all, or on a GPU its tensors there, in GB of 1e9 bytes, see
                `memory.left_of`; None: decode at once.

        Raises:
            InputError: for a model without masks.
        """
        if not self.is_conditional:
            raise InputError(f"{self.path} is an unconditional model, and no mask says how large a volume is whole.")
        return replace(self, is_whole=True, memory_gb=memory_gb)

    def require_mask(self, mask: str | Path | None) -> None:
        """Refuse a mask for an unconditional model, and None for another, with an InputError."""
        if (mask is None) == self.is_conditional:
            raise InputError(
                f"{self.path} is conditioned on masks; give --mask FILE_OR_FOLDER, or --data FOLDER."
                if self.is_conditional
                else f"{self.path} is an unconditional model; leave --mask and --data out."
            )

    def grid_of(self, mask: str | Path | None) -> ModelGrid | None:
        """Return the mask on the model's grid, or None for None; all that can be wrong with it is found here.

        Raises:
            InputError: a mask for an unconditional model or none for a conditional one, or a mask it cannot read.
        """
        self.require_mask(mask)
        return None if mask is None else mask_on_model_grid(mask, self.preprocessing, self.crop_to, self.whole_cell)

    def numbers_of(self, known: Mapping[str, Any], grid: ModelGrid | None) -> torch.Tensor:
        """Return covariates by name as numbers (N,), NaN where nothing is known; the spacing is that of the volume.

        Raises:
            InputError: for a covariate that it does not have, a value that is none, or another spacing than the mask's.
        """
        self.covariates.refuse_unknown(known, "--covariate")
        if grid is None:
            return self.covariates.numbers({SPACING: self.spacing_mm} | dict(known), "--covariate")
        if known.get(SPACING):
            raise InputError(f"--covariate: spacing is {known[SPACING]!r}, and a mask has its own; leave spacing out.")
        spacing_mm = np.linalg.norm(np.asarray(grid.mask.affine)[:3, :3], axis=0).tolist()
        return self.covariates.numbers({**known, SPACING: spacing_mm}, "--covariate")

    def covariates_of(self, numbers: torch.Tensor) -> torch.Tensor | None:
        """Return the covariates (1, N) of one volume's condition, `numbers_of` it; None for a model without any."""
        return numbers[None] if len(self.covariates) else None

    def sample(
        self,
        mask: str | Path | None,
        seed: int,
        known: Mapping[str, Any] | None = None,
        whole: bool = False,
        memory_gb: float | None = None,
    ) -> Sample:
        """Return a synthetic volume, which depends on `seed`, `mask` and `known` alone.

        Args:
            mask: its file; None for a model without masks.
            seed: of the noise.
            known: covariates by name, as numbers, classes, or text of either; those left out are not known.
            whole, memory_gb: see `for_whole_masks`.

        Raises:
            InputError: see `grid_of`, `numbers_of` and `for_whole_masks`, or too little memory.
        """
        if whole:
            return self.for_whole_masks(memory_gb).sample(mask, seed, known)
        if memory_gb is not None:
            raise InputError(f"memory_gb is {memory_gb:g}, which only whole volumes keep to; add whole=True.")
        grid = self.grid_of(mask)
        numbers = self.numbers_of(known or {}, grid)
        said = self.covariates.values(numbers)
        of_mask = None if grid is None else self.synthesizer.condition(grid.mask.as_tensor()[None])
        condition = Condition(of_mask, self.covariates_of(numbers))
        factor = self.synthesizer.codec.factor
        num_channels = len(self.synthesizer.codec.latent_mean)
        window = [size // factor for size in self.crop_to]
        if grid is None:
            volume = self.synthesizer.sample((num_channels, *window), condition, [seed])[0]
            affine = centred_affine(self.crop_to, said.get(SPACING) or self.spacing_mm)
            return Sample(volume.cpu(), affine, None, said)
        shape = (num_channels, *(size // factor for size in grid.mask.shape[1:]))
        volume = self.synthesizer.sample(shape, condition, [seed], window, self._left_gb(grid, condition))[0]
        return Sample(volume.cpu(), np.asarray(grid.mask.affine, dtype=float), grid, said)

    def _left_gb(self, grid: ModelGrid, condition: Condition) -> float | None:
        """Return what of `memory_gb` is left for decoding, None where there is no such budget."""
        if self.memory_gb is None:
            return None
        synthesizer = self.synthesizer
        given = [part for part in (condition.grid, condition.covariates) if part is not None]
        held = [part.nbytes for part in (grid.stored, grid.mask, *given)]
        volume_bytes = 4 * len(self.modalities) * math.prod(grid.mask.shape)
        networks = [synthesizer.denoiser, synthesizer.codec]
        return left_of(self.memory_gb, synthesizer.device, networks, sum(held), volume_bytes)

    def site_of(self, scan: str | Path, mask: str | Path, region: str | Path | None = None) -> Site:
        """Return a scan, the mask drawn for it and the region to make anew, read and found sound; see `edit`."""
        self.require_mask(mask)
        factor = self.synthesizer.codec.factor
        files = scan_files(scan, self.modalities)
        return site_of(files, mask, region, self.preprocessing, self.crop_to, factor, self.label_map)

    def edit(
        self,
        scan: str | Path,
        mask: str | Path,
        region: str | Path | None = None,
        seed: int = 0,
        known: Mapping[str, Any] | None = None,
        noise: bool = True,
        guidance: float | None = None,
    ) -> Edit:
        """Return a real scan whose region shows what a mask has drawn there; all other voxels are the scan's own.

        Args:
            scan: all modalities of it, see `layouts.scan_files`.
            mask, region: their files, see `editing.site_of`.
            seed: of the noise.
            known: covariates by name, see `sample`.
            noise, guidance: see `editing.edited`.

        Raises:
            InputError: an unconditional model, a scan that is not whole, or see `editing.site_of` and `numbers_of`.
        """
        site = self.site_of(scan, mask, region)
        covariates = self.covariates_of(self.numbers_of(known or {}, site.grid))
        return edited(site, self.synthesizer, covariates, seed, noise, guidance)


def _check_mask_mode(chosen: Mapping[str, Any], trained: Mapping[str, Any], path: Path) -> None:
    there = trained.get("mask_mode")
    if chosen.get("mask_mode", there) != there and trained.get("num_fine_cases") is None:
        raise InputError(
            f"mask_mode is {chosen['mask_mode']!r}, and {path} was trained on {there} masks alone; leave it out, or "
            "use a model that num_fine_cases trained on both."
        )
