"""Memorisation, a section of an evaluation: whether synthetic volumes are training patients', and if that is seen.

Synthetic volumes are flagged where they lie nearer to a training volume than chance leads real held-out ones, see
`copy_search`. Beside their share stands that of the held-out volumes themselves, each against the others, and how many
planted copies of training volumes are found.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest

from latdiff3d.codec import LatentCodec
from latdiff3d.copy_search import (
    LEVEL,
    NUM_NEIGHBOURS,
    Found,
    Search,
    Space,
    closeness,
    own_p_values,
    p_values,
    threshold,
)
from latdiff3d.errors import InputError
from latdiff3d.html_page import captioned, notes, number, table
from latdiff3d.latent_entries import Flip
from latdiff3d.nearest import Volume, flipped, moved
from latdiff3d.planted_copies import planted
from latdiff3d.quality_pictures import preview_png

MIN_HELD_OUT = 20  # so that with one of them left out, 1 / n is no more than `LEVEL`
MIN_TRAINING = 3  # one that is nearest, and others to compare with
LEFT_RIGHT = 0  # the axis along which patients are nearly their own mirror images
FLIPS: tuple[Flip, ...] = ((), (LEFT_RIGHT,))
NUM_PAIRS = 6  # that are shown
ANY = "any"  # of the spaces
AXES = ("left-right", "back-front", "down-up")


class Pair(NamedTuple):
    """A synthetic volume, moved onto the training volume that is nearest to it.

    Attributes:
        space: where it is nearest, by its p-value there.
        image: (C, D, H, W).
        nearest: of the same shape.
    """

    sample: str
    training: str
    space: str
    closeness: float
    p_value: float
    image: np.ndarray
    nearest: np.ndarray


def measure(
    samples: Sequence[Volume],
    held_out: Sequence[Volume],
    training: Sequence[Volume],
    spaces: Mapping[str, Space],
    flips: Sequence[Flip] = FLIPS,
    codec: LatentCodec | None = None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return figures of an audit, plain numbers by name, and pictures of its closest pairs; see `audit`."""
    figures, pairs = audit(samples, held_out, training, spaces, flips, codec)
    pictures = {}
    for pair in pairs:
        lines = pair.image, pair.nearest, np.abs(pair.image - pair.nearest)
        caption = f"{pair.sample} on {pair.training}, in {pair.space} space"
        pictures[f"{caption}: closeness {pair.closeness:.2f}, p = {pair.p_value:.2f}"] = preview_png(
            lines, ("synthetic", "training", "difference")
        )
    return figures, pictures


def audit(
    samples: Sequence[Volume],
    held_out: Sequence[Volume],
    training: Sequence[Volume],
    spaces: Mapping[str, Space],
    flips: Sequence[Flip] = FLIPS,
    codec: LatentCodec | None = None,
) -> tuple[dict[str, Any], list[Pair]]:
    """Say how many samples are nearer to a training volume than held-out volumes are, and which pairs are closest.

    Args:
        samples: synthetic, best made for the held-out volumes' masks, so that both have the same anatomy given.
        held_out: real, seen by no network.
        training: what the model was trained on, all of it.
        spaces: see `copy_search.spaces_for`.
        flips: see `copy_search.Search`; those that training mirrored too.
        codec: through which a part of the planted copies go, see `planted_copies.planted`.

    Returns:
        figures; and `NUM_PAIRS` pairs, those of the smallest p-value, and then closeness, first.

    Raises:
        InputError: no samples, too few held-out or training volumes, or grids that differ.
    """
    _require(samples, held_out, training)
    search = Search(training, spaces, flips)
    of_samples, of_held_out = search(samples, "samples"), search(held_out, "held-out volumes")
    null = {name: closeness(found.apart) for name, found in of_held_out.items()}
    scores = {name: closeness(found.apart) for name, found in of_samples.items()}
    flagged = {name: p_values(score, null[name]) <= LEVEL for name, score in scores.items()}
    by_chance = {name: own_p_values(values) <= LEVEL for name, values in null.items()}
    figures = {
        "num_samples": len(samples),
        "num_held_out": len(held_out),
        "num_training": len(training),
        "level": LEVEL,
        "num_neighbours": min(NUM_NEIGHBOURS, len(training) - 1),
        "flips": [list(flip) for flip in flips],
        ANY: _rates(_any(flagged), _any(by_chance)),
        "spaces": {
            name: {
                "reach_voxels": space.reach_voxels,
                "threshold": threshold(null[name]),
                "median_closeness": float(np.median(scores[name])),
                "held_out_median_closeness": float(np.median(null[name])),
                **_rates(flagged[name], by_chance[name]),
            }
            for name, space in spaces.items()
        },
        "planted": {
            kind: _copies_found(search(copies, f"copies {kind}"), null)
            for kind, copies in planted(training, flips[-1], codec).items()
        },
        "closest_held_out": _closest(held_out, training, of_held_out, null),
    }
    return figures, _pairs(samples, training, of_samples, scores, null, flips)


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the section's HTML."""
    head = [
        "flagged",
        "synthetic",
        "of n",
        "95 %",
        "held-out",
        "of n",
        "95 %",
        "closeness",
        "held-out's",
        "flagged below",
    ]
    rows = []
    for name, found in [*figures["spaces"].items(), ("in any", figures[ANY])]:
        decimals = [number(found.get(key), 3) for key in ("median_closeness", "held_out_median_closeness", "threshold")]
        is_off = found["share"] > found["held_out_interval"][1]
        rows.append(
            [
                name,
                number(100 * found["share"], 0, is_off) + " %",
                f"{found['flagged']} / {figures['num_samples']}",
                _percent(found["interval"]),
                f"{found['held_out_share']:.0%}",
                f"{found['held_out_flagged']} / {figures['num_held_out']}",
                _percent(found["held_out_interval"]),
                *decimals,
            ]
        )
    spaces = [*figures["spaces"], ANY]
    copies = [
        [
            kind,
            *(number(found[name], 0, name == ANY and found[name] < found["num"]) for name in spaces),
            str(found["num"]),
        ]
        for kind, found in figures["planted"].items()
    ]
    shown = "".join(captioned(png, caption) for caption, png in pictures.items())
    return (
        f"<p>{sentence(figures)}</p>{table(head, rows)}<p>Planted copies of training volumes that are found:</p>"
        f"{table(['copies', *spaces, 'planted'], copies)}{notes(_method(figures))}"
        f"<p>The closest pairs. They show training patients: keep this page as you keep the data.</p>{shown}"
    )


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what was found, for the model card."""
    found, copies = figures[ANY], figures["planted"].values()
    low, high = found["interval"]
    return (
        f"Memorisation: {found['flagged']} of {figures['num_samples']} synthetic volumes ({found['share']:.0%}, 95 % "
        f"interval {low:.0%} to {high:.0%}) lie nearer to one of {figures['num_training']} training volumes than "
        f"chance allows, and {found['held_out_flagged']} of {figures['num_held_out']} real held-out ones "
        f"({found['held_out_share']:.0%}); of {sum(kind['num'] for kind in copies)} planted copies, "
        f"{sum(kind[ANY] for kind in copies)} were found."
    )


def _require(samples: Sequence[Volume], held_out: Sequence[Volume], training: Sequence[Volume]) -> None:
    if not samples:
        raise InputError("there are no samples to look at; make some first: latdiff3d sample.")
    if len(held_out) < MIN_HELD_OUT:
        raise InputError(
            f"there are {len(held_out)} held-out volumes; expected {MIN_HELD_OUT} at least, which tell how near "
            "to the training volumes chance leads. Hold out more, or leave the memorisation audit out."
        )
    if len(training) < MIN_TRAINING:
        raise InputError(
            f"there are {len(training)} training volumes at hand; expected all that the model was trained on, "
            f"{MIN_TRAINING} at least. Give the data set that it was trained on, or leave the memorisation audit out."
        )
    shapes = {volume.image.shape for volumes in (samples, held_out, training) for volume in volumes}
    if len(shapes) > 1:
        raise InputError(
            f"samples, held-out and training volumes have the shapes {sorted(shapes)}; expected one grid for all, the "
            "model's."
        )


def _any(hits: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.any(list(hits.values()), axis=0)


def _rates(flagged: np.ndarray, by_chance: np.ndarray) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for prefix, hits in (("", flagged), ("held_out_", by_chance)):
        ends = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="exact")  # Clopper and Pearson 1934
        figures |= {
            f"{prefix}flagged": int(hits.sum()),
            f"{prefix}share": float(hits.mean()),
            f"{prefix}interval": [float(ends.low), float(ends.high)],
        }
    return figures


def _copies_found(found: Mapping[str, Found], null: Mapping[str, np.ndarray]) -> dict[str, int]:
    hits = {name: p_values(closeness(each.apart), null[name]) <= LEVEL for name, each in found.items()}
    of_any = _any(hits)
    return {"num": len(of_any), **{name: int(each.sum()) for name, each in hits.items()}, ANY: int(of_any.sum())}


def _closest(
    held_out: Sequence[Volume], training: Sequence[Volume], found: Mapping[str, Found], null: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return of each space the held-out volume that is closest: if it is a training patient's, the splits leak."""
    closest = {}
    for name, values in null.items():
        row = int(values.argmin())
        nearest = training[int(found[name].apart[row].argmin())].name
        closest[name] = {"held_out": held_out[row].name, "training": nearest, "closeness": float(values[row])}
    return closest


def _pairs(
    samples: Sequence[Volume],
    training: Sequence[Volume],
    found: Mapping[str, Found],
    scores: Mapping[str, np.ndarray],
    null: Mapping[str, np.ndarray],
    flips: Sequence[Flip],
) -> list[Pair]:
    p = {name: p_values(score, null[name]) for name, score in scores.items()}
    nearest_in = [min(scores, key=lambda name: (p[name][row], scores[name][row])) for row in range(len(samples))]
    ranked = sorted(range(len(samples)), key=lambda row: (p[nearest_in[row]][row], scores[nearest_in[row]][row]))
    pairs = []
    for row in ranked[:NUM_PAIRS]:
        space, sample = nearest_in[row], samples[row]
        column = int(found[space].apart[row].argmin())
        image = flipped(torch.as_tensor(sample.image), flips[found[space].flip[row, column]])
        onto = moved(image, found[space].shift[row, column]).numpy()
        close, unlikely = float(scores[space][row]), float(p[space][row])
        pairs.append(Pair(sample.name, training[column].name, space, close, unlikely, onto, training[column].image))
    return pairs


def _percent(interval: Sequence[float]) -> str:
    return f"{interval[0]:.0%} to {interval[1]:.0%}"


def _method(figures: Mapping[str, Any]) -> list[str]:
    mirrored = [" and ".join(AXES[axis] for axis in flip) for flip in figures["flips"] if flip]
    reach = ", ".join(f"{space['reach_voxels']} voxels in {name}" for name, space in figures["spaces"].items())
    leak = "; ".join(
        f"{found['held_out']} on {found['training']}, {found['closeness']:.2f} in {name}"
        for name, found in figures["closest_held_out"].items()
    )
    return [
        f"A volume's closeness is its distance to the nearest training volume over the mean one to the next "
        f"{figures['num_neighbours']}: 0 for a copy, 1 for what is as near to all. Medians are shown.",
        f"A volume is flagged where its p-value among the held-out ones is at most {figures['level']:g}; each held-out "
        "volume is judged by the others. In any of several spaces, chance flags more of both.",
        f"Each volume is also mirrored ({', '.join(mirrored) or 'along no axis'}) and shifted along each axis by up to "
        f"{reach}. An image is compared by its correlation on a coarse grid, latents by theirs on their own, features "
        "of the segmenter's encoder by their distance in units of their spread.",
        f"The held-out volumes that are closest, which should be no training patients': {leak}.",
    ]
