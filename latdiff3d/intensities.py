"""Intensities of [0, 1] back to a scan's own range, and into int16 that keeps them to half a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose
from monai.utils import convert_to_numpy

from latdiff3d.checkpoints import sha256
from latdiff3d.errors import InputError
from latdiff3d.transforms import ScaleForegroundd, foreground_range

LOWEST, HIGHEST = -32768, 32767  # of int16


@dataclass(frozen=True)
class IntensityRange:
    """What `ScaleForegroundd` maps to 0 and 1 in one channel of a scan.

    Attributes:
        low, high: mapped to 0 and 1, in the scan's units.
        background: mapped to 0 as well; None where the channel has none.
    """

    low: float
    high: float
    background: float | None

    def unscaled(self, channel: np.ndarray) -> np.ndarray:
        """Return a channel (D, H, W) of [0, 1] in the scan's units, float32; exactly 0 becomes the background.

        What the scan has below `low` and above `high` was clipped, and does not come back.
        """
        values = self.low + channel.astype(np.float64) * (self.high - self.low)
        return np.where(channel == 0, self.low if self.background is None else self.background, values).astype(
            np.float32
        )


@dataclass(frozen=True)
class Reference:
    """A scan, or a set of them, whose range volumes are mapped to.

    Attributes:
        files: of the scan; none of a set.
        ranges: one a channel; medians, of a set.
        num_scans: in the set.
    """

    files: Sequence[str]
    ranges: Sequence[IntensityRange]
    num_scans: int = 1

    @property
    def units(self) -> str:
        """Return what a sidecar calls the units of what is mapped to it."""
        return "those of the scan in Like" if self.files else "those of the training scans, by their median range"

    def unscaled(self, volume: np.ndarray) -> np.ndarray:
        """Return a volume (C, D, H, W) of [0, 1] in the scan's units, float32."""
        return np.stack([each.unscaled(channel) for each, channel in zip(self.ranges, volume, strict=True)])

    def said(self, modalities: Sequence[str]) -> dict[str, Any]:
        """Return what a sidecar says of it."""
        ranges = {
            name: {"Low": each.low, "High": each.high, "Background": each.background}
            for name, each in zip(modalities, self.ranges, strict=True)
        }
        files = [{"Name": Path(file).name, "SHA256": sha256(Path(file))} for file in self.files]
        return {"Like": files or f"the median of {self.num_scans} training scans", "IntensityRange": ranges}


def reference(files: Sequence[str], preprocessing: Compose) -> Reference:
    """Return a scan's range in each channel, by the percentiles that the model's own preprocessing scales by.

    Args:
        files: of the scan, see `layouts.scan_files`.
        preprocessing: the model's; what comes before its `ScaleForegroundd` is applied.

    Raises:
        InputError: a scan that the model cannot read, or a model that does not scale by percentiles.
    """
    transforms = list(preprocessing.flatten().transforms)
    at = next((k for k, each in enumerate(transforms) if isinstance(each, ScaleForegroundd)), None)
    if at is None:
        raise InputError("this model's preprocessing has no ScaleForegroundd, which --like inverts; leave --like out.")
    scale: Any = transforms[at]
    image: MetaTensor = Compose(transforms[:at])({"image": list(files)})["image"]
    scale({"image": image})  # refuses a channel without contrast, by name
    found = [foreground_range(channel, scale.lower, scale.upper) for channel in convert_to_numpy(image)]
    return Reference(list(files), [IntensityRange(low, high, background) for background, low, high in found])


def as_int16(channel: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return whole numbers, slope and intercept so that numbers · slope + intercept is `channel` to half a slope.

    0 stays exactly 0 where it lies within the range, as the background must: the intercept is 0 then.

    Args:
        channel: (D, H, W), finite.
    """
    low, high = float(channel.min()), float(channel.max())
    inter = np.float32(0 if low <= 0 <= high else (low + high) / 2)
    slope = np.float32(max((high - float(inter)) / HIGHEST, (low - float(inter)) / LOWEST)) or np.float32(1)
    steps = np.rint((channel.astype(np.float64) - float(inter)) / float(slope))
    return steps.clip(LOWEST, HIGHEST).astype(np.int16), float(slope), float(inter)
