"""A tiny codec, and cases for it, for the tests of what is encoded once."""

import numpy as np
import torch
from monai.networks.nets import AutoencoderKL
from monai.transforms import Compose, SpatialPadd

from latdiff3d.codec import LatentCodec
from latdiff3d.latent_cache import build
from latdiff3d.transforms import LoadVolumed, ScaleForegroundd

CPU = torch.device("cpu")
CROP, FACTOR, LATENTS = (8, 8, 8), 2, 2
SHAPE = (9, 10, 6)  # no multiple of the factor, larger than the crop, smaller than it


def make_codec(seed=0):
    torch.manual_seed(seed)
    network = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=LATENTS, channels=(4, 8), num_res_blocks=1,
        norm_num_groups=4, attention_levels=(False, False), with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    codec = LatentCodec(network, LATENTS).eval().requires_grad_(False)
    codec.num_volumes.fill_(1)
    return codec


def preprocessing(upper=99.5, keys=("image", "mask")):
    return Compose(
        [
            LoadVolumed(keys, allow_missing_keys=True),
            ScaleForegroundd("image", upper=upper),
            SpatialPadd(keys, spatial_size=CROP, mode=["edge", "constant"][: len(keys)], allow_missing_keys=True),
        ]
    )


def write_splits(folder, write_volume):
    """Write and return three cases to train on and one to validate on, each an image of noise in air and a mask."""
    cases, generator = [], np.random.default_rng(0)
    for number in range(4):
        image = np.zeros(SHAPE, np.float32)
        image[2:7, 3:9, 1:5] = generator.random((5, 6, 4)) + 0.1
        name, files = f"case_{number}", folder / "data"
        mask = write_volume(files / f"{name}_seg.nii", generator.integers(0, 3, SHAPE).astype(np.uint8))
        cases.append({"case": name, "image": [write_volume(files / f"{name}.nii", image)], "mask": mask})
    return {"train": cases[:3], "val": cases[3:]}


def built(folder, splits, codec, transforms=None, **settings):
    return build(folder, splits, codec, transforms or preprocessing(), CPU, crop_to=CROP, **settings)
