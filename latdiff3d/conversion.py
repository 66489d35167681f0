"""A foreign configuration becomes an overlay of ours: the ledger that says of each of its keys where it went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from latdiff3d.config import SEPARATOR
from latdiff3d.errors import InputError

CARRIED, SAME, LEFT = "carried", "as here", "not carried"
WIDTH = 38  # of the column of keys; longer ones push the rest aside


@dataclass(frozen=True)
class Fate:
    """What became of one key.

    Attributes:
        kind: `CARRIED`, `SAME` (ours does that by itself) or `LEFT`.
        ours: the settings that hold it, of a carried one.
        said: why, or what to know.
    """

    kind: str
    ours: Mapping[str, Any]
    said: str


@dataclass
class Setting:
    """One setting of the overlay: its value, and where that comes from."""

    value: Any
    origin: str


@dataclass
class Ledger:
    """The keys of a foreign configuration, each to be accounted for once, and the overlay that they become.

    Args:
        leaves: of the foreign configuration by their joined keys, see `leaves_of`.
        prefix: of the keys that this ledger, a part of the whole one, speaks of.
    """

    leaves: Mapping[str, Any]
    prefix: str = ""
    fates: dict[str, Fate] = field(default_factory=dict)
    overlay: dict[str, Setting] = field(default_factory=dict)

    def part(self, name: str) -> Ledger:
        """Return the same ledger, its keys below `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, key: str) -> bool:
        """Say whether the configuration has `key`, or anything below it."""
        joined = self.prefix + key
        return any(leaf == joined or leaf.startswith(f"{joined}.") for leaf in self.leaves)

    def value(self, key: str, default: Any = None) -> Any:
        """Return what `key` is, or the foreign `default`."""
        return self.leaves.get(self.prefix + key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number that `key` is, or the foreign `default`; without one, it must be there.

        Raises:
            InputError: it is missing, or no number.
        """
        value = self.value(key, default)
        if _is_number(value):
            return float(value)
        raise self._mistake(key, "a number")

    def whole(self, key: str, default: int | None = None) -> int:
        """Return the whole number from 1 on that `key` is; see `number`."""
        value = self.value(key, default)
        if _is_number(value) and value == int(value) and value >= 1:
            return int(value)
        raise self._mistake(key, "a whole number from 1 on")

    def wholes(self, key: str, default: Sequence[int] | None = None) -> list[int]:
        """Return the list of whole numbers that `key` is; see `number`."""
        value = self.value(key, default)
        if isinstance(value, (list, tuple)) and all(_is_number(one) and one == int(one) for one in value):
            return [int(one) for one in value]
        raise self._mistake(key, "a list of whole numbers, such as [1, 2, 4]")

    def size(self, key: str) -> list[int]:
        """Return the three lengths that `key` is, or is one of for all axes; see `number`."""
        value = self.value(key)
        lengths = self.wholes(key) if isinstance(value, list) else [self.whole(key)] * 3
        if len(lengths) == 3:
            return lengths
        raise self._mistake(key, "one length, or three")

    def _mistake(self, key: str, expected: str) -> InputError:
        found = f"is {self.value(key)!r:.80}" if self.has(key) else "is missing"
        return InputError(f"{self.prefix}{key} {found}; expected {expected}.")

    def carry(self, *keys: str, ours: Mapping[str, Any], note: str = "") -> None:
        """Let settings of `ours` stand for `keys`; of those that the file lacks, for the foreign default."""
        present = [key for key in keys if self.prefix + key in self.leaves]
        origin = ", ".join(self.prefix + key for key in present) or f"the default of {self.prefix}{keys[0]}"
        self.add(ours, origin)
        for key in present:
            self._close(key, Fate(CARRIED, dict(ours), note))

    def add(self, ours: Mapping[str, Any], origin: str) -> None:
        """Set what no key says, because there it is fixed."""
        self.overlay |= {key: Setting(value, origin) for key, value in ours.items()}

    def same(self, key: str, why: str) -> None:
        """Say that ours does by itself what `key` asks for, if the file has it."""
        self._close(key, Fate(SAME, {}, why))

    def leave(self, key: str, why: str) -> None:
        """Say why `key`, if the file has it, has no place in ours."""
        self._close(key, Fate(LEFT, {}, why))

    def compare(self, key: str, wanted: Any, here: str, otherwise: str) -> None:
        """Say `here` where `key` is `wanted`, else that it is left out and why."""
        if self.value(key, wanted) == wanted:
            self.same(key, here)
        else:
            self.leave(key, otherwise)

    def leave_rest(self, why: str) -> None:
        """Say the same of all keys of this part that nothing has been said of."""
        for key in [key for key in self.leaves if key.startswith(self.prefix) and key not in self.fates]:
            self.leave(key.removeprefix(self.prefix), why)

    def _close(self, key: str, fate: Fate) -> None:
        joined = self.prefix + key
        if joined in self.leaves:
            assert joined not in self.fates, f"{joined} is accounted for twice"
            self.fates[joined] = fate

    def table(self) -> str:
        """Return a line for each key in the file's order: its value, and its fate."""
        return "\n".join(
            f"{f'{key}: {_inline(value):.60}':{WIDTH}}  {_told(self.fates[key])}" for key, value in self.leaves.items()
        )

    def counts(self) -> dict[str, int]:
        """Return how many keys came to each kind of fate."""
        kinds = [fate.kind for fate in self.fates.values()]
        return {kind: kinds.count(kind) for kind in (CARRIED, SAME, LEFT)}

    def content(self) -> dict[str, Any]:
        """Return the overlay as `config.read_yaml` reads it from `text`."""
        nested: dict[str, Any] = {}
        for key, setting in self.overlay.items():
            *parents, last = key.split(SEPARATOR)
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = setting.value
        return nested

    def text(self, heading: Iterable[str]) -> str:
        """Return the overlay as YAML, behind each setting the key that it comes from.

        Args:
            heading: lines of comment above it.
        """
        lines = [f"# {line}" for line in heading]
        return "\n".join([*lines, *self._lines(self.content(), ())]) + "\n"

    def _lines(self, node: Mapping[str, Any], parents: Sequence[str]) -> Iterator[str]:
        for key, value in node.items():
            joined = SEPARATOR.join([*parents, key])
            indent = "  " * len(parents)
            if joined in self.overlay:
                yield f"{indent}{key}: {_inline(value)}  # {self.overlay[joined].origin}"
            else:
                yield f"{indent}{key}:"
                yield from self._lines(value, (*parents, key))


def leaves_of(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their keys, joined by dots; lists and empty mappings are values."""
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        joined = f"{prefix}{key}"
        leaves |= leaves_of(value, f"{joined}.") if isinstance(value, dict) and value else {joined: value}
    return leaves


def write(path: Path, text: str, replacing: bool) -> None:
    """Write `text` to `path`, whole or not at all.

    Raises:
        InputError: there is such a file already, and it is not to be replaced.
    """
    if path.exists() and not replacing:
        raise InputError(f"{path} is there already; give another --out, or --force to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _told(fate: Fate) -> str:
    if fate.kind == CARRIED:
        settings = ", ".join(f"{key}: {_inline(value)}" for key, value in fate.ours.items())
        return f"→ {settings}" + (f" ({fate.said})" if fate.said else "")
    return f"{fate.kind}: {fate.said}"


def _inline(value: Any) -> str:
    """Return `value` as YAML on one line."""
    listed: str = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return listed.strip()[1:-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
