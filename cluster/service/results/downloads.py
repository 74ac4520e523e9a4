"""Logs and the model of a run, as they are sent: the end of a file, and a tar archive made while it is streamed.

It knows the file system only; links are never followed out of a run's directory.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.service.exceptions import NotFoundError
from cluster.service.vetting import redacted

_TAIL_BYTES = 1 << 20
_BLOCK = 1 << 20
_RECORD = 512


def list_logs(folder: Path) -> list[dict[str, Any]]:
    """Every log file below a run's `logs`, the driver's first."""
    found = []
    for path in sorted(folder.rglob("*"), key=lambda path: (path.name != "driver.log", path)):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            changed = datetime.fromtimestamp(status.st_mtime, UTC).isoformat().replace("+00:00", "Z")
            found.append({"name": str(path.relative_to(folder)), "bytes": status.st_size, "modified": changed})
    return found


def tail(folder: Path, name: str, *, lines: int) -> dict[str, Any]:
    """The last lines of one of these files, at most a MiB. Raises NotFoundError for what is none of them."""
    if name not in (entry["name"] for entry in list_logs(folder)):
        raise NotFoundError(f"there is no log {name[:200]}")
    with (folder / name).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        found = file.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines()
    if start and found:
        found = found[1:]  # its beginning is not there
    return {"file": name, "lines": redacted(found[-lines:]), "truncated": start > 0 or len(found) > lines}


def model_files(folder: Path) -> list[Path]:
    """The regular files of a model, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def archive_size(folder: Path, name: str) -> int:
    """Bytes of the archive that `archive` will make."""
    size = 0
    for path in model_files(folder):
        size += len(_header(path, folder, name)) + -(-path.stat().st_size // _RECORD) * _RECORD
    return size + 2 * _RECORD


def archive(folder: Path, name: str) -> Iterator[bytes]:
    """An uncompressed tar archive of a folder's files under `name/`, in pieces; weights do not compress."""
    for path in model_files(folder):
        header = _header(path, folder, name)
        yield header
        left = path.stat().st_size
        padding = -left % _RECORD
        with path.open("rb") as file:
            while left and (data := file.read(min(_BLOCK, left))):
                left -= len(data)
                yield data
        yield bytes(left + padding)  # `left` only where the file has shrunk meanwhile
    yield bytes(2 * _RECORD)


def _header(path: Path, folder: Path, name: str) -> bytes:
    status = path.stat()
    entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder)}")
    entry.size, entry.mtime, entry.mode = status.st_size, int(status.st_mtime), 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)
