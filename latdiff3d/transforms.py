"""Turn a case's files into what the networks see, intensities in [0, 1]: the dictionary transforms MONAI lacks."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Flip, MapTransform, RandomizableTransform, SpatialCrop
from monai.utils import TransformBackends, convert_to_numpy, convert_to_tensor, ensure_tuple

from latdiff3d.checks import grid_problem, voxel_problems
from latdiff3d.crop_windows import Box, centred_start, foreground_box, random_start
from latdiff3d.datalist import raise_first
from latdiff3d.errors import InputError
from latdiff3d.readers import CHANNEL_FILES, Header, file_label, read_volume

# Outside a skull-stripped brain every voxel is the same; inside, no single value of a real scan comes near this share.
BACKGROUND_FRACTION = 0.1

_TORCH = [TransformBackends.TORCH]
_NUMPY = [TransformBackends.NUMPY]
_TORCH_AND_NUMPY = _TORCH + _NUMPY


class LoadVolumed(MapTransform):
    """Load a path or a list of paths as one float32 MetaTensor (C, D, H, W), channels in the order of the paths.

    A 4D file's last axis becomes its channels. The result is channel-first already: an EnsureChannelFirstd after it
    changes nothing. A volume that is loaded already, by `readers.read_volume`, stays as it is.

    Raises:
        InputError: a file is missing, truncated or damaged, or the files of one key lie on different grids.
    """

    backend = _TORCH

    def __init__(self, keys: KeysCollection = ("image", "mask"), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if not isinstance(d[key], MetaTensor):
                d[key] = _load_channels([str(path) for path in ensure_tuple(d[key])])
        return d


class CheckVolumed(MapTransform):
    """Refuse a loaded case whose voxels cannot be trained on; see `checks.voxel_problems`. Changes nothing.

    Args:
        labels: the labels the configuration knows.
        num_channels: channels the networks expect of the image.

    Raises:
        InputError: the first problem: channel count, shape of the mask, NaN, constant image, unknown labels.
    """

    backend = _TORCH_AND_NUMPY

    def __init__(
        self,
        image_key: str = "image",
        mask_key: str = "mask",
        labels: Sequence[int] | None = None,
        num_channels: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__((image_key, mask_key), allow_missing_keys)
        self.image_key = image_key
        self.mask_key = mask_key
        self.labels = None if labels is None else tuple(labels)
        self.num_channels = num_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        present = list(self.key_iterator(d))
        image = d[self.image_key] if self.image_key in present else None
        mask = d[self.mask_key] if self.mask_key in present else None
        names = [] if image is None else channel_names(image, self.image_key)
        mask_name = "" if mask is None else channel_names(mask, self.mask_key)[0]
        if image is not None and len(image) != self.num_channels:
            raise InputError(f"{names[0]}: the image has {len(image)} channel(s); expected {self.num_channels}.")
        if mask is not None and len(mask) != 1:
            raise InputError(f"{mask_name}: the mask has {len(mask)} channels; expected one label map.")
        if image is not None and mask is not None and image.shape[1:] != mask.shape[1:]:
            raise InputError(
                f"{mask_name} has the shape {tuple(mask.shape[1:])}, {names[0]} {tuple(image.shape[1:])}; "
                "expected one grid. Resample the mask onto the image."
            )
        raise_first(voxel_problems(image, mask, self.labels, names, mask_name)[:1])
        return d


class ScaleForegroundd(MapTransform):
    """Map each channel's foreground percentiles to 0 and 1 over the whole volume, clip, and set the background to 0.

    To be applied before any crop, or each crop would be mapped differently. The background is the channel's most
    frequent value where it holds at least `BACKGROUND_FRACTION` of the voxels; else there is none and every voxel
    counts. Negative values inside the brain are foreground.

    Args:
        lower, upper: percentiles of the foreground, in [0, 100].

    Returns:
        float32 MetaTensors (C, D, H, W) in [0, 1].

    Raises:
        InputError: both percentiles have the same value.
    """

    backend = _NUMPY

    def __init__(
        self, keys: KeysCollection, lower: float = 0.0, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= lower < upper <= 100:
            raise InputError(f"lower {lower} and upper {upper} are no percentiles; expected 0 ≤ lower < upper ≤ 100.")
        self.lower = lower
        self.upper = upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = convert_to_tensor(d[key], track_meta=True)
            scaled = torch.empty(image.shape, dtype=torch.float32)
            for name, channel, out in zip(channel_names(image, key), convert_to_numpy(image), scaled, strict=True):
                out.copy_(torch.from_numpy(self._scale(channel, name)))
            d[key] = MetaTensor(scaled.to(image.device)).copy_meta_from(image)
        return d

    def _scale(self, channel: np.ndarray, name: str) -> np.ndarray:
        background, low, high = foreground_range(channel, self.lower, self.upper)
        if not low < high:
            raise InputError(
                f"{name}: the percentiles {self.lower:g} and {self.upper:g} of its foreground are both {low:g}; "
                "expected an image with contrast. Widen the percentiles, or drop the case."
            )
        # float64: a maximum of 1.7e6 and a contrast of a few units are both to survive.
        scaled = np.clip((channel.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)
        if background is not None:
            scaled[channel == background] = 0
        return scaled


class MarkValidd(MapTransform):
    """Add a float32 map of ones (1, D, H, W) on the image's grid, so that later padding is told from the volume.

    Args:
        keys: the image, or several on one grid; the first that is present gives the grid.
        valid_key: where the map goes; transform it as the image from here on, padded with 0.
    """

    backend = _TORCH

    def __init__(
        self, keys: KeysCollection = "image", valid_key: str = "valid", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.valid_key = valid_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in list(self.key_iterator(d))[:1]:
            image = convert_to_tensor(d[key], track_meta=True)
            ones = torch.ones((1, *image.shape[1:]), dtype=torch.float32, device=image.device)
            d[self.valid_key] = MetaTensor(ones).copy_meta_from(image)
        return d


class CoarseMaskd(MapTransform):
    """Keep a mask's labels (mode "fine"), or merge all that are above 0 into one, `label` (mode "coarse")."""

    backend = _TORCH_AND_NUMPY

    def __init__(
        self, keys: KeysCollection, mode: str = "fine", allow_missing_keys: bool = False, label: int = 1
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if mode not in ("fine", "coarse"):
            raise InputError(f"mask mode {mode!r} is unknown; expected fine or coarse.")
        self.mode = mode
        self.label = label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.mode == "coarse":
            for key in self.key_iterator(d):
                mask = convert_to_tensor(d[key], track_meta=True)
                d[key] = (mask > 0).to(mask.dtype) * self.label
        return d


class ForegroundCropd(MapTransform):
    """Cut a window of `roi_size` around the middle of the foreground, moved as little as the volume's end demands.

    Args:
        keys: what to cut, all on one grid, at least as large as the window.
        source_key: the image (C, D, H, W), whose foreground is what is above 0 in any channel.
        roi_size: (D, H, W) of the window.
    """

    backend = SpatialCrop.backend

    def __init__(
        self, keys: KeysCollection, source_key: str, roi_size: Sequence[int], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key = source_key
        self.roi_size = np.array(roi_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        size = np.array(d[self.source_key].shape[1:])
        if (size < self.roi_size).any():
            raise ValueError(f"the volume is {size.tolist()}; pad it to at least {self.roi_size.tolist()} first.")
        start = self._start(foreground_box(d[self.source_key]), size)
        crop = SpatialCrop(roi_start=start.tolist(), roi_end=(start + self.roi_size).tolist())
        for key in self.key_iterator(d):
            d[key] = crop(d[key])
        return d

    def _start(self, box: Box, size: np.ndarray) -> np.ndarray:
        return centred_start(box, self.roi_size, size)


class RandForegroundCropd(RandomizableTransform, ForegroundCropd):
    """As `ForegroundCropd`, at a random place: inside the foreground's box, or around all of it where it is smaller."""

    def __init__(
        self, keys: KeysCollection, source_key: str, roi_size: Sequence[int], allow_missing_keys: bool = False
    ) -> None:
        ForegroundCropd.__init__(self, keys, source_key, roi_size, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)

    def _start(self, box: Box, size: np.ndarray) -> np.ndarray:
        return random_start(box, self.roi_size, size, self.R)


class RandFlipsd(RandomizableTransform, MapTransform):
    """Mirror along each of `axes` with probability ½, whatever the others do.

    Args:
        keys: what to mirror, together.
        axes: of D, H and W, counted from 0.
    """

    backend = _TORCH

    def __init__(self, keys: KeysCollection, axes: Sequence[int], allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.axes = tuple(axes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        chosen = [axis for axis in self.axes if self.R.randint(2)]
        if chosen:
            for key in self.key_iterator(d):
                d[key] = Flip(spatial_axis=chosen)(d[key])
        return d


def foreground_range(channel: np.ndarray, lower: float, upper: float) -> tuple[float | None, float, float]:
    """Return the background's value, or None, and two percentiles of the other voxels.

    Args:
        channel: (D, H, W) of any numeric dtype.
        lower, upper: in [0, 100].
    """
    values, counts = np.unique(channel, return_counts=True)
    background = values[counts.argmax()] if counts.max() >= BACKGROUND_FRACTION * channel.size else None
    foreground = channel if background is None else channel[channel != background]
    if not foreground.size:
        return float(values[0]), float(values[0]), float(values[0])
    low, high = np.percentile(foreground, (lower, upper))
    return None if background is None else float(background), float(low), float(high)


def channel_names(image: Any, key: Hashable) -> list[str]:
    """Return the file of each channel of a (C, D, H, W) image as its metadata has it, else `key`."""
    meta = image.meta if isinstance(image, MetaTensor) else {}
    names = meta.get(CHANNEL_FILES)
    if names is None or len(names) != len(image):
        source = file_label(meta["filename_or_obj"]) if "filename_or_obj" in meta else str(key)
        names = [source] if len(image) == 1 else [f"{source} (channel {channel})" for channel in range(len(image))]
    return list(names)


def _load_channels(paths: list[str]) -> MetaTensor:
    volumes = [read_volume(path) for path in paths]  # each (C, D, H, W), C = 1 but for a 4D file
    grids = [Header(tuple(volume.shape[1:]), np.asarray(volume.affine)) for volume in volumes]
    problems = [grid_problem(path, grid, paths[0], grids[0]) for path, grid in zip(paths, grids, strict=True)]
    raise_first([problem for problem in problems if problem][:1])
    if len(volumes) == 1:
        return volumes[0]
    image = MetaTensor(torch.cat([volume.as_tensor() for volume in volumes])).copy_meta_from(volumes[0])
    image.meta[CHANNEL_FILES] = [name for volume in volumes for name in volume.meta[CHANNEL_FILES]]
    return image
