"""A finished run becomes a self-contained MONAI bundle: configuration, weights, figures, model card and modules."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from latdiff3d import checkpoints, config, evaluation_files, exported, model_card
from latdiff3d.bundle_files import write_checksums
from latdiff3d.bundle_metadata import autoencoder_metadata, metadata_of
from latdiff3d.bundle_modules import copy_modules, modules_needed, packages_needed
from latdiff3d.datalist import SPLITS
from latdiff3d.errors import InputError
from latdiff3d.runs import NOT_OF_THE_RUN
from latdiff3d.synthesis import Model

STAGE_KEYS = ("autoencoder", "diffusion")
KINDS = "autoencoder_*.yaml"  # overlays for both stages
FIRST_STAGE = "$@bundle_root + '/models/model_autoencoder.pt'"
SPLIT_FOLDER = "splits"
# Settings that name a place on this machine; the bundle's own value takes theirs.
PLACES = ("dataset_dir", "split_dir", "first_stage", "segmenter", *NOT_OF_THE_RUN)


def export(
    run: str | Path,
    to: str | Path,
    mask: str | Path | None = None,
    splits: bool = False,
    evaluation: str | Path | None = None,
) -> list[str]:
    """Write a finished run of stage 2 as a bundle that needs nothing but monai and the packages in its metadata.

    Args:
        run: its folder, or its best checkpoint.
        to: a folder that is not there yet, or is empty.
        mask: for which the model card shows a sample; a model without masks needs none.
        splits: take the run's train.list, val.list and test.list along, which hold the names of cases.
        evaluation: the folder that `latdiff3d evaluate` wrote of this run, whose figures the bundle then names.

    Returns:
        what the bundle lacks, or has another value of, in sentences.

    Raises:
        InputError: no run, one that is not finished, a folder with something in it, a mask that cannot be used, or
            an evaluation of another model.
    """
    path = checkpoints.find(run)
    contents = {"diffusion": checkpoints.load(path, "diffusion")}
    if not contents["diffusion"]["finished"]:
        raise InputError(f"{path} is of a run that is not finished; give its training command again, which goes on.")
    if exported.is_weights_file(path):
        raise InputError(f"{path} is in a bundle that was exported already; copy the bundle, or give a run.")
    evaluated = evaluation_files.read(evaluation, checkpoints.sha256(path)) if evaluation is not None else None
    said: list[str] = []
    contents |= _first_stage(contents["diffusion"], said)
    model = Model.load(path)
    if mask is not None or not model.is_conditional:
        model.grid_of(mask)  # a mask that cannot be used is told before anything is written
    elif model.is_conditional:
        said.append("the model card shows no sample; give --mask FILE for one.")
    resolved = {stage: yaml.safe_load(content["config"]) for stage, content in contents.items()}
    source = _bundle_of(resolved["diffusion"])
    with _folder(Path(to)) as folder:
        (folder / "models").mkdir()
        for stage, (file, _, prefix) in exported.WEIGHTS.items():
            weights = contents["diffusion"]["objects"][exported.OBJECTS[stage]]
            torch.save({prefix + key: value.clone() for key, value in weights.items()}, folder / file)
        configs = _configs(source, resolved, said)
        if splits:
            _copy_splits(resolved["diffusion"], configs, folder)
        elif configs["common.yaml"]["split_dir"] != "@dataset_dir":
            said.append("its train.list and val.list stay here, for they name cases; --splits takes them along.")
        texts = {name: _as_text(name, content) for name, content in configs.items()} | _kinds(source)
        modules = modules_needed(texts.values())
        template = json.loads((source / exported.METADATA).read_text())
        metadata = metadata_of(template, model, contents, packages_needed(modules), evaluated)
        both = (metadata, autoencoder_metadata(metadata, model))
        for (_, file, _), content in zip(exported.WEIGHTS.values(), both, strict=True):
            texts[Path(file).name] = json.dumps(content, indent=4) + "\n"
        (folder / exported.CONFIGS).mkdir()
        for name, text in texts.items():
            (folder / exported.CONFIGS / name).write_text(text)
        shutil.copyfile(source / "configs" / "logging.conf", folder / "configs" / "logging.conf")
        copy_modules(modules, folder)
        for file in ("LICENSE", "docs/data_license.txt"):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        model_card.write(folder, path.parent.parent, model, metadata, mask, Path(to).name, evaluated)
        write_checksums(folder)
    return said


@contextmanager
def _folder(to: Path) -> Iterator[Path]:
    """Yield a folder that becomes `to` when all is written, and is gone if not."""
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise InputError(f"{to} is there already; give a folder that is not, or an empty one.")
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's is this user's alone
        yield temporary
        temporary.replace(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_stage(content: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    """Return the content of stage 1's checkpoint by its stage, nothing where it is not what stage 2 was trained on."""
    record = content["first_stage"]
    place = Path(record["path"])
    if not place.is_file() or checkpoints.sha256(place) != record["sha256"]:
        said.append(f"stage 1's run is not at {place} any more: its figures and its own settings are left out.")
        return {}
    return {"autoencoder": checkpoints.load(place, "autoencoder")}


def _bundle_of(resolved: Mapping[str, Any]) -> Path:
    root = Path(str(resolved["bundle_root"]))
    return root if (root / exported.COMMON).is_file() else config.DEFAULT_BUNDLE


def _configs(source: Path, resolved: Mapping[str, Any], said: list[str]) -> dict[str, dict[str, Any]]:
    """Return the bundle's files with the values of its runs, by file name, without places on this machine."""
    left_out = (config.OVERLAY, config.STAGE_FILES["segmenter"], *_kinds(source))
    files = [file for file in sorted((source / "configs").glob("*.yaml")) if file.name not in left_out]
    own = {file.name: config.read_yaml(file) for file in files}
    for stage in STAGE_KEYS:
        own[config.STAGE_FILES[stage]] = _stage_content(source / "configs", stage)
    for key in ("train", "validate"):  # which the stages' files have now, each its own
        own[config.COMMON].pop(key, None)
    for name, content in own.items():
        stage = next((stage for stage in STAGE_KEYS if name == config.STAGE_FILES[stage]), "diffusion")
        is_of_a_run = name in (config.COMMON, *(config.STAGE_FILES[stage] for stage in STAGE_KEYS))
        values = resolved.get(stage, {}) if is_of_a_run else {}
        for key in content:
            if key in values and key not in PLACES:
                content[key] = portable(values[key], content[key], key, said)
    common, diffusion = own[config.COMMON], own[config.STAGE_FILES["diffusion"]]
    if resolved["diffusion"]["split_dir"] != "@dataset_dir":
        common["split_dir"] = f"$@bundle_root + '/{SPLIT_FOLDER}'"
    common["bundle_root"] = "."
    diffusion["first_stage"] = FIRST_STAGE
    own["inference.json"] = _joined(common, own["inference.yaml"])
    return own


def _kinds(source: Path) -> dict[str, str]:
    """Return the bundle's overlays for kinds of autoencoder, as they are, by file name."""
    return {file.name: file.read_text() for file in sorted((source / "configs").glob(KINDS))}


def _stage_content(configs: Path, stage: str) -> dict[str, Any]:
    """Return what a stage's file sets, each section of common.yaml that it extends as a whole."""
    file = configs / config.STAGE_FILES[stage]
    whole = config.merged([configs / config.COMMON, file])
    sections = (key.lstrip("+").partition(config.SEPARATOR)[0] for key in config.read_yaml(file))
    return {section: whole[section] for section in dict.fromkeys(sections)}


def _joined(common: Mapping[str, Any], inference: Mapping[str, Any]) -> dict[str, Any]:
    """Return one configuration of two, as MONAI joins them: `+imports` extends a list."""
    joined = dict(common)
    for key, value in inference.items():
        joined[key.lstrip("+")] = [*joined[key[1:]], *value] if key.startswith("+") else value
    return joined


def portable(value: Any, own: Any, key: str, said: list[str]) -> Any:
    """Return a setting with the bundle's own value in the place of each absolute path."""
    if isinstance(value, dict):
        there = own if isinstance(own, dict) else {}
        return {name: portable(part, there.get(name, ""), f"{key}::{name}", said) for name, part in value.items()}
    if isinstance(value, list):
        return [portable(part, "", f"{key}::{number}", said) for number, part in enumerate(value)]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        said.append(f"{key} was a place on this machine, and is {own!r} in the bundle.")
        return own
    return value


def _copy_splits(resolved: Mapping[str, Any], configs: dict[str, dict[str, Any]], folder: Path) -> None:
    place = resolved["split_dir"]
    place = Path(str(resolved["dataset_dir"] if place == "@dataset_dir" else place))
    lists = [file for split in SPLITS if (file := place / f"{split}.list").is_file()]
    if not lists:
        raise InputError(f"{place} has no train.list or val.list to take along; leave --splits out.")
    (folder / SPLIT_FOLDER).mkdir()
    for file in lists:
        shutil.copyfile(file, folder / SPLIT_FOLDER / file.name)
    for name in (config.COMMON, "inference.json"):
        configs[name]["split_dir"] = f"$@bundle_root + '/{SPLIT_FOLDER}'"


def _as_text(name: str, content: Mapping[str, Any]) -> str:
    if name.endswith(".json"):
        return json.dumps(content, indent=4) + "\n"
    return f"# Written by latdiff3d export, with the values of the run.\n{config.as_yaml(content)}"
