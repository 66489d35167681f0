"""What frozen networks see in a volume, as a row of numbers: what sets of volumes are compared by.

A segmenter that was trained here needs no file from elsewhere; RadImageNet's and MedicalNet's networks are built of
files of weights, see pretrained.py. MedicalNet sees volumes, RadImageNet and ImageNet slices of all three planes
(2.5D).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from monai.networks.nets import UNet
from torch import nn

from latdiff3d import checkpoints
from latdiff3d.errors import InputError
from latdiff3d.fidelity import own_voxels
from latdiff3d.perceptual import Prepare, pretrained_stages
from latdiff3d.pretrained import SOURCES
from latdiff3d.segmentation import encoder_features

SLICE_STEP = 4  # a network of slices looks at every so many of each plane's


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features are compared.

    Attributes:
        name: of it in figures.
        sha256: of its weights' file.
        row: of a volume (C, D, H, W) in [0, 1] and its own voxels (1, D, H, W), its features (F,).
        deepest: which of the F are means of its deepest stage, pooled over the volume as those of the Fréchet inception
            distance are.
    """

    name: str
    sha256: str
    row: Callable[[np.ndarray, np.ndarray], np.ndarray]
    deepest: slice


class FeatureSets(NamedTuple):
    """One network's features of all volumes.

    Attributes:
        real: (N, F), of the split's real volumes.
        made: (S, N, F), of the S volumes made for each of their masks.
        training: (M, F), of other real volumes, those that the model was trained on; M may be 0.
        deepest: see `FeatureNetwork`.
    """

    real: np.ndarray
    made: np.ndarray
    training: np.ndarray
    deepest: slice


def segmenter_network(judge: nn.Module, place: str | Path, device: torch.device) -> FeatureNetwork:
    """Return the encoder of a segmenter, which sees all modalities together; see `segmentation.encoder_features`.

    Args:
        judge: from `segmentation.load_judge`.
        place: where it is from.
        device: where to compute.

    Raises:
        InputError: a segmenter that is no UNet.
    """
    if not isinstance(judge, UNet):
        raise InputError(f"{place} is a {type(judge).__name__}; expected a UNet, whose encoder lends features.")
    judge.to(device)

    def row(volume: np.ndarray, own: np.ndarray) -> np.ndarray:
        image, valid = (torch.as_tensor(array, dtype=torch.float32)[None].to(device) for array in (volume, own))
        return encoder_features(judge, image, valid)[0].double().cpu().numpy()

    num = judge.channels[-1]
    return FeatureNetwork("segmenter", checkpoints.sha256(checkpoints.find(place)), row, slice(-2 * num, -num))


def pretrained_network(given: str, device: torch.device) -> FeatureNetwork:
    """Return a published network with weights from a file; it sees one modality at a time.

    Args:
        given: `architecture=file`, the architecture a key of `pretrained.SOURCES`.
        device: where to compute.

    Raises:
        InputError: anything else, or see `pretrained.network_from_weights`.
    """
    architecture, equals, path = given.partition("=")
    if not equals or architecture not in SOURCES:
        raise InputError(f"--weights is {given!r}; expected architecture=file, of {', '.join(SOURCES)}.")
    stages, prepare = pretrained_stages(path, architecture)
    network = nn.Sequential(*stages).requires_grad_(False).eval().to(device)
    pooled = pooled_volumes if architecture.startswith("medicalnet") else pooled_slices

    def row(volume: np.ndarray, own: np.ndarray) -> np.ndarray:
        image = torch.as_tensor(volume[own_voxels(own)], dtype=torch.float32).to(device)
        with torch.no_grad():
            return pooled(network, prepare, image[:, None]).flatten().double().cpu().numpy()

    return FeatureNetwork(architecture, checkpoints.sha256(Path(path)), row, slice(None))


def pooled_volumes(network: nn.Module, prepare: Prepare, image: torch.Tensor) -> torch.Tensor:
    """Return the mean over locations of what a 3D network sees in volumes (C, 1, D, H, W): (C, F)."""
    return network(prepare(image, image)).mean((2, 3, 4))


def pooled_slices(network: nn.Module, prepare: Prepare, image: torch.Tensor) -> torch.Tensor:
    """Return the mean over slices of all planes of what a 2D network sees in volumes (C, 1, D, H, W): (C, F)."""
    planes = []
    for axis, pattern in (
        (2, "c one d h w -> d c one h w"),
        (3, "c one d h w -> h c one d w"),
        (4, "c one d h w -> w c one d h"),
    ):
        size = image.shape[axis]
        first = (size - 1) % SLICE_STEP // 2  # as many left out at either end
        slices = rearrange(image, pattern)[first::SLICE_STEP]
        seen = torch.stack([network(prepare(one, one)).mean((2, 3)) for one in slices])  # (slices, C, F)
        planes.append(seen.mean(0))
    return torch.stack(planes).mean(0)
