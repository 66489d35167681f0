"""An exported bundle goes to others: as a zip, with its weights or a list of where they are, or to Hugging Face."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import yaml
from monai.bundle import push_to_hf_hub

from latdiff3d import checkpoints, exported
from latdiff3d.bundle_files import has_weights, write_checksums
from latdiff3d.errors import InputError

LARGE_FILES = "large_files.yml"
HUB_CLIENTS = ("huggingface_hub", "httpx2", "httpx", "requests")  # whose errors are the hub's and the network's
FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # of a zip's files, so that the same bundle gives the same zip


def pack(bundle: str | Path, to: str | Path, weights_url: str | None = None) -> list[str]:
    """Write a bundle as a zip, in a folder of its name, as MONAI's specification and the Zoo have it.

    Args:
        bundle: its folder, with weights.
        to: the .zip file.
        weights_url: of a folder where the weights will be; they are left out, and large_files.yml names them there.

    Returns:
        the weights that are left out, as paths in the bundle.

    Raises:
        InputError: no exported bundle, or another ending than .zip.
    """
    root, target = _exported(bundle), Path(to)
    if target.suffix != ".zip":
        raise InputError(f"{target} does not end in .zip; give the file that the bundle is to be.")
    weights = [file for file, _, _ in exported.WEIGHTS.values()] if weights_url is not None else []
    with _copy(root) as copy:
        if weights_url is not None:
            (copy / LARGE_FILES).write_text(_large_files(copy, weights, weights_url))
            write_checksums(copy)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in copy.rglob("*") if path.is_file()):
                name = file.relative_to(copy).as_posix()
                if name not in weights:
                    entry = zipfile.ZipInfo(f"{root.name}/{name}", FIRST_DATE)
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    archive.writestr(entry, file.read_bytes())
        temporary.replace(target)
    return weights


def push(bundle: str | Path, repo: str, private: bool = True) -> str:
    """Push a bundle to the Hugging Face hub by MONAI's `push_to_hf_hub`, tagged with its version.

    Args:
        bundle: its folder, with weights.
        repo: user/name.
        private: whether only its owner sees a repository that is made.

    Returns:
        its address.

    Raises:
        InputError: no exported bundle, another kind of name, huggingface_hub is not installed, or the hub refuses.
    """
    root = _exported(bundle)
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InputError(f"--repo is {repo!r}; expected user/name.")
    if find_spec("huggingface_hub") is None:
        raise InputError("huggingface_hub is not installed; it sends bundles to the hub: pip install 'latdiff3d[hub]'.")
    version = json.loads((root / exported.METADATA).read_text())["version"]
    with _copy(root) as copy:
        for picture in (copy / "docs").glob("*.png"):  # MONAI copies the card to the top, whose links then point there
            shutil.copyfile(picture, copy / picture.name)
        write_checksums(copy)
        try:
            return str(push_to_hf_hub(repo, copy.name, str(copy.parent), private=private, version=version))
        except Exception as error:
            if not _is_of_the_hub(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"the hub did not take {root} as {repo}: {reason}") from error


def _is_of_the_hub(error: Exception) -> bool:
    """Say whether the hub, its client or the network refused, rather than that there is a mistake in code."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(HUB_CLIENTS)


def _exported(bundle: str | Path) -> Path:
    root = Path(bundle).resolve()
    if not (root / exported.METADATA).is_file() or not has_weights(root):
        raise InputError(f"{bundle} is no bundle with weights; expected a folder that latdiff3d export wrote.")
    return root


@contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """Yield a copy of the bundle under its own name, without what Python and checks left in it."""
    with tempfile.TemporaryDirectory(prefix="latdiff3d-share-") as place:
        leave_out = shutil.ignore_patterns("__pycache__", "runs", "samples", ".*")
        yield Path(shutil.copytree(root, Path(place) / root.name, ignore=leave_out))


def _large_files(root: Path, files: list[str], url: str) -> str:
    entries = [
        {
            "path": file,
            "url": f"{url.rstrip('/')}/{Path(file).name}",
            "hash_val": checkpoints.sha256(root / file),
            "hash_type": "sha256",
        }
        for file in files
    ]
    return yaml.safe_dump({"large_files": entries}, sort_keys=False)
