"""What is known of a case beside its voxels, such as age, sex, scanner and spacing: from files to numbers.

A covariate is a number, or one of some classes. `spacing` is three numbers, and not asked of the user: the volume's
header says it.
"""

import csv
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latdiff3d.errors import InputError
from latdiff3d.layouts import Case
from latdiff3d.volumes import spacing_mm_of

TABLE = "covariates.csv"
SPACING = "spacing"  # (D, H, W) in mm
MISSING = math.nan  # what stands where a value is not known, or was dropped


@dataclass(frozen=True)
class Covariate:
    """One number, standardised by `mean` and `std`; or one of `classes`, if there are any."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    classes: tuple[str, ...] = ()

    @property
    def num_columns(self) -> int:
        """How many numbers it takes."""
        return 3 if self.name == SPACING else 1

    def numbers(self, value: Any, source: str) -> list[float]:
        """Return `value`, a number, a class or a text of either, as numbers; NaN for None and "".

        Args:
            source: who says so, for the message.

        Raises:
            InputError: for what is no number, and no class that is known.
        """
        if value is None or value == "":
            return [MISSING] * self.num_columns
        if self.classes:
            if str(value) not in self.classes:
                raise InputError(
                    f"{source}: {self.name} is {value!r}; known are {', '.join(self.classes)}. Correct it, leave it "
                    "out where it is not known, or add the class to covariates before training."
                )
            return [float(self.classes.index(str(value)))]
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        try:
            numbers = [float(part) for part in parts]
        except (TypeError, ValueError):
            numbers = []
        is_size = self.name != SPACING or all(number > 0 for number in numbers)
        if len(numbers) != self.num_columns or not all(map(math.isfinite, numbers)) or not is_size:
            expected = "three sizes in mm, such as 1,1,3" if self.name == SPACING else "a number"
            raise InputError(f"{source}: {self.name} is {value!r}; expected {expected}, or nothing where unknown.")
        return numbers

    def value(self, numbers: Sequence[float]) -> Any:
        """Return the value that `numbers` stand for, None where it is missing."""
        if any(math.isnan(number) for number in numbers):
            return None
        if self.classes:
            return self.classes[int(numbers[0])]
        values = [float(f"{number:.6g}") for number in numbers]  # what float32 holds
        return values if self.num_columns > 1 else values[0]


class Covariates:
    """Those that a model knows, in their order.

    Args:
        settings: of each a dict `{name: age, mean: 60, std: 15}` or `{name: sex, classes: [F, M]}`.

    Raises:
        InputError: for anything else.
    """

    def __init__(self, settings: Sequence[Mapping[str, Any]] = ()) -> None:
        if not isinstance(settings, Sequence) or isinstance(settings, str):
            raise InputError(f"covariates is {settings!r}; expected a list, such as [{{name: sex, classes: [F, M]}}].")
        self.known = [_covariate(number, setting) for number, setting in enumerate(settings)]
        names = self.names
        if len(set(names)) < len(names):
            raise InputError(f"covariates names {', '.join(names)}; expected each name once.")

    def __len__(self) -> int:
        return len(self.known)

    @property
    def names(self) -> list[str]:
        """Return their names."""
        return [covariate.name for covariate in self.known]

    @property
    def num_columns(self) -> int:
        """Return N, how many numbers they take together."""
        return sum(covariate.num_columns for covariate in self.known)

    def numbers(self, values: Mapping[str, Any], source: str) -> torch.Tensor:
        """Return values by name as numbers (N,), NaN where there is none; others' values are not looked at.

        Raises:
            InputError: see `Covariate.numbers`.
        """
        said = [n for covariate in self.known for n in covariate.numbers(values.get(covariate.name), source)]
        return torch.tensor(said, dtype=torch.float32)

    def values(self, numbers: torch.Tensor) -> dict[str, Any]:
        """Return what `numbers` (N,) say by name, None where they say nothing."""
        parts = numbers.split([covariate.num_columns for covariate in self.known])
        return {known.name: known.value(part.tolist()) for known, part in zip(self.known, parts, strict=True)}

    def refuse_unknown(self, names: Iterable[str], source: str) -> None:
        """Refuse a name that is none of them.

        Raises:
            InputError: naming the nearest, or all.
        """
        for name in names:
            if name not in self.names:
                nearest = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
                known = f"it knows {', '.join(self.names)}" if self.names else "it knows none"
                hint = f"; did you mean {nearest[0]}?" if nearest else ". Leave it out."
                raise InputError(f"{source}: the model has no covariate {name!r}; {known}{hint}")

    def require_values(self, cases: Sequence[Case]) -> None:
        """Say how many of the training cases have a value of each; refuse one that none has, and so cannot be learnt.

        Raises:
            InputError: naming the covariate.
        """
        known = [self.values(case["covariates"]) for case in cases] if self.known else []
        counts = {name: sum(values[name] is not None for values in known) for name in self.names}
        for name, count in counts.items():
            if count == 0:
                raise InputError(
                    f"none of the {len(cases)} training cases says its {name}; expected a column {name} in {TABLE}, "
                    f"or a key {name} of the datalist's entries. Add it, or take {name} out of covariates."
                )
        if counts:
            said = ", ".join(f"{name} of {count}" for name, count in counts.items())
            print(f"covariates, known of {len(cases)} training cases: {said}", flush=True)


def described(
    cases: Sequence[Case], covariates: Covariates, folder: str | Path, spacing: Sequence[float] | None = None
) -> list[Case]:
    """Return the cases, each with what is known of it as "covariates", numbers (N,); without any for none.

    Args:
        cases: with what their datalist says as "covariates", a dict.
        folder: of the data set, or its datalist; `TABLE` is looked for there.
        spacing: (D, H, W) in mm to which volumes are resampled; None: as each volume's header says.

    Raises:
        InputError: naming the case whose value is none, or what is wrong with the table.
    """
    table = _read_table(Path(folder).expanduser()) if len(covariates) else {}
    result = []
    for case in cases:
        bare = {key: value for key, value in case.items() if key != "covariates"}
        if len(covariates):
            said = _joined(case, case.get("covariates", {}), table.get(case["case"], {}))
            if SPACING in covariates.names:
                said[SPACING] = list(spacing) if spacing else spacing_mm_of(case["image"][0]).tolist()
            bare["covariates"] = covariates.numbers(said, case["case"])
        result.append(bare)
    return result


def parse_covariates(words: Iterable[str]) -> dict[str, str]:
    """Return `name=value` words by name, the values as they are; "" for a value that is not known.

    Raises:
        InputError: for a word without `=`, or a name given twice.
    """
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"{word!r} is no covariate; expected name=value, such as age=60.")
        if name in given:
            raise InputError(f"the covariate {name} is given twice, as {given[name]!r} and {value!r}; give it once.")
        given[name] = value
    return given


def _covariate(number: int, setting: Any) -> Covariate:
    expected = "expected {name: age, mean: 60, std: 15} or {name: sex, classes: [F, M]}."
    keys = set(setting) if isinstance(setting, Mapping) else set()
    if keys not in ({"name", "mean", "std"}, {"name", "classes"}) or not isinstance(setting["name"], str):
        raise InputError(f"covariates[{number}] is {setting!r}; {expected}")
    name = setting["name"]
    if "classes" not in keys:
        mean, std = setting["mean"], setting["std"]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (mean, std)) or std <= 0:
            raise InputError(f"covariates: {name} has mean {mean!r} and std {std!r}; expected numbers, std above 0.")
        return Covariate(name, float(mean), float(std))
    classes = setting["classes"]
    if not isinstance(classes, list) or not all(type(c) in (str, int) and c != "" for c in classes) or not classes:
        raise InputError(f"covariates: {name} has the classes {classes!r}; expected a list of names, such as [F, M].")
    if name == SPACING:
        raise InputError(f"covariates: {name} has the classes {classes!r}; expected mean and std, for it is in mm.")
    texts = tuple(str(c) for c in classes)
    if len(set(texts)) < len(texts):
        raise InputError(f"covariates: {name} has the classes {classes!r}; expected each of them once.")
    return Covariate(name, classes=texts)


def _joined(case: Case, listed: Mapping[str, Any], row: Mapping[str, str]) -> dict[str, Any]:
    for name in listed.keys() & row.keys():
        if row[name] != "" and listed[name] is not None and str(listed[name]) != row[name]:
            raise InputError(
                f"{case['case']}: {name} is {listed[name]!r} in the datalist and {row[name]!r} in {TABLE}; correct one."
            )
    return {**listed, **{name: text for name, text in row.items() if text != ""}}


def _read_table(place: Path) -> dict[str, dict[str, str]]:
    file = (place.parent if place.is_file() else place) / TABLE
    if not file.is_file():
        return {}
    try:
        first, *rows = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines())) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is no CSV table in UTF-8: {error}; save it again as one.") from None
    header = [name.strip() for name in first]
    if header[:1] != ["case"] or len(set(header)) < len(header):
        raise InputError(f"{file} has the columns {', '.join(header)}; expected case first, and each name once.")
    table: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise InputError(f"{file}, line {number} has {len(cells)} cells; expected {len(header)}, as in the first.")
        if cells[0] in table:
            raise InputError(f"{file}, line {number} names the case {cells[0]} again; expected one line a case.")
        table[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return table
