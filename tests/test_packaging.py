"""constraints.txt against what is installed: nothing comes in that is not pinned, at another version or unasked."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# torch's own: its wheel names them for the CUDA release it was built with, see constraints.txt
CUDA_LIBRARY = re.compile(r"nvidia-|cuda-|triton$")


def constraint_lines() -> list[str]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pinned_versions() -> dict[str, str]:
    names_and_versions = (line.split("==") for line in constraint_lines())
    return {canonicalize_name(name): version for name, version in names_and_versions}


def requirements_of(name: str, extras: set[str]) -> Iterator[Requirement]:
    """Yield what the installed distribution asks for in this environment, with these extras."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
            yield requirement


def distributions_reached_from(name: str, extras: set[str]) -> dict[str, str]:
    """Return the installed version of all that `name` with `extras` requires, directly or not."""
    versions: dict[str, str] = {}
    seen = {(name, frozenset(extras))}
    waiting = list(seen)
    while waiting:
        for requirement in requirements_of(*waiting.pop()):
            key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if key in seen or CUDA_LIBRARY.match(key[0]):
                continue
            seen.add(key)
            waiting.append(key)
            versions[key[0]] = metadata.version(key[0])
    return versions


def test_every_constraint_is_an_exact_pin() -> None:
    assert [line for line in constraint_lines() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_everything_installed_is_pinned_at_the_version_installed() -> None:
    try:
        metadata.distribution("latdiff3d")
    except metadata.PackageNotFoundError:
        pytest.skip("latdiff3d is not installed in this environment, so its pins say nothing about it: make install")
    pins = pinned_versions()
    installed = distributions_reached_from("latdiff3d", {"dev"})
    # a local part names the build, not the release: torch 2.13.0+cpu is 2.13.0
    unpinned = {name: v for name, v in installed.items() if name not in pins or Version(v).public != pins[name]}
    assert unpinned == {}
    assert {"torch", "monai", "setuptools", "pytest"} <= installed.keys()
