"""What can be told of a bundle's folder without running anything in it: files, hashes, versions, code, places."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from latdiff3d import checkpoints, config, exported

CHECKSUMS = "SHA256SUMS"
SCHEMA = config.REPOSITORY / "bundles" / "metadata_schema.json"
REQUIRED = (
    exported.METADATA, "configs/metadata_autoencoder.json", "configs/logging.conf", exported.COMMON,
    "configs/train_autoencoder.yaml", "configs/train_diffusion.yaml", "configs/inference.yaml",
    "configs/evaluate.yaml", "docs/README.md", "docs/data_license.txt", "LICENSE",
)  # fmt: skip
OF_THE_HUB = ("README.md", ".gitattributes")  # what MONAI and the hub lay beside a bundle's files
TEXTS = (".yaml", ".yml", ".json", ".md", ".txt", ".conf")
# Of one machine: a folder of the kind that users have, a home, a drive.
PLACE = re.compile(
    r"""(?:^|[\s'"=(\[])((?:/(?:home|root|tmp|Users|mnt|data|work|scratch|opt|var)/|~/|[A-Za-z]:\\)[^\s'"]+)"""
)
CARD = ("# Model Overview", "## Data", "## Performance", "## MONAI Bundle Commands", "# License")


def problems(bundle: Path) -> dict[str, list[str]]:
    """Return what is wrong with a bundle's folder, by the name of the check; an empty list: nothing."""
    metadata = _metadata(bundle)
    return {
        "files": [f"there is no {file}" for file in REQUIRED if not (bundle / file).is_file()],
        "model card": _card(bundle),
        "weights without pickled code": list(_pickles(bundle)),
        "hashes": list(_hashes(bundle)),
        "no absolute paths": list(_places(bundle)),
        "sizes": list(_sizes(bundle)),
        "version and changelog": _versions(metadata),
    }


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file in `folder` as `sha256sum --check SHA256SUMS` reads them."""
    files = [file for file in _files(folder) if file.name != CHECKSUMS]
    lines = [f"{checkpoints.sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines))


def has_weights(bundle: Path) -> bool:
    """Say whether a bundle holds the weights of both stages."""
    return all((bundle / file).is_file() for file, _, _ in exported.WEIGHTS.values())


def _metadata(bundle: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((bundle / exported.METADATA).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _versions(metadata: Mapping[str, Any]) -> list[str]:
    version, changelog = metadata.get("version"), metadata.get("changelog", {})
    if version is None:
        return [f"{exported.METADATA} has no version"]
    return [] if version in changelog else [f"the changelog has no entry for version {version}"]


def _card(bundle: Path) -> list[str]:
    file = bundle / "docs" / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    missing = [
        f"docs/README.md has no section '{heading}'" for heading in CARD if f"\n{heading}\n" not in f"\n{text}\n"
    ]
    pictures = re.findall(r"!\[[^\]]*\]\(\./([^)]+)\)", text)
    return missing + [f"docs/README.md shows {name}, which is not there" for name in pictures if not _at(file, name)]


def _at(file: Path, name: str) -> bool:
    return (file.parent / name).is_file()


def _pickles(bundle: Path) -> Iterator[str]:
    for file in _files(bundle):
        if file.suffix in (".pkl", ".pickle", ".pth", ".ckpt", ".joblib"):
            yield f"{file.relative_to(bundle)} may hold pickled code"
        elif file.suffix == ".pt":
            try:
                weights = checkpoints.read(file)
            except checkpoints.UNREADABLE as error:
                yield f"{file.relative_to(bundle)}: {str(error).splitlines()[0]}"
                continue
            if not isinstance(weights, dict) or not all(isinstance(part, torch.Tensor) for part in weights.values()):
                yield f"{file.relative_to(bundle)} holds more than tensors by name"


def _hashes(bundle: Path) -> Iterator[str]:
    """Compare with SHA256SUMS; a bundle without weights, from which none was exported, needs none."""
    sums = bundle / CHECKSUMS
    if not sums.is_file():
        if has_weights(bundle):
            yield f"there is no {CHECKSUMS}"
        return
    lines = (line.split("  ", 1) for line in sums.read_text().splitlines())
    listed = {name: digest for digest, name in lines}
    for name, expected in listed.items():
        if not (bundle / name).is_file():
            yield f"{name} is in {CHECKSUMS}, and not there"
        elif checkpoints.sha256(bundle / name) != expected:
            yield f"{name} is not what {CHECKSUMS} says"
    for file in _files(bundle):
        if (name := file.relative_to(bundle).as_posix()) not in (*listed, *OF_THE_HUB, CHECKSUMS):
            yield f"{name} is not in {CHECKSUMS}"


def _places(bundle: Path) -> Iterator[str]:
    for file in _files(bundle):
        if file.suffix in TEXTS:
            for place in PLACE.findall(file.read_text(encoding="utf-8")):
                yield f"{file.relative_to(bundle)} names {place}"


def _sizes(bundle: Path) -> Iterator[str]:
    """Empty files; and large ones that no list of large files names."""
    for file in _files(bundle):
        if file.stat().st_size == 0 and file.name != "__init__.py":
            yield f"{file.relative_to(bundle)} is empty"
    large = bundle / "large_files.yml"
    for entry in config.read_yaml(large).get("large_files") or [] if large.is_file() else []:
        if not {"path", "url", "hash_val", "hash_type"} <= set(entry):
            yield f"large_files.yml: {entry} lacks path, url, hash_val or hash_type"


def _files(bundle: Path) -> list[Path]:
    return sorted(file for file in bundle.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
