"""Reconstruction, a section of an evaluation: what the autoencoder alone loses, which no sample can have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from latdiff3d.bootstrap import mean_interval
from latdiff3d.html_page import captioned, notes, number, table, with_interval
from latdiff3d.quality_pictures import Example, slices_png
from latdiff3d.spectrum import shell_energies
from latdiff3d.tally import Tally

MEASURES = {
    "PSNR, dB": ("psnr_db", 2),
    "SSIM": ("ssim", 3),
    "MS-SSIM": ("ms_ssim", 3),
    "mean absolute error": ("mae", 4),
    "energy above Nyquist / 2, of the real": ("spectrum_ratio", 2),
}
PICTURE = "worst"


class Pair(NamedTuple):
    """A volume and what the codec makes of it, cut to its own voxels.

    Attributes:
        name: of the case.
        real, reconstruction: (C, D, H, W) in [0, 1].
        mask: (1, D, H, W) of classes, or None.
    """

    name: str
    real: np.ndarray
    reconstruction: np.ndarray
    mask: np.ndarray | None


def measure(
    pairs: Iterable[Pair], modalities: Sequence[str], class_names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a codec's figures, means over cases, and a picture of the case of lowest PSNR.

    Args:
        pairs: one a case, at least one.
        modalities: C names.
        class_names: of classes 0, 1, …
    """
    tally, energies, worst = Tally(), [], None
    for pair in pairs:
        tally.add(pair.real, pair.reconstruction, pair.mask)
        energies.append(shell_energies(pair.real))
        if worst is None or tally.psnr[-1] < worst.psnr_db:
            worst = Example(pair.name, tally.psnr[-1], pair.real, pair.reconstruction)
    assert worst is not None
    figures = {
        "num_cases": len(energies),
        "psnr_db_interval": mean_interval(np.array(tally.psnr)),
        **tally.figures(modalities, class_names, np.sum(energies, axis=0)),
        "label_voxels": {class_names[k]: count for k, count in sorted(tally.voxels.items())},
        "worst": {"case": worst.name, "psnr_db": worst.psnr_db},
    }
    return figures, {PICTURE: slices_png(worst)}


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    modalities = list(figures["modalities"])
    rows = [[m, *(number(figures["modalities"][m][key], d) for key, d in MEASURES.values())] for m in modalities]
    together = {**figures, "mae": None}
    rows.append(["all together", *(number(together[key], d) for key, d in MEASURES.values())])
    of_labels = [
        [f"label {label}" if k else "outside all labels", f"{figures['label_voxels'][label]:,}"]
        + [number(figures["mae"][label][modality], 4) for modality in modalities]
        for k, label in enumerate(figures["mae"])
    ]
    inside = f"<p>Mean absolute error inside each label:</p>{table(['', 'voxels', *modalities], of_labels)}"
    worst = figures["worst"]
    psnr = with_interval(figures["psnr_db"], figures["psnr_db_interval"], 2)
    return (
        f"<p>PSNR {psnr} dB.</p>{table(['', *MEASURES], rows)}{inside if of_labels else ''}"
        + captioned(pictures[PICTURE], f"The worst case, {worst['case']}, PSNR {worst['psnr_db']:.2f} dB")
        + notes(
            [
                f"{figures['num_cases']} real volumes, encoded and decoded; means over cases, of own voxels.",
                "Data range 1. MS-SSIM has as many scales as a volume holds, a dash where that is fewer than two.",
            ]
        )
    )


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a model card says of it."""
    psnr = with_interval(figures["psnr_db"], figures["psnr_db_interval"], 2)
    return (
        f"The autoencoder alone reconstructs {figures['num_cases']} real volumes with a PSNR of {psnr} dB and an SSIM "
        f"of {number(figures['ssim'], 3)}."
    )
