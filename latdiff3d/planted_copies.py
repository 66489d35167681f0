"""Copies of training volumes, changed in known ways: what a memorisation audit that is worth its name must find."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from latdiff3d.codec import LatentCodec
from latdiff3d.nearest import NamedVolume, Volume, flipped, moved

NUM_CASES = 5  # that are copied in each way
SHIFT = 3  # voxels along each axis
NOISE = 0.05  # of the range from 0 to 1
GAMMA, FACTOR, OFFSET = 1.3, 0.7, 0.1  # of the other intensities

Pair = tuple[torch.Tensor, torch.Tensor]  # an image and its own voxels
Change = Callable[[torch.Tensor, torch.Tensor, torch.Generator], Pair]


def planted(
    training: Sequence[Volume], flip: Sequence[int], codec: LatentCodec | None = None, num: int = NUM_CASES
) -> dict[str, list[NamedVolume]]:
    """Return copies of `num` training volumes, spread evenly, by what was done to them.

    Noise, a shift, a flip, other intensities, the autoencoder's way there and back, and all of that together.

    Args:
        flip: axes along which the flipped ones are mirrored.
        codec: of the model; without one, no copy goes through it.
    """
    generator = torch.Generator().manual_seed(0)
    places = sorted({round(k) for k in np.linspace(0, len(training) - 1, min(num, len(training)))})
    originals = [training[place] for place in places]
    kinds: dict[str, list[Change]] = {
        "with noise": [_noisy],
        "shifted": [_shifted],
        "flipped": [lambda image, own, _: (flipped(image, flip), flipped(own, flip))],
        "in other intensities": [lambda image, own, _: (OFFSET + FACTOR * image**GAMMA, own)],
    }
    if codec is not None:
        kinds["through the autoencoder"] = [lambda image, own, _: (_reconstructed(codec, image), own)]
    kinds["all together"] = [change for changes in reversed(kinds.values()) for change in changes]
    copies = {}
    for kind, changes in kinds.items():
        made = [(torch.as_tensor(one.image), torch.as_tensor(one.own)) for one in originals]
        for change in changes:
            made = [change(*pair, generator) for pair in made]
        named = zip(originals, made, strict=True)
        copies[kind] = [NamedVolume(one.name, image.numpy(), own.numpy()) for one, (image, own) in named]
    return copies


def _noisy(image: torch.Tensor, own: torch.Tensor, generator: torch.Generator) -> Pair:
    return (image + NOISE * torch.randn(image.shape, generator=generator)).clamp(0, 1), own


def _shifted(image: torch.Tensor, own: torch.Tensor, generator: torch.Generator) -> Pair:
    steps = (SHIFT * (2 * torch.randint(0, 2, (3,), generator=generator) - 1)).tolist()
    return moved(image, steps), moved(own, steps)


def _reconstructed(codec: LatentCodec, image: torch.Tensor) -> torch.Tensor:
    return codec.reconstruct(image[None].to(codec.latent_mean.device))[0].cpu().clamp(0, 1)
