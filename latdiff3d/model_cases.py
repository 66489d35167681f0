"""The cases of a data set as a model reads them: its layout, its lists, its covariates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latdiff3d.covariates import SPACING
from latdiff3d.errors import InputError
from latdiff3d.synthesis import Model


def cases_of_split(model: Model, dataset_dir: str | Path, split: str) -> list[dict[str, Any]]:
    """Return the cases of a data set's split, read as the model's configuration reads data.

    Raises:
        InputError: for another split than train, val or test, or for a data set that cannot be read.
    """
    if split not in ("train", "val", "test"):
        raise InputError(f"split is {split!r}; expected train, val or test.")
    model.config["dataset_dir"] = str(dataset_dir)
    model.config.parse(True)
    model.config["skip_bad_cases"] = False  # masks alone are read, each when its turn comes
    cases = list(model.config.get_parsed_content("splits")[split])
    if not cases:
        raise InputError(f"{dataset_dir} has no {split} case; choose another --split, or list some in {split}.list.")
    return cases


def known_of(model: Model, case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a case of `cases_of_split` says of its covariates by name; its mask says the spacing."""
    said = model.covariates.values(case["covariates"]) if len(model.covariates) else {}
    return {name: value for name, value in said.items() if name != SPACING}
