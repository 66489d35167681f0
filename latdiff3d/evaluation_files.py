"""What `latdiff3d evaluate` writes, and how an exported bundle takes it in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latdiff3d.errors import InputError

PAGE, FIGURES, CARD = "evaluation.html", "evaluation.json", "model_card.md"
LEFT_OUT = "left_out"  # the one figure of a section that was not measured: why
MEMORISATION, JUDGE = "memorisation", "segmenter"  # the section; the network that the judge is among realism's


@dataclass(frozen=True)
class Evaluated:
    """A model's evaluation.

    Attributes:
        sections: their figures, by name.
        paragraph: of the model card.
    """

    sections: Mapping[str, Any]
    paragraph: str

    def figures(self) -> dict[str, float]:
        """Return those that lead, by name; what was not measured is left out."""
        realism, of_masks = self.sections["realism"], self.sections["mask_fidelity"]
        found = {"samples_spectrum_ratio": realism["spectrum"]["ratio"]}
        if JUDGE in realism["networks"]:  # not for a model without masks, unless one was named
            found["samples_mmd_segmenter"] = realism["networks"][JUDGE]["mmd"]["value"]
        if LEFT_OUT not in of_masks:
            found["samples_mask_fidelity"] = of_masks["normalised"]["value"]
        if self.says_of_memorisation:
            flagged = self.sections[MEMORISATION]["any"]
            found["samples_flagged_as_memorised"] = flagged["share"]
            found["held_out_flagged_as_memorised"] = flagged["held_out_share"]
        return {name: value for name, value in found.items() if value is not None}

    @property
    def says_of_memorisation(self) -> bool:
        """Say whether memorisation was measured."""
        return LEFT_OUT not in self.sections[MEMORISATION]


def read(folder: str | Path, model_sha256: str) -> Evaluated:
    """Return the evaluation that `latdiff3d evaluate --out folder` wrote.

    Args:
        folder: it.
        model_sha256: of the checkpoint that it must be of.

    Raises:
        InputError: no evaluation there, one of another model, or one on its training cases, which flatters it.
    """
    place = Path(folder)
    try:
        told, paragraph = json.loads((place / FIGURES).read_text()), (place / CARD).read_text()
    except (OSError, ValueError):
        raise InputError(
            f"{place} holds no {FIGURES} with its {CARD}; expected the folder that latdiff3d evaluate --out wrote."
        ) from None
    if told.get("model") != model_sha256:
        raise InputError(f"{place} evaluates another model; run latdiff3d evaluate for the one that is exported.")
    if told["split"] == "train":
        raise InputError(f"{place} evaluates on training cases; run latdiff3d evaluate with --split val or test.")
    return Evaluated(told["sections"], paragraph.strip())
