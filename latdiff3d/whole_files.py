"""Files that are there whole or not at all, whenever a process is killed."""

import os
from pathlib import Path
from uuid import uuid4


def write(path: Path, content: str | bytes) -> None:
    """Write a file, in UTF-8 where it is text, so that `path` holds its old content or all of the new.

    Args:
        path: the file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
