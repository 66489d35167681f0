"""Is a model any good? All sections of an evaluation, each computed once, on one page, in one JSON and in a paragraph.

A section is a module of its own with three functions:

    measure(plain inputs) -> (figures, pictures)    figures: a dict as JSON has it, None for what is undefined;
                                                    pictures: PNG bytes by name
    render(figures, pictures) -> HTML
    sentence(figures) -> what a model card says of it, plain text

and an entry in `SECTIONS`, whose `measure` takes an `Evidence` and hands the module its plain inputs: `evidence.reals`,
`evidence.training`, `evidence.made(sample, case)`, `evidence.features[network]`. Its outcome is kept, pictures too, in
`DIR/figures/<name>.json` under a hash of the evidence (`Evidence.key`) and of the code of this module and of the
section's, and is taken from there by the next run. `render` and `sentence` see nothing else.
"""

import base64
import html
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from latdiff3d import (
    __version__,
    checkpoints,
    codec_fidelity,
    diversity,
    fingerprints,
    mask_fidelity,
    memorisation,
    realism,
    runs,
    usefulness,
    whole_files,
)
from latdiff3d.copy_search import spaces_for
from latdiff3d.errors import InputError
from latdiff3d.evaluation_files import CARD, FIGURES, LEFT_OUT, PAGE
from latdiff3d.evidence import SETTINGS, Evidence, judge_of
from latdiff3d.features import pretrained_network, segmenter_network
from latdiff3d.fidelity import own_voxels
from latdiff3d.handlers import progress_bar
from latdiff3d.html_page import page
from latdiff3d.latent_entries import all_flips
from latdiff3d.mask_fidelity import segmented
from latdiff3d.nearest import NamedVolume
from latdiff3d.plain_figures import finite, write_json
from latdiff3d.quality_pictures import outlined_png
from latdiff3d.synthesis import Model

NUM_SHOWN = 3  # cases, real and synthetic

Figures = dict[str, Any]
Pictures = dict[str, bytes]


@dataclass(frozen=True)
class Section:
    """A part of an evaluation.

    Attributes:
        title: of its heading.
        module: that has its `render` and `sentence`; its name is the section's.
        measure: see this module's docstring.
        needs_masks: it says nothing of a model without masks.
    """

    title: str
    module: ModuleType
    measure: Callable[[Evidence], tuple[Figures, Pictures]]
    needs_masks: bool = False

    @property
    def name(self) -> str:
        """Return what its files, and its figures in the JSON, are called."""
        return self.module.__name__.rpartition(".")[2]


# The sections


def _codec_fidelity(evidence: Evidence) -> tuple[Figures, Pictures]:
    return codec_fidelity.measure(_reconstructions(evidence), evidence.model.modalities, _class_names(evidence.model))


def _realism(evidence: Evidence) -> tuple[Figures, Pictures]:
    reals, cases, samples = evidence.reals, range(len(evidence.cases)), range(evidence.num_samples)

    def shown(sample: int, case: int) -> np.ndarray:
        return evidence.made(sample, case)[own_voxels(evidence.made_own(case))]

    examples = [
        pair
        for case in cases[:NUM_SHOWN]
        for pair in ((f"real {case}", reals[case].image[own_voxels(reals[case].own)]), ("synthetic", shown(0, case)))
    ]
    return realism.measure(
        evidence.features,
        [realism.profile(real.image[own_voxels(real.own)]) for real in _seen(reals, "real volumes")],
        [[realism.profile(shown(sample, case)) for case in cases] for sample in _seen(samples, "samples")],
        [realism.profile(real.image[own_voxels(real.own)]) for real in _seen(evidence.training, "training volumes")],
        evidence.model.modalities,
        examples,
        evidence.seed,
    )


def _diversity(evidence: Evidence) -> tuple[Figures, Pictures]:
    return diversity.measure(
        lambda case: evidence.reals[case].image,
        evidence.made,
        evidence.made_own,
        len(evidence.cases),
        evidence.num_samples,
    )


def _mask_fidelity(evidence: Evidence) -> tuple[Figures, Pictures]:
    judge, samples = evidence.judge, range(evidence.num_samples)
    assert judge is not None
    of_real, masks, own, spacing_mm = [], [], [], []
    for real in _seen(evidence.reals, "real volumes"):
        of_real.append(segmented(judge, torch.as_tensor(real.image)))
        masks.append(torch.as_tensor(real.mask).float())
        own.append(torch.as_tensor(real.own))
        spacing_mm.append(real.spacing_mm)
    of_made = [
        [segmented(judge, torch.as_tensor(evidence.made(sample, case))) for case in range(len(masks))]
        for sample in _seen(samples, "samples")
    ]
    title, modalities = f"SYNTHETIC  {evidence.jobs[0].name}", evidence.model.modalities
    picture = outlined_png(evidence.made(0, 0), masks[0][0].numpy(), modalities, spacing_mm[0], title)
    return mask_fidelity.measure(of_made, of_real, masks, own, spacing_mm, evidence.model.class_names, picture)


def memorisation_of(evidence: Evidence) -> tuple[Figures, Pictures]:
    """Return what `memorisation.measure` does of all samples, the split's real volumes and all training volumes."""
    model, codec, num = evidence.model, evidence.model.synthesizer.codec, evidence.num_samples
    training = evidence.all_training
    if why := _why_no_audit(evidence, len(training)):
        return {LEFT_OUT: why}, {}
    made = [
        NamedVolume(job.name, evidence.made(number % num, number // num), evidence.made_own(number // num))
        for number, job in enumerate(evidence.jobs)
    ]
    spaces = spaces_for(model.crop_to, codec, evidence.judge)
    flips = all_flips(sorted({memorisation.LEFT_RIGHT, *model.config.get().get("flips", [])}))
    return memorisation.measure(made, evidence.reals, training, spaces, flips, codec)


def _why_no_audit(evidence: Evidence, num_training: int) -> str | None:
    num_held_out = len(evidence.cases)
    if evidence.given["split"] == "train":
        return "no real volume of --split train is held out, to tell how near chance leads"
    if num_held_out < memorisation.MIN_HELD_OUT:
        return f"{num_held_out} held-out cases do not tell how near chance leads; {memorisation.MIN_HELD_OUT} do"
    if num_training < memorisation.MIN_TRAINING:
        return f"{num_training} training cases at hand are too few; {memorisation.MIN_TRAINING} are needed"
    return None


def _usefulness_of(segmenter: str | Path | None) -> Callable[[Evidence], tuple[Figures, Pictures]]:
    """Return how usefulness is measured, by segmenters trained as `segmenter` was."""

    def measure(evidence: Evidence) -> tuple[Figures, Pictures]:
        model, folder = evidence.model, evidence.folder
        assert segmenter is not None
        if evidence.given["split"] == "train":
            return {LEFT_OUT: "no real volume of --split train is held out, to test segmenters on"}, {}
        training = evidence.all_training.cases
        made = usefulness.make_synthetic(model, training, folder / "training_samples", evidence.seed)
        out = folder / "usefulness" / evidence.key  # a run of another model's samples is not gone on with
        return usefulness.measure(out, segmenter, training, made, evidence.cases, evidence.reals)

    return measure


SECTIONS: list[Section] = [
    Section("Reconstruction", codec_fidelity, _codec_fidelity),
    Section("Realism", realism, _realism),
    Section("Diversity", diversity, _diversity),
    Section("Mask fidelity", mask_fidelity, _mask_fidelity, needs_masks=True),
    Section("Memorisation", memorisation, memorisation_of),
]


def evaluate(
    model: Model,
    dataset_dir: Path,
    out: Path,
    split: str = "val",
    segmenter: str | Path | None = None,
    weights: Sequence[str] = (),
    num_samples: int = 2,
    num_training: int = 200,
    seed: int = 0,
    overlays: Sequence[Path] = (),
    train_on_samples: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on a split and write `evaluation.html`, `evaluation.json` and `model_card.md` into `out`.

    What an earlier or interrupted call has made there of the same things is kept; the figures are then the same.

    Args:
        model: from `Model.load`.
        dataset_dir: the data set's folder.
        out: the evaluation's.
        split: train, val or test.
        segmenter: the judge's run; None: `out/segmenter`, trained there if it is missing, for a model with masks.
        weights: of published networks, see `features.pretrained_network`.
        num_samples: volumes for each mask.
        num_training: so many training volumes at most are looked at.
        seed: of all that is drawn.
        overlays: configuration of a segmenter that is trained here.
        train_on_samples: measure usefulness too, which trains nine segmenters; see usefulness.py.

    Returns:
        what the JSON holds.

    Raises:
        InputError: for a user's mistake; see `Evidence.gathered` and `judge_of`.
    """
    if num_samples < 1 or seed < 0 or num_training < 0:
        raise InputError(
            f"{num_samples} volumes a mask, {num_training} training volumes, seed {seed}; expected 1, 0 and 0 at least."
        )
    device = model.synthesizer.device
    networks = [pretrained_network(one, device) for one in weights]
    place = segmenter or _own_segmenter(model, dataset_dir, out, overlays)
    judge = judge_of(model, place) if place else None
    if judge is not None and place:
        networks.insert(0, segmenter_network(judge, place, device))
    evidence = Evidence.gathered(out, model, dataset_dir, split, judge, networks, num_samples, num_training, seed)
    asked = [Section("Usefulness", usefulness, _usefulness_of(place), needs_masks=True)] if train_on_samples else []
    sections = [*SECTIONS, *asked]
    outcomes = {section.name: _outcome(section, evidence) for section in sections}
    told = {
        "latdiff3d": __version__,
        "model": checkpoints.sha256(model.path),
        "segmenter": checkpoints.sha256(checkpoints.find(place)) if place else None,
        "split": split,
        "num_cases": len(evidence.cases),
        "num_left_out": evidence.num_left_out,
        "num_samples": num_samples,
        "num_training": len(evidence.training),
        "seed": seed,
        "sections": {name: figures for name, (figures, _) in outcomes.items()},
    }
    write_json(out / FIGURES, told)
    whole_files.write(out / CARD, _card(evidence, sections, outcomes))
    whole_files.write(out / PAGE, _page(evidence, sections, outcomes))
    return told


def _own_segmenter(model: Model, dataset_dir: Path, out: Path, overlays: Sequence[Path]) -> Path | None:
    """Return the run of the evaluation's own segmenter, trained first if need be; None for a model without masks."""
    if not model.is_conditional:
        return None
    run = out / "segmenter"
    if not (run / checkpoints.FOLDER / "best.pt").is_file():
        print(f"training a segmenter for evaluation in {run}, which --segmenter RUN would spare", flush=True)
        named = {"dataset_dir": str(dataset_dir), "run_dir": str(run), "purpose": "evaluation"}
        runs.start(overlays, [], {**_data_settings(model), **named}, "segmenter")
    return run


def _data_settings(model: Model) -> dict[str, Any]:
    """Return how the model's configuration reads data, for a segmenter of the same."""
    own = model.config.get()
    read = ("layout", "split_dir", "val_fraction", "patient_pattern", "num_fine_cases", "crop_to", "flips", "seed")
    return {key: own[key] for key in (*SETTINGS, *read) if key in own and own[key] != "@dataset_dir"}


def _outcome(section: Section, evidence: Evidence) -> tuple[Figures, Pictures]:
    """Return a section's figures and pictures, measured now or found from before."""
    if section.needs_masks and not evidence.model.is_conditional:
        return {LEFT_OUT: "an unconditional model has no masks to follow"}, {}
    folder = evidence.folder / "figures"
    key = fingerprints.of([evidence.key, section.measure, section.module.measure])
    file = folder / f"{section.name}.json"
    found = _found(file, key)
    if found is not None:
        return found
    begun = time.perf_counter()
    print(f"[{section.title}]", flush=True)
    figures, pictures = section.measure(evidence)
    encoded = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    write_json(file, {"key": key, "figures": finite(figures), "pictures": encoded})
    print(f"[{section.title}: {time.perf_counter() - begun:.1f} s]", flush=True)
    again = _found(file, key)
    assert again is not None
    return again


def _found(file: Path, key: str) -> tuple[Figures, Pictures] | None:
    try:
        content = json.loads(file.read_text())
        if content["key"] != key:
            return None
        return content["figures"], {name: base64.b64decode(png) for name, png in content["pictures"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # absent, cut, or of another version
        return None


def _reconstructions(evidence: Evidence) -> Iterator[codec_fidelity.Pair]:
    codec = evidence.model.synthesizer.codec
    for real in progress_bar(evidence.reals, desc="reconstructing", unit="volume"):
        image = torch.as_tensor(real.image)[None].to(evidence.model.synthesizer.device)
        own = own_voxels(real.own)
        reconstruction = codec.reconstruct(image)[0].clamp(0, 1).cpu().numpy()
        mask = None if real.mask is None else real.mask[own]
        yield codec_fidelity.Pair(real.name, real.image[own], reconstruction[own], mask)


def _seen(things: Any, what: str) -> Any:
    return progress_bar(things, desc=f"looking at {what}", leave=False)


def _class_names(model: Model) -> list[str]:
    return model.class_names if model.is_conditional else []


def _page(evidence: Evidence, sections: Sequence[Section], outcomes: Mapping[str, tuple[Figures, Pictures]]) -> str:
    parts = []
    for section in sections:
        figures, pictures = outcomes[section.name]
        why = figures.get(LEFT_OUT)
        content = f"<p>Not measured: {html.escape(why)}.</p>" if why else section.module.render(figures, pictures)
        parts.append((section.title, content))
    title = f"Evaluation of {evidence.model.path}"
    return page(title, title, html.escape(_lead(evidence)), parts)


def _card(evidence: Evidence, sections: Sequence[Section], outcomes: Mapping[str, tuple[Figures, Pictures]]) -> str:
    """Return the paragraph for a model card."""
    sentences = []
    for section in sections:
        figures, _ = outcomes[section.name]
        why = figures.get(LEFT_OUT)
        sentences.append(f"{section.title} was not measured: {why}." if why else section.module.sentence(figures))
    return " ".join([_lead(evidence), *sentences]) + "\n"


def _lead(evidence: Evidence) -> str:
    cases = f"{len(evidence.cases)} {evidence.given['split']} cases"
    beside = (
        f"{evidence.num_samples} for each of {cases}, beside the real ones"
        if evidence.model.is_conditional
        else f"beside the real ones of {cases}"
    )
    if evidence.num_left_out:
        beside += f" ({evidence.num_left_out} more left out, whose masks cannot be used)"
    return (
        f"{len(evidence.jobs)} synthetic volumes, {beside} and {len(evidence.training)} training volumes, from seed "
        f"{evidence.seed}; intervals are of 95 %, by bootstrap over cases."
    )
