"""Metrics of a run for the page: read once, then only what was appended; selected and turned into columns.

It knows `metrics.jsonl` as the recorder writes it: complete lines are appended, and a resume replaces the file.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from cluster.runs.atomic_files import RunDirectoryError
from cluster.service.results.downsample import telling_rows

_MOST_ROWS = 200_000  # steps held in memory, of all files together; the last file stays whatever it holds


@dataclass(slots=True)
class _File:
    """One file as far as it has been read."""

    identity: tuple[int, int] = (0, 0)
    offset: int = 0
    lines: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class MetricsReader:
    """Metrics by file; the last few files stay in memory."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = Lock()

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Every step recorded so far, in order; not to be changed. Raises RunDirectoryError for a damaged line."""
        with self._lock:
            try:
                status = path.stat()
            except OSError:
                self._files.pop(path, None)
                return []
            file = self._files.pop(path, None)
            identity = (status.st_dev, status.st_ino)
            if file is None or file.identity != identity or status.st_size < file.offset:
                file = _File(identity=identity)
            if status.st_size > file.offset:
                _read_on(file, path)
            self._files[path] = file
            while len(self._files) > 1 and sum(len(kept.rows) for kept in self._files.values()) > _MOST_ROWS:
                self._files.popitem(last=False)
            return list(file.rows)


def _read_on(file: _File, path: Path) -> None:
    with path.open("rb") as opened:
        opened.seek(file.offset)
        data = opened.read()
    complete = data[: data.rfind(b"\n") + 1]
    for raw in complete.splitlines():
        file.lines += 1
        try:
            row = _parse(raw)
            row |= {"step": step_of(row)}
        except (ValueError, TypeError, KeyError) as error:
            raise RunDirectoryError(f"{path.name}, line {file.lines}: not a step's metrics ({error})") from error
        file.rows.append(row)
    file.offset += len(complete)


def step_of(row: Mapping[str, Any]) -> int:
    """The step that a row of `metrics.jsonl` is of."""
    return int(row["step"])


def _parse(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw, parse_constant=_nothing)


def _nothing(_: str) -> None:
    """What JSON does not have (NaN, infinity), from a file that something else wrote."""


def tag(path: Path) -> str:
    """An ETag of the file's content."""
    try:
        status = os.stat(path)
    except OSError:
        return '"0"'
    return f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


def select(
    rows: Sequence[Mapping[str, Any]], *, since: int | None, keys: Sequence[str], points: int
) -> list[dict[str, Any]]:
    """The steps after `since`, thinned to the `points` most telling ones (0: all), with these keys only (none: all).

    >>> select([{"step": i, "a": i == 3, "b": 0} for i in range(1, 8)], since=1, keys=["a"], points=3)
    [{'step': 2, 'a': False}, {'step': 3, 'a': True}, {'step': 7, 'a': False}]
    """
    found = [row for row in rows if since is None or step_of(row) > since]
    if points and len(found) > points:
        found = [found[i] for i in telling_rows(found, keys=keys, points=points)]
    if not keys:
        return [dict(row) for row in found]
    wanted = ("step", *keys)
    return [{key: row[key] for key in wanted if key in row} for row in found]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"step": […], "series": {key: […]}}; a step without a key has null there.

    >>> columns([{"step": 1, "a": 0.5}, {"step": 2, "b": 1}])
    {'step': [1, 2], 'series': {'a': [0.5, None], 'b': [None, 1]}}
    """
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "step"]
    return {"step": [step_of(row) for row in rows], "series": {key: [row.get(key) for row in rows] for key in keys}}
