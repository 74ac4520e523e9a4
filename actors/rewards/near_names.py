"""Names that were probably meant, for the messages about names that do not exist. It knows the standard library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path


def names_in(folder: Path, suffix: str = "") -> list[str]:
    """What a folder holds, sorted; nothing if it does not exist."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(suffix)) if folder.is_dir() else []


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message: the name nearest to `name`, or a few that exist."""
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(repr, names[:5]))}" if names else ""
