"""A bundle's configuration, overlays and command-line settings become one workflow; unknown keys are refused.

MONAI adds a misspelt key silently, and lets a dict without its `_target_` replace one with it. Both are refused here.
A dict with another `_target_` replaces a component with all its arguments.
"""

import difflib
import inspect
import pydoc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow

from latdiff3d.errors import InputError
from latdiff3d.settings import is_expression

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_BUNDLE = REPOSITORY / "bundles" / "brats_mask_ldm"
CONFIG_FOLDER = REPOSITORY / "configs"
COMMON = "common.yaml"
OVERLAY = "overlay.yaml"  # in a bundle that shares another one's files: what differs
STAGE_FILES = {
    "autoencoder": "train_autoencoder.yaml",
    "diffusion": "train_diffusion.yaml",
    "segmenter": "train_segmenter.yaml",
}
# Read here and not by MONAI: which bundle and which stage an overlay belongs to.
SELECTORS = ("bundle", "stage")
SEPARATOR = "::"


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as the number it is; YAML 1.1 asks for 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def training_workflow(
    overlays: Sequence[str | Path], settings: Mapping[str, Any], stage: str | None = None
) -> ConfigWorkflow:
    """Return MONAI's workflow for a training stage, initialised.

    Args:
        overlays: YAML files, later ones win; each holds what differs from the bundle, and may name `bundle` and
            `stage`.
        settings: `key: value` from the command line, which win over all files; nested keys are joined by `::` or `.`.
        stage: a key of `STAGE_FILES`, if not named in an overlay or in `settings`.

    Raises:
        InputError: a missing or unreadable file, an unknown key, no stage.
    """
    chosen = [(str(path), read_yaml(path)) for path in overlays]
    chosen.append(("the command line", {key.replace(".", SEPARATOR): value for key, value in settings.items()}))
    selectors: dict[str, Any] = {"bundle": str(DEFAULT_BUNDLE), **({"stage": stage} if stage else {})}
    for _, content in chosen:
        selectors |= {key: content.pop(key) for key in SELECTORS if key in content}
    if selectors.get("stage") not in STAGE_FILES:
        raise InputError(
            f"stage is {selectors.get('stage')!r}; expected 'autoencoder', 'diffusion' or 'segmenter'. Name it in an "
            "overlay, as configs/autoencoder.yaml does, or on the command line: stage=autoencoder."
        )
    if stage and selectors["stage"] != stage:
        raise InputError(f"the configuration is of stage '{selectors['stage']}'; the command trains '{stage}'.")

    files = bundle_files(Path(selectors["bundle"]), selectors["stage"])
    base = ConfigParser(merged(files))
    overrides: dict[str, Any] = {}
    for source, content in chosen:
        refuse_unknown_keys(content, base.get(), source)
        changes = flat(content, base.get())
        base.update(changes)  # the arguments of a component that was replaced are known from here on
        # MONAI applies them in this order, and a later file must win against one that replaced the whole component.
        overrides = {key: value for key, value in overrides.items() if key not in changes} | changes
    root = files[0].parent.parent
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=[str(file) for file in files],
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=str(root / "configs" / "logging.conf"),
        run_id="training",
        **({"bundle_root": str(root)} | overrides),
    )
    workflow.initialize()
    return workflow


def bundle_files(bundle: Path, stage: str) -> list[Path]:
    """Return the bundle's files that configure `stage`, the common one first and its overlay, if it has one, last.

    Raises:
        InputError: when `bundle` is no such folder.
    """
    files = [bundle / "configs" / COMMON, bundle / "configs" / STAGE_FILES[stage]]
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no {file}; expected `bundle` to name a bundle's folder.")
    overlay = bundle / "configs" / OVERLAY
    return [*files, overlay] if overlay.is_file() else files


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a YAML file's mapping.

    Raises:
        InputError: missing, or not a mapping of settings' names.
    """
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}; give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected `key: value` lines.")
    for key in content or {}:
        if not isinstance(key, str):
            raise InputError(
                f"{path} has the key {key!r}, a {type(key).__name__}; expected a setting's name, as in max_epochs: 20."
            )
    return content or {}


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return `key=value` words as a dict, the values read as YAML.

    Raises:
        InputError: for a word without `=`.
    """
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise InputError(f"{setting!r} is not a setting; expected key=value, such as max_epochs=20.")
        try:
            parsed[key] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise InputError(f"the value of {setting!r} is not YAML; quote it, or write it on one line.") from None
    return parsed


def merged(files: Iterable[str | Path]) -> dict[str, Any]:
    """Return the configuration of several files as MONAI merges them, later files winning per key."""
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    config = dict(parser.get())
    config.pop("_meta_", None)
    return config


def refuse_unknown_keys(content: Mapping[str, Any], base: Mapping[str, Any], source: str) -> None:
    """Refuse a key that `base` lacks, an argument that a new component does not take, and a plain value for either.

    Args:
        content: an overlay, its keys possibly joined by `::`.
        base: the bundle's configuration.
        source: what to call the overlay.

    Raises:
        InputError: naming the key and the nearest known one, or what was found in place of settings or components.
    """
    for joined, value in content.items():
        node = _node(base, joined, source)
        _refuse_plain_value(value, node, joined, source)
        if _changes_leaves(value, node):
            refuse_unknown_keys({f"{joined}{SEPARATOR}{key}": child for key, child in value.items()}, base, source)
        elif isinstance(value, dict) and isinstance(value.get("_target_"), str):
            _refuse_unknown_arguments(value, joined, source)


def _node(base: Mapping[str, Any], joined: str, source: str) -> Any:
    node: Any = base
    parents: list[str] = []
    for key in joined.lstrip("+").split(SEPARATOR):
        node = _child(node, key, parents, source)
        parents.append(key)
    return node


def _refuse_plain_value(value: Any, node: Any, joined: str, source: str) -> None:
    """Refuse `value` in place of settings or components, unless it is null, an expression or the like of them."""
    if isinstance(node, dict):
        expected, parts = "a mapping, or one of its settings", [key for key in node if key != "_target_"]
    elif isinstance(node, list) and any(isinstance(part, dict) for part in node):
        expected, parts = "a list of components, or a change to one", ["0"]
    else:
        return
    if value is not None and not is_expression(value) and not isinstance(value, type(node)):
        example = f", such as {joined}{SEPARATOR}{parts[0]}" if parts else ""
        raise InputError(f"{source} sets {joined} to {value!r:.80}; expected {expected}{example}.")


def _changes_leaves(value: Any, node: Any) -> bool:
    """Say whether `value` changes entries of the dict `node`, rather than takes its place."""
    if not isinstance(value, dict) or not isinstance(node, dict):
        return False
    return "_target_" not in node or value.get("_target_", node["_target_"]) == node["_target_"]


def _refuse_unknown_arguments(component: Mapping[str, Any], joined: str, source: str) -> None:
    target = component["_target_"]
    if target[:1] in ("$", "@", "%"):
        return
    found = pydoc.locate(ConfigComponent(component).resolve_module_name())
    if not callable(found):
        raise InputError(
            f"{source} sets {joined}{SEPARATOR}_target_ to {target!r}, where no class or function is; expected MONAI's "
            "name of one, or its path, such as latdiff3d.quantization.VQAutoencoder."
        )
    known = _parameters(found)
    for key in component:
        if known is not None and key not in ConfigComponent.non_arg_keys:
            _child(known, str(key), [joined], source)


def _parameters(component: Callable[..., Any]) -> dict[str, None] | None:
    """Return the names of a class' or function's parameters, those it hands to its bases too; None: any."""
    names: dict[str, None] = {}
    for owner in inspect.getmro(component) if inspect.isclass(component) else [component]:
        parameters = inspect.signature(owner.__init__ if inspect.isclass(owner) else owner).parameters.values()
        names |= {p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _child(node: Any, key: str, parents: Sequence[str], source: str) -> Any:
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    known = list(node) if isinstance(node, dict) else []
    if key in known:
        return node[key]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"did you mean {SEPARATOR.join([*parents, nearest[0]])}?" if nearest else f"known here: {known[:12]}"
    raise InputError(f"{source} sets the unknown key {SEPARATOR.join([*parents, key])}; {advice}")


def flat(content: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with nested dicts as joined keys, so that a leaf changes and its siblings stay.

    A component with another `_target_` than in `base` stays whole, as does a dict in place of something else.
    """
    overrides: dict[str, Any] = {}
    for key, value in content.items():
        node = _node(base, key, "the configuration")
        if _changes_leaves(value, node) and not key.startswith("+"):
            overrides |= {f"{key}{SEPARATOR}{child}": leaf for child, leaf in flat(value, node).items()}
        else:
            overrides[key] = value
    return overrides


def calling_parser() -> ConfigParser:
    """Return the parser of the MONAI workflow whose expression is being evaluated.

    A bundle's expressions get no handle on their own configuration, yet through every door, `python -m monai.bundle`
    included, a run must check it and keep it. The parser is found among the callers instead.

    Raises:
        RuntimeError: when no workflow is running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner.parser
        frame = frame.f_back
    raise RuntimeError("calling_parser() works in an expression of a bundle's configuration only")


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML text that reads back alike."""
    return yaml.safe_dump(dict(config), sort_keys=False, width=120, default_flow_style=None)


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the first top-level key in which two configurations differ, or None."""
    return next((key for key in [*one, *other] if one.get(key) != other.get(key)), None)
