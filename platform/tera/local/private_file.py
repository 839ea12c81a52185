"""Files and directories that only their owner can read."""

import os
import stat
from pathlib import Path

from tera.errors import StartError


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read: whole or not at all, also if the power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)  # or the name may last, and what it names not
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def private_directory(path: Path) -> Path:
    """Return a directory that only its owner can enter, made if it is missing.

    Raises:
        StartError: others can enter it, or it belongs to somebody else.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # In a directory like /tmp somebody else may have made it before, or a link in its place.
    found = path.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise StartError(
            f"{path} is not a directory that only you can enter. Remove it, or set TMPDIR."
        )
    return path
