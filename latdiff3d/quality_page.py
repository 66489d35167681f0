"""The page that says how good stage 1's codec is: one HTML file that stands alone, on a screen and in print."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from latdiff3d import verdict
from latdiff3d.fidelity import WINDOW
from latdiff3d.html_page import captioned, grouped_table, notes, number, page, picture, table
from latdiff3d.plots import BLUE, INK, ORANGE, Curve, spectra_png
from latdiff3d.quality_pictures import Example, Spectra, slices_png

CODES = {"autoencoder": "autoencoder", "block_pca": "block PCA"}


def render(title: str, figures: Mapping[str, Any], spectra: Spectra, worst: Sequence[Example]) -> str:
    """Return the page.

    Args:
        title: what was measured, such as the run's folder.
        figures: as `quality.measure` returns them.
        spectra: of the same cases.
        worst: the cases of lowest PSNR, the worst first.
    """
    reasons = verdict.poor(figures)
    sections = [
        ("Reconstruction, by modality", _fidelity(figures)),
        ("Error inside each mask label", _labels(figures)),
        ("Spectrum", _spectrum(figures, spectra)),
        ("Latents", _latents(figures)),
        ("Codebook", _codebook(figures)),
        ("Worst cases", "".join(_picture(example) for example in worst)),
        ("How it was measured", _method(figures)),
    ]
    stage_2 = f"Stage 2 will warn: {'; '.join(reasons)}." if reasons else "Stage 2 may begin on it."
    said = f"{html.escape(verdict.summary(figures))}.<br>{html.escape(stage_2)}"
    return page(f"Quality of {title}", f"Quality of the codec {title}", said, sections)


def _fidelity(figures: Mapping[str, Any]) -> str:
    measures = {
        "PSNR, dB": ("psnr_db", 2),
        "SSIM": ("ssim", 3),
        "MS-SSIM": ("ms_ssim", 3),
        "energy above Nyquist / 2, of the real": ("spectrum_ratio", 2),
    }
    rows = []
    for modality in figures["autoencoder"]["modalities"]:
        of = {code: figures[code]["modalities"][modality] for code in CODES}
        rows.append([modality, *(number(of[code][key], d) for key, d in measures.values() for code in CODES)])
    rows.append(["all together", *(number(figures[code][key], d) for key, d in measures.values() for code in CODES)])
    return grouped_table(list(measures), list(CODES.values()), rows)


def _labels(figures: Mapping[str, Any]) -> str:
    if figures["label_voxels"] is None:
        return "<p>These cases have no masks.</p>"
    modalities = list(figures["autoencoder"]["modalities"])
    rows = []
    for label, voxels in figures["label_voxels"].items():
        errors = [figures[code]["mae"][label][modality] for modality in modalities for code in CODES]
        name = "outside all labels" if label == "0" else f"label {label}"
        rows.append([f"{name}, {voxels:,} voxels", *(number(error, 4) for error in errors)])
    return "<p>Mean absolute error; the real volumes' range is 0 to 1.</p>" + grouped_table(
        modalities, list(CODES.values()), rows
    )


def _spectrum(figures: Mapping[str, Any], spectra: Spectra) -> str:
    low, high = verdict.SPECTRUM_RANGE
    ratio = figures["autoencoder"]["spectrum_ratio"]
    shown = number(ratio, 2, ratio is not None and not verdict.within(ratio, verdict.SPECTRUM_RANGE))
    curves = {
        "real": Curve(spectra.real, INK),
        CODES["autoencoder"]: Curve(spectra.autoencoder, ORANGE),
        CODES["block_pca"]: Curve(spectra.block_pca, BLUE, "--"),
    }
    plot = spectra_png(curves, list(figures["autoencoder"]["modalities"]))
    return (
        f"<p>Energy above half the Nyquist frequency, over the real volumes': {shown}; {low} to {high} is good, less "
        f"is blurred, more is noisy.</p>{picture(plot, 'radially averaged power spectra')}"
    )


def _latents(figures: Mapping[str, Any]) -> str:
    rows = []
    for index, channel in enumerate(figures["latents"]):
        off = {
            "std": not verdict.within(channel["std"], verdict.STD_RANGE),
            "excess_kurtosis": channel["excess_kurtosis"] is not None
            and not verdict.within(channel["excess_kurtosis"], verdict.KURTOSIS_RANGE),
        }
        rows.append([str(index), *(number(channel[key], 3, off.get(key, False)) for key in channel)])
    head = ["channel", "mean", "std", "excess kurtosis", "share of noise"]
    return (
        "<p>As the diffusion model is given them, normalised; best are 0, 1 and 0. A share of noise near 1 is a "
        f"channel that says nothing.</p>{table(head, rows)}"
    )


def _codebook(figures: Mapping[str, Any]) -> str:
    codebook = figures["codebook"]
    if codebook is None:
        return "<p>This autoencoder has no codebook.</p>"
    use = number(100 * codebook["use"], 0, codebook["use"] < verdict.CODEBOOK_USE_MIN)
    return (
        f"<p>{codebook['used']} of {codebook['size']} codes are in use, in %: {use}. "
        f"Perplexity: {codebook['perplexity']:.0f}.</p>"
    )


def _method(figures: Mapping[str, Any]) -> str:
    scales = figures["ms_ssim_scales"]
    multiscale = (
        f"MS-SSIM over {scales[0]}{f' to {scales[1]}' if scales[1] > scales[0] else ''} scales, as many as each volume "
        f"holds of five, with their published weights made to sum to 1 ({figures['num_multiscale']} volumes)"
        if scales
        else f"MS-SSIM was not measured: no volume has the {2 * WINDOW} voxels along each axis that two scales need"
    )
    items = [
        f"{figures['num_validation']} of {figures['num_validation_in_all']} validation cases, each reconstructed from "
        "its posterior's mean and clipped to [0, 1]; figures are means over cases.",
        "Everything but the latents is measured on a volume's own voxels, padding left out.",
        f"Block PCA keeps {figures['num_latents']} numbers for each block of {figures['block']}³ voxels, as the codec "
        f"does; fitted on {figures['num_training']} of {figures['num_training_in_all']} training cases.",
        "PSNR and both SSIMs take a data range of 1, PSNR is capped at 100 dB. SSIM has MONAI's Gaussian window of "
        f"{WINDOW} voxels, wholly inside the volume (narrower where the volume is). {multiscale}.",
        "Spectra: mean off, Hann window, energy summed over all cases; frequencies in voxels, in any direction.",
        "Latents: all cells of the crop, padding too; moments of posterior draws, worked out without drawing.",
    ]
    return notes(items)


def _picture(example: Example) -> str:
    return captioned(slices_png(example), f"{example.name}, PSNR {example.psnr_db:.2f} dB")
