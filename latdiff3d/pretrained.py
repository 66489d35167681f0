"""Published weights of ResNets, for the perceptual losses: from a file into a MONAI network, running no code."""

import pickle
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import ResNetFeatures
from torch import nn
from torch.nn import functional as F

from latdiff3d.errors import InputError

_MEDICALNET = "https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet"
# The file to get for each architecture.
SOURCES = {f"medicalnet_resnet{n}": f"resnet_{n}_23dataset.pth from {_MEDICALNET}{n}" for n in (10, 18, 34, 50)} | {
    "radimagenet_resnet50": "ResNet50.pt, the authors' PyTorch weights, from https://github.com/BMEII-AI/RadImageNet",
    "radimagenet_resnet50_keras": "RadImageNet-ResNet50_notop.pth from https://huggingface.co/MONAI/checkpoints",
    "imagenet_resnet50": "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
}
# DataParallel's prefix, and the places in an nn.Sequential of torchvision's layers, as RadImageNet's authors saved it.
_PREFIXES = {"module.": "", "backbone.0.": "conv1.", "backbone.1.": "bn1."} | {
    f"backbone.{n + 3}.": f"layer{n}." for n in range(1, 5)
}


def network_from_weights(path: str | Path, architecture: str) -> ResNetFeatures:
    """Return a MONAI ResNet with the weights at `path`, all of them and nothing else: 3D for MedicalNet, else 2D.

    A final classifier (`fc.`) in the file is left out, and so are batch norm's counters, which eval mode never reads.

    Args:
        path: a state dict that `torch.save` wrote, by itself or under "state_dict".
        architecture: a key of `SOURCES`.

    Raises:
        InputError: another architecture; no file, a damaged one or one with code; keys or shapes that differ.
    """
    if architecture not in SOURCES:
        raise InputError(f"architecture is {architecture!r}; expected one of {', '.join(SOURCES)}.")
    in_3d = architecture.startswith("medicalnet")
    network = ResNetFeatures(
        architecture.split("_")[1], pretrained=False, spatial_dims=3 if in_3d else 2, in_channels=1 if in_3d else 3
    )
    if in_3d:
        _dilate(network)
    elif architecture.endswith("keras"):
        _stride_first(network)
    weights = {_own_name(key): value for key, value in read_weights(path, SOURCES[architecture]).items()}
    own = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    unused = re.compile(r"fc\.|.*num_batches_tracked$")
    if found := misfits(own, {key: value for key, value in weights.items() if key in own or not unused.match(key)}):
        raise InputError(f"{path} does not fit {architecture}: it {found}. Expected {SOURCES[architecture]}.")
    network.load_state_dict({key: weights[key] for key in own}, strict=False)
    return network


def misfits(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """Return in what `weights` differ from a network's `own` in names and shapes, the first three of each and how many.

    Returns:
        such as "lacks conv1.weight (1), also has conv1.bias, bn1.bias (2)"; "" where they fit.
    """
    faults = {
        "lacks": [key for key in own if key not in weights],
        "also has": [key for key in weights if key not in own],
        "has another shape of": [key for key in own if key in weights and own[key].shape != weights[key].shape],
    }
    return ", ".join(f"{what} {', '.join(keys[:3])} ({len(keys)})" for what, keys in faults.items() if keys)


def read_weights(path: str | Path, source: str) -> dict[str, torch.Tensor]:
    """Return the state dict at `path` without running any code in it.

    Args:
        path: the file.
        source: what to get and where from, for the message.

    Raises:
        InputError: no file, a damaged one, one with code, or one without a state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; get {source} and put it there.") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run code, {code[1]}" if code else (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not read as weights ({reason}); get {source}.") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no state dict of tensors; get {source}.")
    return weights


def _own_name(key: str) -> str:
    for prefix, own in _PREFIXES.items():
        if key.startswith(prefix):
            key = own + key.removeprefix(prefix)
    return key


def _dilate(network: ResNetFeatures) -> None:
    """Turn MONAI's ResNet into MedicalNet's (Chen et al. 2019, arXiv:1904.00625), whose weights have the same names.

    Its layers 3 and 4 dilate where MONAI's stride. MONAI's padded shortcut also cuts the gradient (`.data`).
    """
    for layer, stride, dilation in ((network.layer2, 2, 1), (network.layer3, 1, 2), (network.layer4, 1, 4)):
        for module in layer.modules():
            if isinstance(module, nn.Conv3d) and dilation > 1:
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
        block: Any = layer[0]
        if isinstance(block.downsample, partial):
            block.downsample = partial(_padded, planes=block.downsample.keywords["planes"], stride=stride)


def _padded(x: torch.Tensor, planes: int, stride: int) -> torch.Tensor:
    return F.pad(x[..., ::stride, ::stride, ::stride], (0,) * 7 + (planes - x.shape[1],))


def _stride_first(network: ResNetFeatures) -> None:
    """Turn MONAI's ResNet50 into Keras', which strides in a block's first convolution and has biases everywhere."""
    for layer in (network.layer2, network.layer3, network.layer4):
        block: Any = layer[0]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
