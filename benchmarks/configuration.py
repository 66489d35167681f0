"""How much configuration a bundle is: lines, expressions, and settings that stand in more than one of its files.

    python benchmarks/configuration.py bundles/brats_mask_ldm/configs bundles/mri_unconditional_ldm/configs
    python benchmarks/configuration.py MODEL_ZOO/models/brats_mri_generative_diffusion/configs

Files are counted as this project's YAML writer lays them out, without comments, so that JSON, which breaks every list
over lines, is compared with YAML. A link to another bundle's file counts there. Metadata are left out. The last line is
a JSON object.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latdiff3d.cli import door
from latdiff3d.config import as_yaml, read_yaml
from latdiff3d.errors import InputError

COLUMNS = ("files", "lines", "`$` expressions", "with a lambda", "the longest", "settings repeated")


def main() -> None:
    """Print a table, a line a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="a bundle's configs")
    figures = {folder.resolve().parent.name: counted(folder) for folder in parser.parse_args().folders}
    print(f"| bundle | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, numbers in figures.items():
        print(f"| {name} | {' | '.join(map(str, numbers))} |")
    print(json.dumps({name: dict(zip(COLUMNS, numbers, strict=True)) for name, numbers in figures.items()}))


def counted(folder: Path) -> tuple[int, ...]:
    """Return a folder's figures, in the order of `COLUMNS`."""
    files = [file for file in sorted(folder.glob("*")) if is_configuration(file)]
    if not files:
        raise InputError(f"{folder} holds no configuration; expected a bundle's configs folder.")
    configs = [json.loads(file.read_text()) if file.suffix == ".json" else read_yaml(file) for file in files]
    settings = [list(leaves(config)) for config in configs]
    expressions = [
        value
        for of_file in settings
        for _, value in of_file
        if isinstance(value, str) and value.startswith("$") and not value.startswith(("$import ", "$from "))
    ]
    times = Counter(setting for of_file in settings for setting in {(path, repr(value)) for path, value in of_file})
    return (
        len(files),
        sum(len(as_yaml(config).splitlines()) for config in configs),
        len(expressions),
        sum("lambda" in expression for expression in expressions),
        max(map(len, expressions), default=0),
        sum(number - 1 for number in times.values()),
    )


def is_configuration(file: Path) -> bool:
    """Say whether a file configures something that runs, and is no link to another bundle's."""
    return file.suffix in (".json", ".yaml") and not file.is_symlink() and not file.name.startswith("metadata")


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every setting with its path; a list of plain values is one."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(config, list) and any(isinstance(part, (dict, str)) for part in config):
        for number, part in enumerate(config):
            yield from leaves(part, (*path, str(number)))
    else:
        yield path, config


if __name__ == "__main__":
    door(main)
