"""What code an exported bundle takes with it: the modules its configuration names, theirs in turn, and packages."""

import ast
import re
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Imported where they are asked for by a setting alone; whoever sets it is told to install them.
ON_DEMAND = ("mlflow", "highdicom", "pydicom", "torchvision")
# Of the metadata, beside required_packages_version.
OWN_FIELDS = {"torch": "pytorch_version", "monai": "monai_version", "numpy": "numpy_version"}
# Named by no import: MONAI's command line needs fire, its configurations YAML, PyTorch's SummaryWriter tensorboard.
BESIDES = ("fire", "PyYAML", "tensorboard")


def modules_needed(configs: Iterable[str]) -> list[str]:
    """Return the names of this package's modules that configurations name, and of those that these import, sorted.

    Args:
        configs: their texts.
    """
    waiting = {name for text in configs for name in re.findall(r"\blatdiff3d\.(\w+)", text)} | {"__init__"}
    needed: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in needed or not (PACKAGE / f"{name}.py").is_file():
            continue
        needed.add(name)
        waiting |= {part.split(".")[1] for part in _imports(name) if part.startswith("latdiff3d.")}
    return sorted(needed)


def packages_needed(modules: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution that `modules` import, by its name; see `OWN_FIELDS`."""
    distributions = metadata.packages_distributions()
    imported = {part.split(".")[0] for name in modules for part in _imports(name)}
    imported -= {*sys.stdlib_module_names, "latdiff3d", *ON_DEMAND, *OWN_FIELDS}
    names = {distributions[name][0] for name in imported} | set(BESIDES)
    return {name: version_of(name) for name in sorted(names, key=str.lower)}


def version_of(distribution: str) -> str:
    """Return the installed version without its local part, which names a build: 2.13.0 of 2.13.0+cpu."""
    return metadata.version(distribution).split("+")[0]


def copy_modules(modules: Iterable[str], folder: Path) -> None:
    """Copy this package's `modules` into the folder `latdiff3d` of `folder`."""
    target = folder / PACKAGE.name
    target.mkdir()
    for name in modules:
        shutil.copyfile(PACKAGE / f"{name}.py", target / f"{name}.py")


def _imports(name: str) -> set[str]:
    """Return every dotted name that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found
