"""Files that are complete or absent: atomic writes, durability, digests, and errors that say what to do.

It knows the operating system only; `directory`, `recorder` and `checkpoint` build on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

_ADVICE: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ENOSPC: "the disk is full; free some space, keep fewer checkpoints, or choose another `root`",
        errno.EDQUOT: "the disk quota is used up; free some space, or choose another `root`",
        errno.EFBIG: "the file would be larger than this process may write; raise the limit (`ulimit -f`)",
        errno.EACCES: "permission denied; give this user the right to write there, or choose another `root`",
        errno.EPERM: "not permitted; give this user the right to write there, or choose another `root`",
        errno.EROFS: "the file system is read-only; choose another `root`",
        errno.ENOTDIR: "a part of the path is a file, not a directory; choose another `root`",
        errno.EEXIST: "a file of that name is in the way; remove it, or choose another `root`",
    }
)


class RunDirectoryError(RuntimeError):
    """A run's directory cannot be written; the message names the path, the cause and what to do."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an `OSError` of the block, which writes `path`, into a `RunDirectoryError` with what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0)
        raise RunDirectoryError(f"cannot write {path}: {advice or reason}") from error


def fsync(path: Path) -> None:
    """Waits until what a file, or the names that a directory holds, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what the block writes there becomes `path`, complete and durable, or not
    at all. Raises `RunDirectoryError`; the temporary file is gone afterwards (`remove_temporaries` after a kill)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `path` completely and durably, or leaves it as it was; text is UTF-8.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.json"
    >>> write_atomic(path, "{}")
    >>> path.read_text(encoding="utf-8"), len(list(path.parent.iterdir()))
    ('{}', 1)
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_temporaries(directory: Path) -> None:
    """Removes what a killed writer left of atomic writes in `directory` (call only while no other process writes)."""
    for temporary in directory.glob(".*.tmp"):
        with explained(temporary):
            temporary.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or will be (its nearest existing parent)."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
