"""What `latdiff3d evaluate` writes, and how an exported bundle takes it in."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latdiff3d.errors import InputError

PAGE, FIGURES, CARD = "evaluation.html", "evaluation.json", "model_card.md"
LEFT_OUT = "left_out"  # the one figure of a section that was not measured: why
MEMORISATION = "memorisation"  # the section
# What of the sections a bundle's metadata take in, by the name that it has there.
TAKEN: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "samples_mmd_segmenter": lambda sections: sections["realism"]["networks"]["segmenter"]["mmd"]["value"],
    "samples_spectrum_ratio": lambda sections: sections["realism"]["spectrum"]["ratio"],
    "samples_mask_fidelity": lambda sections: sections["mask_fidelity"]["normalised"]["value"],
    "samples_flagged_as_memorised": lambda sections: sections[MEMORISATION]["any"]["share"],
    "held_out_flagged_as_memorised": lambda sections: sections[MEMORISATION]["any"]["held_out_share"],
}


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
        found: dict[str, float] = {}
        for name, take in TAKEN.items():
            try:
                value = take(self.sections)
            except KeyError:  # a section that was left out, or a network that was not given
                continue
            if value is not None:
                found[name] = value
        return found

    @property
    def says_of_memorisation(self) -> bool:
        """Say whether memorisation was measured."""
        return LEFT_OUT not in self.sections.get(MEMORISATION, {LEFT_OUT: ""})


def read(folder: str | Path, model_sha256: str) -> Evaluated:
    """Return the evaluation that `latdiff3d evaluate --out folder` wrote.

    Args:
        folder: it.
        model_sha256: of the checkpoint that it must be of.

    Raises:
        InputError: no evaluation there, or one of another model.
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
    return Evaluated(told["sections"], paragraph.strip())
