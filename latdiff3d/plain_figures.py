"""Figures as plain numbers by name, None for what is undefined, and as JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latdiff3d import whole_files


def finite(value: Any) -> Any:
    """Return figures, in dicts and lists, with None for each number that is not finite: JSON has no other."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write finite figures, whole or not at all."""
    whole_files.write(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")


def rounded(value: float) -> float | None:
    """Return a number to four digits, as it is printed, None for NaN."""
    return None if math.isnan(value) else float(f"{value:.4g}")
