"""What a file says of where it comes from: a mark in its header, a JSON sidecar beside it; both written and found.

The mark is there twice, so that one survives a tool that drops the other: in words in the NIfTI header's `descrip`, and
as JSON in a header extension, which holds more than 79 characters: the model, the seed and the mask, by their hashes
and without a name or a path. All else is in the sidecar, `<case>.json` for `<case>_<modality>.nii.gz`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import torch
from nibabel.nifti1 import Nifti1Extension

from latdiff3d import __version__
from latdiff3d.checkpoints import sha256
from latdiff3d.errors import InputError
from latdiff3d.readers import read_header

# What headers say, so that a volume is never taken for a patient's; NIfTI allows 79 characters.
MARK = "SYNTHETIC"
DESCRIPTIONS = {
    "volume": f"{MARK} volume, not a patient's; latdiff3d {__version__}",
    "reconstruction": f"{MARK}: an autoencoder's view of a scan, no scan; latdiff3d {__version__}",
    "edited": f"{MARK} in a part: an EDITED scan, not as acquired; latdiff3d {__version__}",
    "error": f"{MARK}: an autoencoder's error on a scan, no scan; latdiff3d {__version__}",
    "mask": f"the mask these {MARK} volumes were made for",
}
COMMENT = 6  # the code of a NIfTI extension of text
IN_HEADER = ("SyntheticData", "GeneratedBy", "Seed", "Sampler", "Steps", "Guidance", "Units")
BY_HASH = ("Checkpoint", "Mask", "Image", "Region")  # one file, or a list of them

_NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Inspection:
    """What a NIfTI file says of where it comes from.

    Attributes:
        description: the header's, as it stands.
        found_in: where a mark of ours is: "description", "extension", "sidecar"; none for any other file.
        version: of latdiff3d, or None.
        said: what is known of its making, by the sidecar's keys.
        sidecar: that tells of the file, or None.
        unchanged: whether the file's SHA-256 is that in the sidecar; None without one.
    """

    path: Path
    description: str
    found_in: tuple[str, ...]
    version: str | None
    said: Mapping[str, Any]
    sidecar: Path | None
    unchanged: bool | None

    @property
    def is_synthetic(self) -> bool:
        """Say whether any mark of ours is there; its absence does not say that a file is real."""
        return bool(self.found_in)

    def report(self) -> str:
        """Return what a person wants to know, a line each."""
        if not self.is_synthetic:
            if self.description == DESCRIPTIONS["mask"]:
                return f"{self.path} is {self.description}, not itself synthetic"
            return f"{self.path} has no mark of latdiff3d, which does not say that it is a real scan"
        facts = {
            "says": self.description or "nothing in its description",
            "mark in": ", ".join(self.found_in),
            "model": _named(self.said.get("Checkpoint")),
            "seed": self.said.get("Seed"),
            "mask": _named(self.said.get("Mask")),
            "image": _named(self.said.get("Image")),
            "region": _named(self.said.get("Region")),
            "units": self.said.get("Units"),
            "sidecar": self.sidecar or "none beside it",
            "file": {True: "as it was written", False: "CHANGED since it was written", None: None}[self.unchanged],
        }
        lines = [f"  {name:<8} {fact}" for name, fact in facts.items() if fact is not None]
        return "\n".join([f"{self.path} is SYNTHETIC, made by latdiff3d {self.version or '(which version?)'}", *lines])


def inspect(path: str | Path) -> Inspection:
    """Tell what a NIfTI file is by its header and the sidecar beside it.

    Raises:
        InputError: the file is missing, no NIfTI file or damaged, or a sidecar of ours is no JSON.
    """
    path = Path(path)
    read_header(str(path))
    if not path.name.lower().endswith(_NIFTI):
        raise InputError(f"{path} is no NIfTI file; expected .nii.gz or .nii, for latdiff3d writes no other.")
    header: Any = nib.load(path).header
    description = bytes(header["descrip"].item()).split(b"\0")[0].decode("utf-8", "replace").strip()
    extension = _extension(header)
    sidecar, beside = _sidecar(path)
    listed = beside.get("Files", {}).get(path.name, {})
    found = {
        "description": description.startswith(MARK) and "latdiff3d" in description,
        "extension": bool(extension),
        "sidecar": sidecar is not None and listed.get("Kind") != "mask",
    }
    said = beside or extension
    version = re.search(r"latdiff3d (\S+)$", description)
    return Inspection(
        path,
        description,
        tuple(place for place, is_there in found.items() if is_there),
        said.get("GeneratedBy", {}).get("Version") or (version and version[1]),
        said,
        sidecar,
        listed["SHA256"] == sha256(path) if listed else None,
    )


def sidecar_of(provenance: Mapping[str, Any], files: Mapping[Path, str]) -> dict[str, Any]:
    """Return what a sidecar holds: what made the files, by BIDS's names where it has them, and their hashes.

    Args:
        provenance: what is the writer's own: model, seed, sampler, units.
        files: written already; what each is, of `DESCRIPTIONS`.
    """
    generated = {"Name": "latdiff3d", "Version": __version__, "SourceSHA256": source_sha256()}
    listed = {path.name: {"Kind": kind, "SHA256": sha256(path)} for path, kind in files.items()}
    return {"SyntheticData": True, "GeneratedBy": generated, **provenance, "Files": listed}


def mark(image: nib.Nifti1Image, kind: str, provenance: Mapping[str, Any]) -> None:
    """Write into a NIfTI header what the file is, and unless it is a mask, an extension with the essentials.

    Args:
        kind: of `DESCRIPTIONS`.
        provenance: as for `sidecar_of`.
    """
    image.header["descrip"] = DESCRIPTIONS[kind]
    if kind == "mask":
        return
    sidecar = sidecar_of(provenance, {})
    said = {key: sidecar[key] for key in IN_HEADER if key in sidecar}
    del said["GeneratedBy"]["SourceSHA256"]  # or the volumes of two states of the code would never be equal files
    said |= {key: _hashes(sidecar[key]) for key in BY_HASH if sidecar.get(key)}
    image.header.extensions.append(Nifti1Extension(COMMENT, json.dumps({"latdiff3d": said}).encode()))


def computed_on(device: torch.device, precision: str) -> dict[str, Any]:
    """Return what else a volume's last bits depend on: device, number format, threads and libraries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "Device": f"{device.type} ({name})",
        "Precision": precision,
        "NumThreads": torch.get_num_threads(),
        "Libraries": {"torch": str(torch.__version__), "monai": str(monai.__version__)},
    }


@cache
def source_sha256() -> str:
    """Return one hash of all of latdiff3d's own modules: what a version number leaves open."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _extension(header: Any) -> dict[str, Any]:
    """Return what an extension of ours says, nothing without one."""
    for extension in header.extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        if extension.get_code() == COMMENT and text.startswith('{"latdiff3d": '):
            return dict(json.loads(text.rstrip("\0 "))["latdiff3d"])
    return {}


def _sidecar(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the sidecar of ours that tells of `path`, and what it says."""
    beside = [other for other in path.parent.glob("*.json") if path.name.startswith(f"{other.stem}_")]
    for other in sorted(beside, key=lambda other: len(other.stem), reverse=True):
        try:
            said = json.loads(other.read_text())
        except ValueError as error:
            raise InputError(f"{other}, beside the file, is no JSON ({error}); restore it or move it away.") from error
        is_ours = isinstance(said, dict) and said.get("SyntheticData") is True and "GeneratedBy" in said
        if is_ours and path.name in said.get("Files", [path.name]):  # an earlier version's sidecar lists none
            return other, said
    return None, {}


def _hashes(thing: Any) -> Any:
    """Return a sidecar's file, or list of files, without names and paths."""
    return [_hashes(each) for each in thing] if isinstance(thing, list) else {"SHA256": thing["SHA256"]}


def _named(thing: Any) -> str | None:
    if not thing:
        return None
    if isinstance(thing, list):
        return "; ".join(str(_named(each)) for each in thing)
    name = thing.get("Path") or thing.get("Name")
    return f"{name}, SHA-256 {thing['SHA256']}" if name else f"SHA-256 {thing['SHA256']}"
