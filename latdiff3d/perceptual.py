"""Perceptual losses: how far a reconstruction is from its volume in the features of a network that is not trained.

A `Perceptual` is called as `perceptual(reconstruction, image)` and built by one of three functions: `monai_perceptual`
(lpips and torchvision with their cached files), `pretrained_perceptual` (a file of weights) and `segmenter_perceptual`.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from monai.losses import PerceptualLoss
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import UNet
from torch import nn

from latdiff3d.errors import InputError
from latdiff3d.pretrained import network_from_weights, read_weights

# An empty crop has no spread; below a hundredth of the range, noise is not magnified until it looks like anatomy.
MIN_STD = 0.01
# Features shorter than a tenth of their layer's usual length count by so much less, or air would weigh like tissue.
UNIT_FLOOR = 0.01

# What each network was shown, per channel: (x − shift) / scale of x in [0, 1].
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # [−1, 1]: lpips; RadImageNet's PyTorch notebooks
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision
KERAS_BGR = ((0.406, 0.456, 0.485), (1.0, 1.0, 1.0))  # RadImageNet's Keras scripts, as MONAI's PerceptualLoss has it

# The file that torchvision looks for in torch.hub's cache.
HUB_FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
}

Prepare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Perceptual(nn.Module):
    """The mean distance of a reconstruction from its volume, as a frozen network sees them; 0 for equal ones.

    A mean over samples, modalities and locations, so the patch's size and the number of modalities leave it alone. The
    network is a copy, in eval mode, in float32 (near-equal features differ by less than bfloat16 resolves) and on the
    device of what it is given. It is no submodule: no optimiser and no checkpoint holds it, and `train()` passes it by.

    Args:
        distance: two batches (N, C, *spatial) → their distance, a scalar.
        prepare: (x, image) → x in the range the network expects; statistics are the real `image`'s.
        modalities_apart: show the network one modality at a time.
        slice_fraction: for a 2D network, the share of the slices of each of the three planes that a call looks at.
        generator: draws the slices; torch's default one, which the run seeds, if None.

    Raises:
        InputError: a fraction outside (0, 1].
    """

    def __init__(
        self,
        distance: nn.Module,
        prepare: Prepare,
        modalities_apart: bool = True,
        slice_fraction: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if slice_fraction is not None and not 0 < slice_fraction <= 1:
            raise InputError(f"slice_fraction is {slice_fraction}; expected a share of the slices, such as 0.25.")
        self._frozen = (copy.deepcopy(distance).float().requires_grad_(False).eval(),)
        self.prepare = prepare
        self.modalities_apart = modalities_apart
        self.slice_fraction = slice_fraction
        self.generator = generator

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return the distance, a scalar; its gradient goes to `reconstruction` alone.

        Args:
            reconstruction: (B, C, D, H, W), about [0, 1].
            image: of the same shape, in [0, 1]; padding looks the same in both.
        """
        distance = self._frozen[0].to(image.device)
        pair = torch.stack([reconstruction.float(), image.detach().float()])  # (2, B, C, D, H, W)
        if self.modalities_apart:
            pair = rearrange(pair, "two b c d h w -> two (b c) 1 d h w")
        views = [pair] if self.slice_fraction is None else self._planes(pair, self.slice_fraction)
        with torch.autocast(image.device.type, enabled=False):
            return torch.stack([distance(self.prepare(x, real), self.prepare(real, real)) for x, real in views]).mean()

    def _planes(self, pair: torch.Tensor, fraction: float) -> Iterator[torch.Tensor]:
        """Yield some slices (2, N, C, *plane) of each of the three planes."""
        for axis, pattern in ((3, "(b d) c h w"), (4, "(b h) c d w"), (5, "(b w) c d h")):
            size = pair.shape[axis]
            chosen = torch.randperm(size, generator=self.generator)[: max(1, round(fraction * size))]
            slices = pair.index_select(axis, chosen.to(pair.device))
            yield rearrange(slices, f"two b c d h w -> two {pattern}")


class FeatureDistance(nn.Module):
    """The mean over a network's stages of how far two inputs' features are apart.

    Args:
        stages: applied one after the other; the output of each counts.
        unit_length: compare directions: scale a location's features to length 1 and take the squared distance, in
            [0, 4] (Zhang et al. 2018, arXiv:1801.03924, Eq. 1 with equal weights). Else the mean absolute difference,
            in the features' own unit.
    """

    def __init__(self, stages: Sequence[nn.Module], unit_length: bool = True) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.unit_length = unit_length

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the distance, a scalar, of two batches (N, C, *spatial)."""
        distances = []
        for stage in self.stages:
            x, real = stage(x), stage(real)
            distances.append(_between_directions(x, real) if self.unit_length else (x - real).abs().mean())
        return torch.stack(distances).mean()


def monai_perceptual(
    network_type: str = "alex", slice_fraction: float = 0.25, generator: torch.Generator | None = None
) -> Perceptual:
    """Return MONAI's 2D PerceptualLoss on slices: LPIPS ("alex", "vgg", "squeeze") or torchvision's "resnet50".

    Raises:
        InputError: another type (MONAI's MedicalNet and RadImageNet run code that they download), a package that does
            not import, or a file that torch.hub's cache lacks or that holds code.
    """
    if network_type not in HUB_FILES:
        raise InputError(
            f"network_type is {network_type!r}; expected one of {', '.join(HUB_FILES)}. MONAI's medicalnet and "
            "radimagenet types run downloaded code; use latdiff3d.perceptual.pretrained_perceptual and a weights file."
        )
    for package in ("torchvision",) if network_type == "resnet50" else ("torchvision", "lpips"):
        _require(package)
    file = HUB_FILES[network_type]
    # Read here first: torchvision reads the cached file without weights_only.
    read_weights(Path(torch.hub.get_dir()) / "checkpoints" / file, f"https://download.pytorch.org/models/{file}")
    # MONAI standardises for resnet50 itself.
    prepare = _as_is if network_type == "resnet50" else partial(_three_channels, shift_scale=SYMMETRIC)
    return Perceptual(PerceptualLoss(2, network_type), prepare, slice_fraction=slice_fraction, generator=generator)


def pretrained_perceptual(
    path: str | Path,
    architecture: str = "medicalnet_resnet10",
    num_stages: int = 4,
    unit_length: bool = True,
    slice_fraction: float | None = None,
    generator: torch.Generator | None = None,
) -> Perceptual:
    """Return the distance in a pretrained ResNet's features, in 3D for MedicalNet's, on slices for the others.

    Args:
        path: its weights.
        architecture: a key of `pretrained.SOURCES`, which names the file to get.
        num_stages: how many stages count, of: stem, layer1, layer2, layer3, layer4.
        unit_length: see `FeatureDistance`.
        slice_fraction: see `Perceptual`; of a 2D network only, 0.25 if None.
        generator: see `Perceptual`.

    Raises:
        InputError: a setting out of range or without effect, or weights that do not fit.
    """
    if not 1 <= num_stages <= 5:
        raise InputError(f"num_stages is {num_stages}; expected 1 to 5: stem, layer1, layer2, layer3, layer4.")
    stages, prepare = pretrained_stages(path, architecture)
    distance = FeatureDistance(stages[:num_stages], unit_length)
    if architecture.startswith("medicalnet"):
        if slice_fraction is not None or generator is not None:
            raise InputError(f"{architecture} sees whole volumes; leave slice_fraction and generator out.")
        return Perceptual(distance, prepare)
    fraction = 0.25 if slice_fraction is None else slice_fraction
    return Perceptual(distance, prepare, slice_fraction=fraction, generator=generator)


def pretrained_stages(path: str | Path, architecture: str) -> tuple[list[nn.Module], Prepare]:
    """Return a pretrained ResNet's five stages, each to be applied to what the one before returns, and what goes first.

    Args:
        path, architecture: see `pretrained_perceptual`.

    Returns:
        the stages, of volumes (N, 1, D, H, W) for MedicalNet's and slices (N, 3, H, W) for the others; and what makes
        them of one modality in [0, 1], (N, 1, *spatial), see `Perceptual`.

    Raises:
        InputError: see `pretrained.network_from_weights`.
    """
    net = network_from_weights(path, architecture)
    stem, first = nn.Sequential(net.conv1, net.bn1, net.act), nn.Sequential(net.maxpool, net.layer1)
    shown = {"radimagenet_resnet50": SYMMETRIC, "radimagenet_resnet50_keras": KERAS_BGR, "imagenet_resnet50": IMAGENET}
    in_3d = architecture.startswith("medicalnet")
    prepare = _standardised if in_3d else partial(_three_channels, shift_scale=shown[architecture])
    return [stem, first, net.layer2, net.layer3, net.layer4], prepare


def segmenter_perceptual(segmenter: UNet, unit_length: bool = True) -> Perceptual:
    """Return the distance in the features of a segmenter's encoder, which sees all modalities together, in [0, 1]."""
    return Perceptual(FeatureDistance(encoder_stages(segmenter), unit_length), _as_is, modalities_apart=False)


def encoder_stages(segmenter: UNet) -> list[nn.Module]:
    """Return the stages of a UNet's encoder, the finest first, each to be applied to what the one before returns."""
    stages, block = [], segmenter.model
    while isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection):
        stages.append(block[0])
        block = block[1].submodule
    return [*stages, block]


def check_perceptual(crop_to: Sequence[int], perceptual: nn.Module | None, num_channels: int) -> None:
    """Refuse a crop that is too small for the perceptual network, and a segmenter of other modalities.

    Args:
        crop_to: (D, H, W) in voxels.
        perceptual: a Perceptual, or None where there is none.
        num_channels: of the image.

    Raises:
        InputError: naming what to change.
    """
    if perceptual is None:
        return
    image = torch.zeros(1, num_channels, *crop_to)
    try:
        with torch.no_grad():
            perceptual(image, image)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the perceptual network cannot take {num_channels} modalities of {list(crop_to)} voxels "
            f"({str(error).splitlines()[0]}); use a larger crop_to, or another network at loss::perceptual."
        ) from error


def _between_directions(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    power = real.square().sum(1, keepdim=True)  # (N, 1, *spatial)
    usual = power.mean(tuple(range(1, power.ndim)), keepdim=True)  # per sample: a batch's split must not matter
    floor = UNIT_FLOOR * usual + 1e-6
    unit_x = x / (x.square().sum(1, keepdim=True) + floor).sqrt()
    return (unit_x - real / (power + floor).sqrt()).square().sum(1).mean()


def _as_is(x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return x


def _standardised(x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """By the real volume's mean and spread: by its own, a reconstruction that is too bright would look right."""
    dims = tuple(range(1, image.ndim))
    std = image.std(dims, correction=0, keepdim=True).clamp(min=MIN_STD)
    return (x - image.mean(dims, keepdim=True)) / std


def _three_channels(
    x: torch.Tensor, image: torch.Tensor, shift_scale: tuple[tuple[float, ...], tuple[float, ...]]
) -> torch.Tensor:
    shift, scale = (x.new_tensor(values).view(1, 3, 1, 1) for values in shift_scale)
    return (x - shift) / scale  # (N, 1, H, W) → (N, 3, H, W)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a torchvision of another torch's build
        raise InputError(
            f"{package} does not import ({str(error).splitlines()[0]}); LPIPS needs lpips and torchvision, resnet50 "
            f"torchvision, built for torch {torch.__version__}. Install them, or use another loss::perceptual: "
            "latdiff3d.perceptual.segmenter_perceptual, or pretrained_perceptual with a file of weights."
        ) from error
