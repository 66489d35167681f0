"""Scans in, the autoencoder's view of them out: what a model can show at best, and where it errs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from monai.transforms.utils import convert_applied_interp_mode

from latdiff3d import checkpoints
from latdiff3d.codec import LatentCodec
from latdiff3d.devices import device
from latdiff3d.errors import InputError
from latdiff3d.fidelity import psnr, ssim
from latdiff3d.handlers import progress_bar
from latdiff3d.layouts import scan_files, scan_name
from latdiff3d.provenance import computed_on
from latdiff3d.quality_pictures import Example, slices_png
from latdiff3d.readers import read_header, shape_problem
from latdiff3d.volumes import write_marked

STAGES = ("autoencoder", "diffusion")


@dataclass(frozen=True)
class Reconstruction:
    """What an autoencoder makes of a scan.

    Attributes:
        scan: (C, D, H, W) in [0, 1], as the network sees it: RAS, resampled where the model has a spacing.
        volume: the same shape, in [0, 1].
        on_scan_grid: `volume` on the scan file's own grid, (C, D', H', W').
        error: volume − scan, signed, in [−1, 1], on that grid.
        affine: (4, 4), of that grid, voxel to RAS mm.
    """

    scan: np.ndarray
    volume: np.ndarray
    on_scan_grid: np.ndarray
    error: np.ndarray
    affine: np.ndarray

    def figures(self, modalities: Sequence[str]) -> dict[str, Any]:
        """Return `PSNR` in dB and `SSIM` for a data range of 1, of all channels and of each, and `PSNRForeground`.

        All on the grid that the network sees, where nothing is padding; the last over voxels above 0 alone, since air
        is reconstructed for nothing. None where nothing differs, or nothing is above 0.
        """
        everywhere = np.ones(self.scan.shape[1:], bool)
        scores: dict[str, dict[str, float | None]] = {"PSNR": {}, "PSNRForeground": {}, "SSIM": {}}
        for k, name in enumerate(modalities):
            channel, made = self.scan[k : k + 1], self.volume[k : k + 1]
            scores["PSNR"][name] = _finite(psnr(channel, made, everywhere))
            inside = channel[0] > 0
            scores["PSNRForeground"][name] = _finite(psnr(channel, made, inside)) if inside.any() else None
            scores["SSIM"][name] = float(ssim(channel, made)[0])
        scores["PSNR"]["All"] = _finite(psnr(self.scan, self.volume, everywhere))
        scores["SSIM"]["All"] = float(np.mean(list(scores["SSIM"].values())))
        return scores


@dataclass
class Reconstructor:
    """An autoencoder with its preprocessing, from a checkpoint of either stage."""

    path: Path
    codec: LatentCodec
    preprocessing: Compose
    modalities: list[str]
    device: torch.device

    @classmethod
    def load(cls, place: str | Path, gpus: str | None = None) -> "Reconstructor":
        """Read a checkpoint of stage 1 or 2, or the best one of a run's folder.

        Args:
            place: the .pt file or the folder.
            gpus: the number of one GPU; see `devices.device`.

        Raises:
            InputError: no such checkpoint, damaged, or of neither stage.
        """
        path = checkpoints.find(place)
        content = checkpoints.load(path)
        if content["stage"] not in STAGES:
            raise InputError(f"{path} is a checkpoint of stage '{content['stage']}'; expected {' or '.join(STAGES)}.")
        parser = ConfigParser(yaml.safe_load(content["config"]))
        parser["device"] = device(gpus)
        parser["compile"] = False
        parser.parse(True)
        codec = parser.get_parsed_content("codec")
        checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
        preprocessing = Compose(parser.get_parsed_content("preprocessing"))
        return cls(
            path, codec.requires_grad_(False).eval(), preprocessing, list(parser["modalities"]), parser["device"]
        )

    def reconstruct(self, files: Sequence[str], memory_gb: float | None = None) -> Reconstruction:
        """Return what the mean of a scan's posterior decodes to.

        Args:
            files: of one scan, see `layouts.scan_files`.
            memory_gb: see `LatentCodec.encode`.

        Raises:
            InputError: a scan that the model cannot read, too little memory, or a stage 1 that is not finished.
        """
        image: MetaTensor = self.preprocessing({"image": list(files)})["image"]
        scan = image.as_tensor()  # (C, D, H, W)
        made = self.codec.reconstruct(scan[None].to(self.device), memory_gb)[0].clamp(0, 1).cpu()
        return Reconstruction(
            scan.numpy(),
            made.numpy(),
            self._on_scan_grid(made, image),
            self._on_scan_grid(made - scan, image),
            read_header(files[0]).affine,
        )

    def _on_scan_grid(self, volume: torch.Tensor, image: MetaTensor) -> np.ndarray:
        operations = convert_applied_interp_mode(image.applied_operations, mode="bilinear")
        placed = MetaTensor(volume, meta=image.meta, applied_operations=operations)
        return np.asarray(self.preprocessing.inverse({"image": placed})["image"], dtype=np.float32)


def reconstruct_to_folder(
    reconstructor: Reconstructor,
    scans: Sequence[str],
    out: str | Path,
    memory_gb: float | None = None,
    picture: bool = True,
    int16: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write `<case>_<modality>.nii.gz`, `<case>_<modality>_error.nii.gz`, `<case>.json` and `<case>.png` of each scan.

    Volumes lie on the scans' own grids, intensities are those that the network sees, 0 to 1; errors are signed,
    reconstruction − scan. All say that they are no scan. The picture has three planes of the scan, of its
    reconstruction and of the absolute error, brightened.

    Args:
        scans: see `layouts.scan_files`; the folder's or the first file's name is the case's.
        out: the folder; each case gets one below it.
        memory_gb: see `LatentCodec.encode`.
        picture: write that.
        int16: see `volumes.write_marked`.

    Yields:
        case and figures, see `Reconstruction.figures`, as they are written.

    Raises:
        InputError: a scan that is not there, of another number of channels, or two of one name, before any is worked
            on; or see `Reconstructor.reconstruct`.
    """
    modalities = reconstructor.modalities
    named = {scan_name(scan, modalities): scan_files(scan, modalities) for scan in scans}
    if len(named) != len(scans):
        raise InputError(f"{len(scans)} scans have only {len(named)} different names; expected a name of its own each.")
    for files in named.values():
        for file in files:
            problem = shape_problem(file, read_header(file).shape, len(modalities) if len(files) == 1 else 1)
            if problem:
                raise InputError(problem)
    digest = checkpoints.sha256(reconstructor.path)
    for case, files in progress_bar(named.items(), desc="reconstructing", unit="volume"):
        found = reconstructor.reconstruct(files, memory_gb)
        figures = found.figures(modalities)
        provenance = {
            "Checkpoint": {"Path": str(reconstructor.path), "SHA256": digest},
            "Image": [{"Name": Path(file).name, "SHA256": checkpoints.sha256(Path(file))} for file in files],
            **computed_on(reconstructor.device, reconstructor.codec.precision),
            "Units": "normalised intensity, 0 to 1; errors are reconstruction - scan",
            "DataType": "int16" if int16 else "float32",
            **figures,
        }
        volumes = {
            name: ("reconstruction", channel) for name, channel in zip(modalities, found.on_scan_grid, strict=True)
        }
        errors = {f"{name}_error": ("error", channel) for name, channel in zip(modalities, found.error, strict=True)}
        write_marked(Path(out), case, volumes | errors, found.affine, provenance, int16)
        if picture:
            example = Example(case, figures["PSNR"]["All"] or math.inf, found.scan, found.volume)
            (Path(out) / case / f"{case}.png").write_bytes(slices_png(example))
        yield case, figures


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
