"""A place that the metrics of a run are written to. One file implements it for each kind (`metrics_sinks.SINKS`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class MetricsSink(Protocol):
    """Takes the metrics of one step after the other. Methods raise `RunDirectoryError` if they cannot write."""

    def truncate_after(self, step: int) -> None:
        """Forget what was written after `step`, from which a run resumes (below 0: all); before the first `write`."""
        ...

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """The metrics of a step, in order; None for a number that is not finite."""
        ...

    def close(self) -> None:
        """Everything is written, and nothing is held open."""
        ...
