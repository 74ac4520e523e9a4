"""The metrics sink `jsonl`: one line of `metrics.jsonl` for each step, durable; and the reader of the file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.runs.atomic_files import RunDirectoryError, explained, fsync, write_atomic

logger = logging.getLogger(__name__)


class JsonlSink:
    """Implements `MetricsSink`. A line is on the disk when `write` returns, or not in the file at all."""

    def __init__(self, directory: Path) -> None:
        self._metrics = directory / "metrics.jsonl"

    def truncate_after(self, step: int) -> None:
        """See `MetricsSink`; a last line that a kill cut short is removed too."""
        kept = [line for line in _complete_lines(self._metrics) if line[0] <= step]
        if self._metrics.exists():
            write_atomic(self._metrics, b"".join(raw for _, raw in kept))
        if step > 0 and (not kept or kept[-1][0] != step):
            logger.warning("%s ends before step %d, from which the run resumes", self._metrics, step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `MetricsSink`."""
        del step  # among the values
        self._append(json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """See `MetricsSink`; every line is on the disk already."""

    def _append(self, line: bytes) -> None:
        with explained(self._metrics):
            created = not self._metrics.exists()
            descriptor = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    _write_all(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
            if created:
                fsync(self._metrics.parent)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a `metrics.jsonl`, in order; a last line that is still being written, or was cut short, is left out.

    Raises `RunDirectoryError` naming the line of any other line that is not a step. A missing file has no steps.

    >>> read_metrics(Path("nowhere/metrics.jsonl"))
    []
    """
    return [json.loads(raw) for _, raw in _complete_lines(path)]


def _complete_lines(path: Path) -> list[tuple[int, bytes]]:
    """(step, line with its end) of every complete line."""
    if not path.exists():
        return []
    with explained(path):
        lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, raw in enumerate(lines, start=1):
        if not raw.endswith(b"\n"):
            continue  # the last one
        try:
            found.append((int(json.loads(raw)["step"]), raw))
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path}, line {number}: not a step's metrics ({error}); remove the line, or restore the file"
            raise RunDirectoryError(message) from error
    return found


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
