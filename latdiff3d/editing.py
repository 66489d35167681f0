"""A region of a real scan made anew: on the way there onto the model's grid, on the way back into the scan's voxels.

Outside the region every number is the scan's, as its file stores it. Inside, the volume that was decoded is brought to
the scan's intensities, and a membrane over what it is off by along the region's border is added, so that an error of
the autoencoder leaves no step. Noise as strong as the scan's is laid over it, for an autoencoder keeps hardly any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ResampleToMatch, SpatialPad
from scipy import ndimage
from torch.nn import functional as F

from latdiff3d import intensities
from latdiff3d.blending import Known
from latdiff3d.checks import affine_problem, grid_problem
from latdiff3d.codec import LatentCodec
from latdiff3d.conditioning import Condition
from latdiff3d.errors import InputError
from latdiff3d.guidance import Guidance
from latdiff3d.membrane import membrane
from latdiff3d.readers import read_header, read_volume, shape_problem, size_text
from latdiff3d.scan_noise import noise_level, unit_noise
from latdiff3d.stored_scans import StoredChannel, read_stored
from latdiff3d.synthesizer import Synthesizer
from latdiff3d.volumes import ModelGrid, labels_of, place_mask

TOUCHED = 1e-3  # of a voxel of the model's grid: a smaller share of it in the region is rounding
GUIDANCE = 2.0  # by benchmarks/edit.py
NOISE_MARGIN = 3  # voxels around a region's box whose noise is told with it
ROUNDING = 1e-5  # of the range of intensities, between a file's numbers and a preprocessed volume's


@dataclass(frozen=True)
class Site:
    """A scan, the mask drawn for it, and the region that is to be made anew.

    Attributes:
        files: of the scan.
        channels: its modalities, as stored.
        affine: (4, 4), voxel to RAS mm, of all the files.
        region: (D, H, W), True where voxels will change: the region without the air that no label lies in.
        air: (D, H, W), True where every modality holds its background.
        labels: (D, H, W), the mask's.
        reference: what the model's 0 and 1 are in the scan's intensities.
        grid: of the mask, cut around the region.
        image: (C, D', H', W') in [0, 1], the scan on it.
        free: (1, D', H', W') float, above 0 in the region.
    """

    files: Sequence[str]
    channels: Sequence[StoredChannel]
    affine: np.ndarray
    region: np.ndarray
    air: np.ndarray
    labels: np.ndarray
    reference: intensities.Reference
    grid: ModelGrid
    image: torch.Tensor
    free: torch.Tensor

    @property
    def spacing_mm(self) -> np.ndarray:
        """Return the voxel size (3,) in mm, in the files' order of axes."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def volume_mm3(self) -> float:
        """Return how much is made anew."""
        return float(self.region.sum() * self.spacing_mm.prod())

    def known(self, codec: LatentCodec) -> Known:
        """Return the scan's latents, the posterior's mean, free where a latent cell holds a voxel of the region."""
        device = codec.latent_mean.device
        latents, _ = codec.encode(self.image[None].to(device))  # (1, C', D'/f, H'/f, W'/f)
        return Known(latents, F.max_pool3d(self.free[None].to(device), codec.factor) > 0)

    def filled(self, volume: torch.Tensor, noise_seed: int | None = None) -> list[StoredChannel]:
        """Return the scan's channels with the region of `volume` (C, D', H', W'), in [0, 1] on the model's grid.

        Args:
            noise_seed: lay noise over the region, of this seed, as strong as the scan's own there; None: none.
        """
        box = _box(self.region, margin=NOISE_MARGIN)
        region, tissue = self.region[box], ~self.air[box]
        made = np.stack([channel[box] for channel in self.grid.to_mask_grid(volume)])
        scan = np.stack([channel.intensities[box] for channel in self.channels])
        low, high = (np.array([getattr(each, end) for each in self.reference.ranges]) for end in ("low", "high"))
        made = low[:, None, None, None] + made.astype(np.float64) * (high - low)[:, None, None, None]
        # Air is no border: what it is off by says nothing of tissue beside it.
        new = made + membrane(scan - made, region, ~region & tissue, self.spacing_mm.tolist())
        if noise_seed is not None:
            unit = unit_noise(len(new), region.shape, self.affine, noise_seed)
            for before, channel, noise in zip(scan, new, unit, strict=True):
                missing = noise_level(before, tissue) ** 2 - noise_level(channel, region) ** 2
                channel += np.sqrt(max(missing, 0)) * noise
        changed = []
        for channel, values in zip(self.channels, new, strict=True):
            whole = np.zeros(self.region.shape)
            own = channel.intensities[~self.air]
            whole[box] = values.clip(own.min(), own.max())
            changed.append(channel.changed(self.region, whole))
        return changed


@dataclass(frozen=True)
class Edit:
    """An edited scan on its own grid, in its own intensities.

    Attributes:
        site: what was edited.
        channels: the modalities, as they are stored.
        decoded: (C, D', H', W') in [0, 1] on the model's grid, before it was brought into the scan.
    """

    site: Site
    channels: Sequence[StoredChannel]
    decoded: torch.Tensor

    @property
    def affine(self) -> np.ndarray:
        """Return (4, 4), voxel to RAS mm."""
        return self.site.affine

    @property
    def volume(self) -> np.ndarray:
        """Return (C, D, H, W), float64, in the scan's units."""
        return np.stack([channel.intensities for channel in self.channels])

    def scaled(self, channels: Sequence[StoredChannel]) -> np.ndarray:
        """Return the scan's `channels`, or the edited ones, in [0, 1] as the model sees them, to be looked at."""
        volumes = [
            (channel.intensities - each.low) / (each.high - each.low)
            for channel, each in zip(channels, self.site.reference.ranges, strict=True)
        ]
        return np.where(self.site.air, 0, np.stack(volumes).clip(0, 1)).astype(np.float32)


def site_of(
    files: Sequence[str],
    mask: str | Path,
    region: str | Path | None,
    preprocessing: Compose,
    crop_to: Sequence[int],
    factor: int,
    label_map: Mapping[int, int] | None = None,
) -> Site:
    """Return where a scan is to be edited; all that can be wrong with the three is found here.

    Args:
        files: of the scan, see `layouts.scan_files`.
        mask: its file, on the scan's grid, what is to be there drawn in; outside the region it says what is there.
        region: a file on the scan's grid, above 0 where the scan is to be made anew; None: the mask's labels, if they
            are one connected part, and as much around them as a latent cell is long.
        preprocessing: the model's.
        crop_to: (D, H, W), the model's.
        factor: voxels along a latent cell's edge.
        label_map: see `volumes.read_mask`; `preprocessing` maps too.

    Raises:
        InputError: a file that cannot be read or lies on another grid; a region that is empty, holds air alone, is too
            large for the crop, or covers all of the scan; or no region where the mask's labels are not one part.
    """
    affine = _one_grid([*files, str(mask), *([] if region is None else [str(region)])])
    stored = read_volume(str(mask))
    on_grid = preprocessing({"image": list(files), "mask": stored})
    channels, reference = read_stored(files), intensities.reference(files, preprocessing)
    labels = labels_of(stored, label_map)
    spacing_mm = np.linalg.norm(np.asarray(on_grid["image"].affine)[:3, :3], axis=0)
    margin_mm = factor * float(spacing_mm.max())
    name = f"{mask} with {margin_mm:.3g} mm around it" if region is None else str(region)
    wanted = _neighbourhood(labels, affine, margin_mm, mask) if region is None else _above_0(region)
    air = _air(channels, reference)
    inside = wanted & (~air | (labels > 0))
    if not inside.any():
        raise InputError(f"{name} holds the scan's background alone; expected a region of tissue. Draw it elsewhere.")
    if inside.all():
        raise InputError(f"{name} covers all of the scan; expected a part of it. Use latdiff3d sample for a whole one.")
    touched = MetaTensor(torch.from_numpy(wanted[None].astype(np.float32)), affine=torch.from_numpy(affine))
    matched = ResampleToMatch()(touched, on_grid["image"], mode="bilinear", padding_mode="zeros")
    free = (torch.as_tensor(matched) > TOUCHED).float()  # (1, D, H, W) of the whole scan
    _require_room(name, free, crop_to, factor)
    grid = place_mask(stored, on_grid["mask"], preprocessing, crop_to, around=free)
    image = grid.crop(SpatialPad(crop_to, mode="edge")(on_grid["image"]))  # padded as in training
    cropped = (torch.as_tensor(each) for each in (image, grid.crop(grid.pad(free))))
    return Site(files, channels, affine, inside, air, labels, reference, grid, *cropped)


def guidance_of_edits(own: Guidance, scale: float | None) -> Guidance:
    """Return the guidance of edits: of `scale`; where that is None, of the model's own, and where that is 1, GUIDANCE.

    Raises:
        InputError: a negative scale.
    """
    usual = GUIDANCE if own.scale == 1 else own.scale
    return replace(own, scale=usual if scale is None else scale)


def edited(
    site: Site,
    synthesizer: Synthesizer,
    covariates: torch.Tensor | None,
    seed: int,
    noise: bool = True,
    guidance: float | None = None,
) -> Edit:
    """Return a scan whose region shows what the mask has drawn there; all other voxels are the scan's own.

    What surrounds the region is known, and shows no lesion there; a denoiser that goes by it draws one too faintly.
    So its prediction is pushed away from that for the same mask without any label in the region.

    Args:
        site: from `site_of`.
        synthesizer: the model's.
        covariates: (1, N), NaN where nothing is known; None for a model without any.
        seed: of the noise.
        noise: lay noise as strong as the scan's over the region; an autoencoder keeps hardly any.
        guidance: how strongly, see `guidance_of_edits`; 1: not at all.

    Raises:
        InputError: negative guidance.
    """
    mask = site.grid.mask.as_tensor()
    drawn, without = (
        Condition(synthesizer.condition(each[None]), covariates) for each in (mask, mask.masked_fill(site.free > 0, 0))
    )
    guided = replace(synthesizer, guidance=replace(guidance_of_edits(synthesizer.guidance, guidance), against=without))
    known = site.known(synthesizer.codec)
    decoded = guided.sample(known.latents.shape[1:], drawn, [seed], known=known)[0].cpu()
    return Edit(site, site.filled(decoded, seed if noise else None), decoded)


def _one_grid(paths: Sequence[str]) -> np.ndarray:
    """Return the affine of all the files.

    Raises:
        InputError: if they have several, or one of them none that can be used.
    """
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        wrong = affine_problem(path, header.affine) or grid_problem(path, header, paths[0], headers[0])
        if wrong:
            raise InputError(wrong)
    return headers[0].affine


def _above_0(region: str | Path) -> np.ndarray:
    """Return where a region's file is above 0, (D, H, W)."""
    volume = read_volume(str(region))
    if problem := shape_problem(str(region), tuple(read_header(str(region)).shape), 1):
        raise InputError(problem)
    wanted = np.asarray(volume[0] > 0)
    if not wanted.any():
        raise InputError(f"{region} is empty; expected voxels above 0 where the scan is to be made anew.")
    return wanted


def _neighbourhood(labels: np.ndarray, affine: np.ndarray, margin_mm: float, mask: str | Path) -> np.ndarray:
    """Return the region of a mask that comes without one."""
    parts = ndimage.label(labels > 0, np.ones((3, 3, 3)))[1]
    if parts != 1:
        found = f"{parts} separate parts" if parts else "no label"
        raise InputError(f"{mask} has {found}, and no --region says where the scan is to be made anew; give --region.")
    distance_mm = ndimage.distance_transform_edt(labels == 0, sampling=nib.affines.voxel_sizes(affine))
    return distance_mm <= margin_mm


def _air(channels: Sequence[StoredChannel], reference: intensities.Reference) -> np.ndarray:
    """Return where every modality holds its background; nowhere, where one has none."""
    air = np.ones(channels[0].numbers.shape, bool)
    for channel, each in zip(channels, reference.ranges, strict=True):
        if each.background is None:
            return np.zeros_like(air)
        air &= np.abs(channel.intensities - each.background) <= ROUNDING * (each.high - each.low)
    return air


def _require_room(name: str, free: torch.Tensor, crop_to: Sequence[int], factor: int) -> None:
    """Refuse a region that the crop does not hold together with a latent cell around it, where the scan goes on."""
    size = np.array(free.shape[1:])
    box = np.array([int(p.max() - p.min()) + 1 for p in free[0].nonzero(as_tuple=True)])
    room = np.where(size <= crop_to, size, np.array(crop_to) - 2 * factor)
    if (box > room).any():
        raise InputError(
            f"{name} spans {size_text(box)} voxels on the model's grid (RAS); expected at most {size_text(room)}, the "
            "model's crop with a latent cell around it. Draw a smaller region, or several edits one after another."
        )


def _box(region: np.ndarray, margin: int) -> tuple[slice, ...]:
    """Return the box of what is True, and `margin` voxels around it, within the volume."""
    spans = [np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(max(int(span[0]) - margin, 0), int(span[-1]) + 1 + margin) for span in spans)
