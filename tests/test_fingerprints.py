"""Hashes change with what changes a result, and with nothing else."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.networks.nets import AutoencoderKL
from monai.transforms import Compose, ScaleIntensityRanged, SpatialPadd

from latdiff3d import fingerprints
from latdiff3d.codec import LatentCodec
from latdiff3d.errors import InputError
from latdiff3d.networks import placed
from latdiff3d.recompute import per_block
from latdiff3d.transforms import ScaleForegroundd

# Things


THINGS = [
    None, True, 1, 1.0, "1", b"1", [], [[]], [1], [1, 1], ["ab"], ["a", "b"], [["a"], "b"], {}, {"a": 1}, {"a": {}},
    {"a": {}, "b": 1}, {"a": {"b": 1}}, np.zeros(2), np.zeros((2, 1)), np.zeros(2, np.float32), torch.zeros(2),
    torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), torch.zeros(0), {"x"}, len, sum, int, np.clip, torch.float32,
]  # fmt: skip


def test_things_that_differ_have_hashes_that_differ():
    assert len({fingerprints.of(thing) for thing in THINGS}) == len(THINGS)


def test_a_hash_is_that_of_the_content_whatever_holds_it():
    for thing in THINGS:
        assert fingerprints.of(thing) == fingerprints.of(copy.deepcopy(thing))
    assert fingerprints.of(torch.arange(6).view(2, 3).T) == fingerprints.of(torch.arange(6).view(2, 3).T.contiguous())


def test_an_object_that_holds_itself_has_a_hash():
    one, other = [1], [2]
    one.append(one)
    other.append(other)
    assert fingerprints.of(one) != fingerprints.of(other)


# Files


def test_a_file_is_its_content(tmp_path, write_volume):
    one = write_volume(tmp_path / "one.nii.gz", np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    before = fingerprints.of_volume(one)
    (tmp_path / "other.nii.gz").write_bytes((tmp_path / "one.nii.gz").read_bytes())
    assert fingerprints.of_volume(str(tmp_path / "other.nii.gz")) == before
    plain = write_volume(tmp_path / "plain.nii", np.zeros((2, 2, 2), np.int16))
    stat, same_size = os.stat(plain), fingerprints.of_volume(plain)
    write_volume(tmp_path / "plain.nii", np.ones((2, 2, 2), np.int16))
    os.utime(plain, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (os.stat(plain).st_size, os.stat(plain).st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprints.of_volume(plain) != same_size


def test_voxels_in_a_file_beside_the_header_count(tmp_path):
    path = str(tmp_path / "a.mhd")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 2, 2), np.int16)), path)
    header, before = (tmp_path / "a.mhd").read_bytes(), fingerprints.of_volume(path)
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 2, 2), np.int16)), path)
    assert (tmp_path / "a.mhd").read_bytes() == header
    assert fingerprints.of_volume(path) != before


def test_a_file_that_is_gone_is_told(tmp_path):
    with pytest.raises(InputError, match=r"a\.nii cannot be read \(No such file"):
        fingerprints.of_volume(str(tmp_path / "a.nii"))


# Transforms


def pad(**settings):
    return Compose([ScaleForegroundd("image", upper=99.5), SpatialPadd("image", spatial_size=8, **settings)])


def test_every_setting_of_a_transform_counts_also_one_inside_another():
    found = [
        fingerprints.of_transforms(transforms)
        for transforms in (
            pad(),
            pad(mode="edge"),
            pad(method="end"),
            Compose([pad().transforms[1], pad().transforms[0]]),
            Compose([ScaleForegroundd("image", upper=99.0), pad().transforms[1]]),
            Compose([ScaleIntensityRanged("image", 0, 1, 0, 1), pad().transforms[1]]),
            Compose([ScaleIntensityRanged("image", 0, 2, 0, 1), pad().transforms[1]]),
        )
    ]
    assert len(set(found)) == len(found)
    assert fingerprints.of_transforms(pad()) == found[0]


def test_a_transforms_own_code_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for number in (1, 2):
        (tmp_path / "own_transform.py").write_text(
            f"class Own:\n    def __call__(self, x):\n        return x + {number}\n"
        )
        sys.modules.pop("own_transform", None)
        import own_transform

        found.add(fingerprints.of_transforms([own_transform.Own()]))
    assert len(found) == 2


def test_a_hash_is_the_same_in_another_process():
    code = (
        "from monai.transforms import *; from latdiff3d import fingerprints; from latdiff3d.transforms import *\n"
        "t = Compose([ScaleForegroundd('image', upper=99.5), SpatialPadd('image', spatial_size=8)])\n"
        "print(fingerprints.of_transforms(t), fingerprints.of({'a', 'b', 'c'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[-2:] == [fingerprints.of_transforms(pad()), fingerprints.of({"a", "b", "c"})]


# Codecs


def codec(seed=0, groups=4, precision="fp32", wrap=lambda network: network):
    torch.manual_seed(seed)
    network = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=2, channels=(4, 8), num_res_blocks=1,
        norm_num_groups=groups, attention_levels=(False, False), with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    return LatentCodec(wrap(network), 2, precision)


def test_weights_statistics_precision_and_what_no_weight_tells_count():
    shifted, rounded = codec(), codec()
    shifted.latent_mean[1] = 0.5
    with torch.no_grad():
        next(rounded.parameters()).view(-1)[0].add_(1e-6)
    all_of_them = [codec(), codec(seed=1), codec(groups=2), codec(precision="bf16"), shifted, rounded]
    assert len({fingerprints.of_codec(one) for one in all_of_them}) == len(all_of_them)


def test_what_changes_no_result_does_not_count():
    plain = fingerprints.of_codec(codec())
    assert fingerprints.of_codec(codec().eval().requires_grad_(False)) == plain
    assert fingerprints.of_codec(codec(wrap=per_block)) == plain
    assert fingerprints.of_codec(codec(wrap=lambda network: placed(network, torch.device("cpu")))) == plain
