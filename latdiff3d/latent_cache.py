"""The latent cache: whole volumes encoded once, by any number of ranks, found again by a hash of what they come from.

    <folder>/<codec>-<preprocessing>/<entry>, see latent_entries

Nothing in it is ever deleted but an entry that is torn.
"""

import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, RandomizableTrait
from torch.utils.data import DataLoader, Dataset

from latdiff3d import fingerprints
from latdiff3d.codec import LatentCodec
from latdiff3d.datalist import COARSE
from latdiff3d.distributed import num_ranks, rank, shared, together
from latdiff3d.errors import InputError
from latdiff3d.handlers import progress_bar
from latdiff3d.latent_entries import Entry, Flip, all_flips, encoded, is_whole, read, sweep, write
from latdiff3d.layouts import Case, files_of
from latdiff3d.readers import read_header

FORMAT = 1  # raised when an entry's layout or meaning changes


def build(
    folder: str | Path,
    splits: Mapping[str, Sequence[Case]],
    codec: LatentCodec,
    preprocessing: Compose,
    device: torch.device,
    flips: Sequence[int] = (),
    crop_to: Sequence[int] = (1, 1, 1),
    spacing: Sequence[float] | None = None,
    memory_gb: float | None = None,
    num_workers: int = 0,
) -> dict[tuple[str, Flip], Entry]:
    """Encode what the cache lacks, together with the other ranks, and return the entry of each case and flip.

    Args:
        folder: of the cache; all ranks must share it.
        splits: "train", whose cases are needed in every flip, and "val".
        codec: measured.
        preprocessing: makes `image` (C, D, H, W) in [0, 1] and `mask` (1, D, H, W) of a case; nothing random.
        device: where to encode.
        flips: axes; their 2^n combinations are entries of their own, for a flipped volume's latents are not the flip
            of its latents.
        crop_to, spacing: of the configuration. Volumes no larger than a crop are encoded at once; both tell how much
            disk is needed.
        memory_gb: larger volumes are encoded by tiles if memory would rise by more; see `LatentCodec.encode`.
        num_workers: processes that read and preprocess.

    Raises:
        InputError: on all ranks: random preprocessing, a case that cannot be read, too little disk space, or a folder
            that the ranks don't share.
    """
    _refuse_random(preprocessing)
    variants = all_flips(flips)
    jobs = [(case, flip) for case in splits["train"] for flip in variants]
    jobs += [(case, ()) for case in splits["val"]]
    made_by = fingerprints.of_codec(codec), fingerprints.of_transforms(preprocessing)
    place = Path(folder) / "-".join(part[:12] for part in made_by)
    contents = shared(sorted({path for case, _ in jobs for path in files_of(case)}), fingerprints.of_volume)
    places = [place / _key(case, flip, made_by, contents) for case, flip in jobs]
    whole = shared(places, is_whole)
    missing = [(case, flip, path) for (case, flip), path in zip(jobs, places, strict=True) if not whole[path]]
    _announce(Path(folder), set(places), missing, codec, crop_to, spacing)

    by_case = [list(group) for _, group in itertools.groupby(missing, key=lambda job: job[0]["case"])]
    at_once = math.prod(crop_to)

    def encode() -> None:
        own = by_case[rank() :: num_ranks()]
        volumes = DataLoader(
            _Volumes([group[0][0] for group in own], preprocessing),
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # or a run that encodes would have other random numbers after it
        )
        with progress_bar(total=sum(map(len, own)), desc="encoding", unit="volume") as bar:
            for group, volume in zip(own, volumes, strict=True):
                for case, flip, path in group:
                    write(path, *encoded(volume, flip, codec, device, at_once, memory_gb), {"case": case["case"]})
                    bar.update()

    if missing:
        sweep(place)
        together(encode)
    entries = together(lambda: [read(path, codec.factor) for path in places])[rank()]
    return {(case["case"], flip): entry for (case, flip), entry in zip(jobs, entries, strict=True)}


def estimated_bytes(
    case: Case, latent_channels: int, factor: int, crop_to: Sequence[int], spacing: Sequence[float] | None
) -> int:
    """Return the size of an entry of `case`, from its header alone."""
    header = read_header(case["image"][0])
    order = nib.orientations.io_orientation(header.affine)[:, 0].astype(int)
    size, spacing_mm = np.empty(3), np.empty(3)
    size[order], spacing_mm[order] = header.shape[:3], nib.affines.voxel_sizes(header.affine)
    if spacing is not None:
        size = np.ceil(size * spacing_mm / np.array(spacing))
    cells = np.ceil(np.maximum(size, crop_to) / factor).prod()
    return int(cells * (2 * 4 * latent_channels + ("mask" in case) * factor**3))  # float32 mean and std, uint8 mask


class _Volumes(Dataset):
    """Cases preprocessed: `image`, and `mask` in uint8, as plain tensors."""

    def __init__(self, cases: Sequence[Case], preprocessing: Compose) -> None:
        self.cases = cases
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        case = {key: value for key, value in self.cases[index].items() if key in ("image", "mask", COARSE)}
        volume = self.preprocessing(case)
        image = {"image": volume["image"].as_tensor()}
        return image | ({"mask": volume["mask"].as_tensor().to(torch.uint8)} if "mask" in case else {})


def _refuse_random(preprocessing: Compose) -> None:
    for transform in preprocessing.flatten().transforms:
        if isinstance(transform, RandomizableTrait):
            raise InputError(
                f"{type(transform).__name__} is random, and what it makes would be encoded once for all; expected "
                "nothing random in preprocessing. Take it out, or set encode=on_the_fly."
            )


def _key(case: Case, flip: Flip, made_by: tuple[str, str], contents: Mapping[str, str]) -> str:
    images, mask = [contents[str(path)] for path in case["image"]], contents.get(str(case.get("mask")))
    coarse = [COARSE] if case.get(COARSE, False) else []  # what the mask becomes, and so the mask that is kept
    return fingerprints.of([FORMAT, *made_by, images, mask, list(flip), *coarse])


def _announce(
    folder: Path,
    wanted: set[Path],
    missing: Sequence[tuple[Case, Flip, Path]],
    codec: LatentCodec,
    crop_to: Sequence[int],
    spacing: Sequence[float] | None,
) -> None:
    """Say what will be written and what lies there besides; refuse a disk that is too small for it."""
    channels = len(codec.latent_mean)

    def announce() -> None:
        if rank() > 0:
            return
        needed = sum(estimated_bytes(case, channels, codec.factor, crop_to, spacing) for case, *_ in missing)
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
        if needed > free:
            raise InputError(
                f"the latent cache {folder} needs {needed / 1e9:.3g} GB more, and its disk has {free / 1e9:.3g} GB "
                "free; expected room for it. Set latent_cache to another disk, delete old entries, or set "
                "encode=on_the_fly."
            )
        print(
            f"latent cache {folder}: {len(wanted) - len(missing)} of {len(wanted)} entries are there, {len(missing)} "
            f"to encode, about {needed / 1e9:.3g} GB; {free / 1e9:.3g} GB free",
            flush=True,
        )
        others = [path for path in folder.glob("*/*") if path not in wanted]
        if others:
            held = sum(file.stat().st_size for path in others for file in path.glob("*"))
            print(
                f"latent cache {folder}: {len(others)} more entries, {held / 1e9:.3g} GB, are of other codecs, "
                f"settings or files and stay; to free the disk, delete {folder}: what is needed is encoded again",
                flush=True,
            )

    together(announce)
