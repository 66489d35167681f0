"""The gate between the stages: measure a codec over the validation cases and write quality.html and quality.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.data.utils import set_rnd

from latdiff3d import verdict, whole_files
from latdiff3d.codec import LatentCodec
from latdiff3d.devices import autocast
from latdiff3d.errors import InputError
from latdiff3d.fidelity import own_voxels
from latdiff3d.handlers import progress_bar
from latdiff3d.latent_moments import LatentMoments
from latdiff3d.linear_codes import BlockPCA
from latdiff3d.networks import downsampling
from latdiff3d.plain_figures import finite, write_json
from latdiff3d.quality_page import render
from latdiff3d.quality_pictures import Example, Spectra
from latdiff3d.quantization import VectorQuantizer
from latdiff3d.spectrum import shell_energies, shell_shares
from latdiff3d.tally import Tally

PAGE, FIGURES = "quality.html", "quality.json"
NUM_WORST = 3
SEED = 0  # of the training cases' crops


def write_report(
    folder: str | Path,
    codec: LatentCodec,
    validation: Dataset,
    training: Dataset,
    modalities: Sequence[str],
    labels: Sequence[int],
    num_cases: int = 64,
) -> dict[str, Any]:
    """Measure a codec, write the page and its figures into `folder`, and return the figures.

    Args:
        folder: the run's.
        codec: measured, on its device.
        validation, training: data sets of `case`, `image` (C, D, H, W) in [0, 1], `valid` (1, D, H, W), 1 on the
            volume's own voxels, and, where there are masks, `mask` (1, D, H, W) of class numbers.
        modalities: C names.
        labels: the label in the files of each class number.
        num_cases: of either set, so many at most are looked at, spread evenly over it.

    Raises:
        InputError: no validation or no training cases.
    """
    folder = Path(folder)
    figures, spectra, worst = measure(codec, validation, training, modalities, labels, num_cases)
    whole_files.write(folder / PAGE, render(str(folder), figures, spectra, worst))
    said = {"verdict": verdict.summary(figures), "poor": verdict.poor(figures), **figures}
    write_json(folder / FIGURES, said)
    return figures


def measure(
    codec: LatentCodec,
    validation: Dataset,
    training: Dataset,
    modalities: Sequence[str],
    labels: Sequence[int],
    num_cases: int,
) -> tuple[dict[str, Any], Spectra, list[Example]]:
    """Return a codec's figures, plain numbers by name with None for what is undefined, and what the page shows.

    The arguments are those of `write_report`.
    """
    chosen, fitted_on = _spread(len(validation), num_cases), _spread(len(training), num_cases)
    if not chosen or not fitted_on:
        raise InputError(f"{len(chosen)} validation and {len(fitted_on)} training cases; expected at least 1 of each.")
    codec.eval()
    device = codec.latent_mean.device
    block, num_latents = downsampling(codec.autoencoder), len(codec.latent_mean)
    set_rnd(training, SEED)
    pca = BlockPCA().fit((_own(training[k], "image") for k in fitted_on), num_latents, block)

    ours, linear, moments, codebook = Tally(device), Tally(device), LatentMoments(num_latents), _CodebookCount(codec)
    real_energies, shares, examples = [], [], []
    for k in progress_bar(chosen, desc="measuring the codec", unit="volume"):
        item = validation[k]
        image = torch.as_tensor(item["image"]).as_subclass(torch.Tensor)[None].to(device)  # (1, C, D, H, W)
        latents, std = codec.encode(image)
        moments.update(latents, std)
        codebook.update(image)
        own = own_voxels(np.asarray(item["valid"]))
        real, mask = _own(item, "image"), _own(item, "mask") if "mask" in item else None
        reconstruction = codec.decode(latents)[0].cpu().numpy()[own].clip(0, 1)
        ours.add(real, reconstruction, mask)
        linear.add(real, pca.reconstruct(real).clip(0, 1), mask)
        real_energies.append(shell_energies(real))
        shares.append(shell_shares(real.shape[1:]))
        examples.append(Example(Path(str(item["case"])).name, ours.psnr[-1], real, reconstruction))
        examples = sorted(examples, key=lambda example: example.psnr_db)[:NUM_WORST]

    energies, share = np.sum(real_energies, axis=0), np.sum(shares, axis=0)
    figures = {
        "num_validation": len(chosen),
        "num_validation_in_all": len(validation),
        "num_training": len(fitted_on),
        "num_training_in_all": len(training),
        "num_latents": num_latents,
        "block": block,
        "autoencoder": ours.figures(modalities, labels, energies),
        "block_pca": linear.figures(modalities, labels, energies),
        "gain_over_pca_db": float(np.mean(ours.psnr) - np.mean(linear.psnr)),
        "ms_ssim_scales": [min(ours.scales), max(ours.scales)] if ours.scales else None,
        "num_multiscale": len(ours.scales),
        "label_voxels": {str(labels[c]): n for c, n in sorted(ours.voxels.items())} or None,
        "latents": [channel.as_dict() for channel in moments.channels()],
        "codebook": codebook.figures(),
        "worst": [{"case": example.name, "psnr_db": example.psnr_db} for example in examples],
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        of_all = (energies, np.sum(ours.energies, axis=0), np.sum(linear.energies, axis=0))
        spectra = Spectra(*(values / share for values in of_all))
    return finite(figures), spectra, examples


class _CodebookCount:
    """How often each code of a VQ autoencoder is chosen; nothing for another autoencoder."""

    def __init__(self, codec: LatentCodec) -> None:
        self.precision = codec.precision
        self.autoencoder: Any = codec.autoencoder
        self.quantizer = next((m for m in codec.modules() if isinstance(m, VectorQuantizer)), None)
        self.counts: np.ndarray = np.zeros(0, int)

    @torch.no_grad()
    def update(self, image: torch.Tensor) -> None:
        """Add an image (1, C, D, H, W)."""
        if self.quantizer is not None:
            with autocast(image.device, self.precision):
                latents = self.autoencoder.encode(image)[0]
            counts = self.quantizer.counts(latents.float()).cpu().numpy()
            self.counts = counts if self.counts.size == 0 else self.counts + counts

    def figures(self) -> dict[str, Any] | None:
        """Return codes in use, their share of the book, and the exponential of the entropy of their frequencies."""
        if self.quantizer is None:
            return None
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return {
            "used": len(shares),
            "size": len(self.counts),
            "use": len(shares) / len(self.counts),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        }


def _own(item: dict[str, Any], key: str) -> np.ndarray:
    return np.asarray(item[key])[own_voxels(np.asarray(item["valid"]))]


def _spread(size: int, num: int) -> list[int]:
    """Return at most `num` of the numbers below `size`, evenly spread, from the first to the last."""
    return sorted({round(k) for k in np.linspace(0, size - 1, min(size, num))})
