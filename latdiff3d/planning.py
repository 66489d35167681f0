"""Says before a run whether both stages fit a machine's memory, and which settings make them fit."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latdiff3d import config, devices
from latdiff3d.errors import InputError
from latdiff3d.networks import downsampling
from latdiff3d.simulated_memory import Need, quietly, simulate

TITLES = {"autoencoder": "stage 1, autoencoder", "diffusion": "stage 2, diffusion"}
GB = 1e9
# What a process holds beside its tensors: Python, PyTorch and MONAI (measured: 0.56 GB); CUDA's context and cuDNN (not
# measured, and other on each card and driver).
COLUMN = 90  # characters of the table's first
OUTSIDE = {"cpu": 0.6 * GB, "cuda": 0.7 * GB}


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        kind: "cpu" or "cuda".
        memory: bytes.
        multiplies_bf16: whether bfloat16 saves it time.
    """

    kind: str
    memory: float
    multiplies_bf16: bool

    @property
    def for_tensors(self) -> float:
        """Bytes that are left for tensors."""
        return self.memory - OUTSIDE[self.kind]

    def fits(self, need: Need) -> bool:
        """Say whether a process with this need fits."""
        return need.total <= self.for_tensors


@dataclass(frozen=True)
class Plan:
    """A stage with some settings changed from its configuration.

    Attributes:
        stage: a key of `TITLES`.
        changes: settings, as they would be given on the command line; none: as configured.
        need: of one process.
        fits: the machine.
        encode_memory_gb: what stage 2 may take to encode a whole volume by tiles, where less is left than is
            configured; else None.
    """

    stage: str
    changes: Mapping[str, Any]
    need: Need
    fits: bool
    encode_memory_gb: float | None


def machine(device: str | None, memory_gb: float | None) -> Machine:
    """Return the machine that is meant.

    Args:
        device: "cpu", "cuda" or "cuda:1"; None: the GPU that is here, or the CPU.
        memory_gb: of the card, for one that is not here; None: of the one that is.

    Raises:
        InputError: another device; none of that name here, and no `memory_gb` for it.
    """
    chosen = device or str(devices.device())
    kind, _, number = chosen.partition(":")
    if kind not in OUTSIDE or (number and (kind == "cpu" or not number.isdigit())):
        raise InputError(f"--device is {device!r}; expected cpu, cuda or a GPU by its number, such as cuda:1.")
    if memory_gb is not None and not memory_gb > 0:
        raise InputError(f"the device's memory is {memory_gb:g} GB; expected more than 0, such as 24.")
    is_here = kind == "cpu" or int(number or 0) < torch.cuda.device_count()
    if not is_here and memory_gb is None:
        raise InputError(f"there is no {chosen} here; give the card's memory in GB, such as --memory 24.")
    at_hand = torch.device(chosen) if is_here else None
    multiplies_bf16 = at_hand is None or devices.fastest_precision(at_hand) == "bf16"  # all cards since 2020 do
    memory = memory_gb * GB if memory_gb is not None else _memory_of(torch.device(chosen))
    return Machine(kind, memory, multiplies_bf16)


def plans(overlays: Sequence[str | Path], settings: Mapping[str, Any], on: Machine) -> Iterator[Plan]:
    """Yield each stage's plan as configured and, where that does not fit, with more and more changes until it does.

    In this order, what costs least first: `use_checkpoint`; `precision`, where the machine multiplies bfloat16; smaller
    batches, as many of them to an update as make it the same; a smaller crop. What saves nothing is passed over.

    Args:
        overlays: YAML files; one that names a stage counts for that one.
        settings: which win over them; each counts for the stages that know it.
        on: the machine.

    Raises:
        InputError: for a configuration that cannot train; for a setting that no stage knows.
    """
    for stage, (files, known) in _by_stage(overlays, settings).items():
        with quietly():
            parser = config.training_workflow(files, known, stage).parser
        if parser["precision"] == config.merged(_bundle_files(files, stage))["precision"]:  # what the device is best at
            known = {**known, "precision": "bf16" if on.multiplies_bf16 else "fp32"}
        planned = partial(_planned, stage, files, known, on, _tile_gb(stage, parser))
        plan = planned({})
        yield plan
        for change in _changes(parser, known, on):
            if plan.fits or plan.need.kept > on.for_tensors:
                break
            try:
                changed = planned({**plan.changes, **change})
            except InputError:  # a crop too small for the discriminator, or for the downsampling
                break
            if changed.need.total < plan.need.total:
                plan = changed
                yield plan


def _planned(
    stage: str,
    overlays: Sequence[str | Path],
    settings: Mapping[str, Any],
    on: Machine,
    tile_gb: float | None,
    changes: Mapping[str, Any],
) -> Plan:
    need = simulate(stage, overlays, {**settings, **changes}, on.kind == "cuda")
    left = (on.for_tensors - need.kept) / GB
    is_enough = left <= 0 or (tile_gb is not None and tile_gb <= left)
    return Plan(stage, changes, need, on.fits(need), None if is_enough else left)


def _tile_gb(stage: str, parser: Any) -> float | None:
    """Return what encoding a whole volume may take as configured: None for all there is, 0 where none is encoded."""
    if stage != "diffusion" or parser.get_parsed_content("encode") != "cached":
        return 0
    tile_gb: float | None = parser.get_parsed_content("encode_memory_gb")
    return tile_gb


def _by_stage(
    overlays: Sequence[str | Path], settings: Mapping[str, Any]
) -> dict[str, tuple[list[str | Path], dict[str, Any]]]:
    found, unknown = {}, dict.fromkeys(settings, "")
    for stage in TITLES:
        files = [path for path in overlays if config.read_yaml(path).get("stage", stage) == stage]
        base = config.merged(_bundle_files(files, stage))
        known = {}
        for key, value in settings.items():
            joined = key.replace(".", config.SEPARATOR)
            try:
                config.refuse_unknown_keys({joined: value}, base, "the command line")
            except InputError as error:
                unknown[key] = unknown[key] or str(error)
            else:
                known[key] = value
        found[stage] = (files, known)
    for key, reason in unknown.items():
        if not any(key in known for _, known in found.values()):
            raise InputError(reason)
    return found


def _bundle_files(overlays: Sequence[str | Path], stage: str) -> list[Path]:
    named = [config.read_yaml(path).get("bundle", config.DEFAULT_BUNDLE) for path in overlays]
    return config.bundle_files(Path([config.DEFAULT_BUNDLE, *named][-1]), stage)


def _changes(parser: Any, settings: Mapping[str, Any], on: Machine) -> Iterator[dict[str, Any]]:
    if not parser.get_parsed_content("use_checkpoint"):
        yield {"use_checkpoint": True}
    if settings.get("precision", parser["precision"]) == "fp32" and on.multiplies_bf16:
        yield {"precision": "bf16"}
    size, group = parser.get_parsed_content("batch_size"), parser.get_parsed_content("accumulate_grad_batches")
    while size % 2 == 0:
        size, group = size // 2, group * 2
        yield {"batch_size": size, "accumulate_grad_batches": group}
    multiple = downsampling(parser.get_parsed_content("autoencoder"))
    multiple *= downsampling(parser.get_parsed_content("denoiser_def"))  # stage 2 follows, on the same crops
    crop = list(parser.get_parsed_content("crop_to"))
    while max(crop) > multiple:
        crop = [max(multiple, length // 2 // multiple * multiple) for length in crop]
        yield {"crop_to": crop}


def _memory_of(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def report(found: Sequence[Plan], on: Machine) -> str:
    """Return the plans of all stages as a table, and what follows from it.

    Args:
        found: as `plans` yields them.
        on: the machine.
    """
    name = {"cpu": "CPU", "cuda": "GPU"}[on.kind]
    outside = OUTSIDE[on.kind] / GB
    lines = [
        f"Memory of one process in training, in GB, on a {name} with {on.memory / GB:.1f}",
        f"{'':{COLUMN}}{'kept':>8}{'a step':>8}{'in all':>8}",
    ]
    for plan in found:
        title = f"  {_words(plan.changes)}" if plan.changes else TITLES[plan.stage]
        kept, step, total = (part / GB for part in (plan.need.kept, plan.need.step, plan.need.total))
        verdict = "fits" if plan.fits else "too much"
        lines.append(f"{title:{COLUMN}}{kept:8.2f}{step:8.2f}{total + outside:8.2f}  {verdict}")
    for plan in {plan.stage: plan for plan in found}.values():
        if not plan.fits:
            lines.append(f"No setting tried lets {TITLES[plan.stage]} fit; its networks must be smaller.")
        if plan.encode_memory_gb is not None:
            left = f"{plan.encode_memory_gb:.1g}"
            lines.append(f"To encode whole volumes by tiles in what is left: encode_memory_gb={left}")
    counted = {
        "cpu": "Python and PyTorch. Cached cases come on top (cache_rate).",
        "cuda": "CUDA and cuDNN, which differ by card; their workspaces come on top.",
    }
    return "\n".join([*lines, f"In all: with {outside:.1f} GB for {counted[on.kind]}"])


def _words(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in changes.items())
