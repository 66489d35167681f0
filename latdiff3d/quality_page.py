"""The page that says how good stage 1's codec is: one HTML file that stands alone, on a screen and in print."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latdiff3d import verdict
from latdiff3d.fidelity import WINDOW
from latdiff3d.quality_pictures import Example, Spectra, slices_png, spectra_png

CODES = {"autoencoder": "autoencoder", "block_pca": "block PCA"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c22; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e8; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; } img { max-width: 100%; height: auto; display: block; }
.verdict { font-size: 1.15rem; padding: .6rem .9rem; border-left: .4rem solid #0072b2; background: #f3f6f9; }
.off { color: #a33c00; font-weight: 600; } .off::after { content: " !"; }
.note { color: #55555f; font-size: .9rem; } figure { margin: 1rem 0; } figcaption { margin-bottom: .3rem; }
@media print { body { margin: 0; max-width: none; } h2, figure, table { break-inside: avoid; } }
"""


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
    body = "".join(f"<h2>{heading}</h2>\n{content}\n" for heading, content in sections)
    stage_2 = f"Stage 2 will warn: {'; '.join(reasons)}." if reasons else "Stage 2 may begin on it."
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Quality of {html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>Quality of the codec {html.escape(title)}</h1>
<p class="verdict">{html.escape(verdict.summary(figures))}.<br>{html.escape(stage_2)}</p>
{body}</body></html>
"""


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
        rows.append([modality, *(_number(of[code][key], d) for key, d in measures.values() for code in CODES)])
    rows.append(["all together", *(_number(figures[code][key], d) for key, d in measures.values() for code in CODES)])
    return _table(list(measures), list(CODES.values()), rows)


def _labels(figures: Mapping[str, Any]) -> str:
    if figures["label_voxels"] is None:
        return "<p>These cases have no masks.</p>"
    modalities = list(figures["autoencoder"]["modalities"])
    rows = []
    for label, voxels in figures["label_voxels"].items():
        errors = [figures[code]["mae"][label][modality] for modality in modalities for code in CODES]
        name = "outside all labels" if label == "0" else f"label {label}"
        rows.append([f"{name}, {voxels:,} voxels", *(_number(error, 4) for error in errors)])
    return "<p>Mean absolute error; the real volumes' range is 0 to 1.</p>" + _table(
        modalities, list(CODES.values()), rows
    )


def _spectrum(figures: Mapping[str, Any], spectra: Spectra) -> str:
    low, high = verdict.SPECTRUM_RANGE
    ratio = figures["autoencoder"]["spectrum_ratio"]
    shown = _number(ratio, 2, ratio is not None and not verdict.within(ratio, verdict.SPECTRUM_RANGE))
    plot = spectra_png(spectra, list(figures["autoencoder"]["modalities"]), {"real": "real", **CODES})
    return (
        f"<p>Energy above half the Nyquist frequency, over the real volumes': {shown}; {low} to {high} is good, less "
        f"is blurred, more is noisy.</p>{_image(plot, 'radially averaged power spectra')}"
    )


def _latents(figures: Mapping[str, Any]) -> str:
    rows = []
    for number, channel in enumerate(figures["latents"]):
        off = {
            "std": not verdict.within(channel["std"], verdict.STD_RANGE),
            "excess_kurtosis": channel["excess_kurtosis"] is not None
            and not verdict.within(channel["excess_kurtosis"], verdict.KURTOSIS_RANGE),
        }
        rows.append([str(number), *(_number(channel[key], 3, off.get(key, False)) for key in channel)])
    head = ["channel", "mean", "std", "excess kurtosis", "share of noise"]
    return (
        "<p>As the diffusion model is given them, normalised; best are 0, 1 and 0. A share of noise near 1 is a "
        f"channel that says nothing.</p>{_plain_table(head, rows)}"
    )


def _codebook(figures: Mapping[str, Any]) -> str:
    codebook = figures["codebook"]
    if codebook is None:
        return "<p>This autoencoder has no codebook.</p>"
    use = _number(100 * codebook["use"], 0, codebook["use"] < verdict.CODEBOOK_USE_MIN)
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
    return "<ul class=note>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _picture(example: Example) -> str:
    caption = f"{html.escape(example.name)}, PSNR {example.psnr_db:.2f} dB"
    return f"<figure><figcaption>{caption}</figcaption>{_image(slices_png(example), caption)}</figure>"


def _number(value: float | None, decimals: int, off: bool = False) -> str:
    shown = "–" if value is None else f"{value:.{decimals}f}"
    return f'<span class="off">{shown}</span>' if off else shown


def _table(groups: Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    upper = "".join(f"<th colspan={len(columns)}>{html.escape(group)}</th>" for group in groups)
    lower = "".join(f"<th>{html.escape(column)}</th>" for _ in groups for column in columns)
    return f"<table><tr><th></th>{upper}</tr><tr><th></th>{lower}</tr>{_rows(rows)}</table>"


def _plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{_rows(rows)}</table>"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for first, *cells in rows
    )


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
