"""Which processes of this one's still run; one that has ended and was not waited for (a zombie) does not."""

from __future__ import annotations

import psutil


def descendants_running(words: str) -> list[int]:
    """Ids of the processes that this one has started, directly or not, whose command line holds `words`."""
    return [p.pid for p in psutil.Process().children(recursive=True) if words in _command(p)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # a zombie, or gone meanwhile
        return ""
