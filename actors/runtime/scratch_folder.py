"""A temporary folder that leaves nothing behind, however the process that uses it ends.

Each is locked by the process that made it. The operating system lets go of the lock when that process ends, also by
SIGKILL, so that the next one finds and removes what was left. It knows the operating system only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")  # files that never touch a disk
_SPARE = 32 << 20  # bytes that others in the same memory need: vLLM's queues, Ray's channels
_YOUNG_S = 10.0  # a folder this new may not have been locked yet


@contextmanager
def scratch_folder(prefix: str, home: Path, *, needed: int = 0) -> Iterator[Path]:
    """An empty folder in `home`, removed afterwards; in the folder of temporary files where `home` does not exist or
    lacks room for `needed` bytes (containers have 64 MiB in memory, unless they ask for more).

    Folders of the same prefix whose process has ended are removed first, from both.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(prefix, parent)
    if home.is_dir():
        remove_abandoned(prefix, home)
        if not needed or needed + _SPARE <= shutil.disk_usage(home).free:
            parent = home
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(prefix: str, home: Path, *, now: float | None = None) -> None:
    """Remove the folders of that prefix whose process has ended; `now` is the time in seconds since 1970."""
    limit = (time.time() if now is None else now) - _YOUNG_S
    for folder in home.glob(f"{prefix}*"):
        try:
            if folder.stat().st_mtime > limit:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(lock)
