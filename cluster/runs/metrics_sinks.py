"""Which class implements which metrics sink. A new sink is a file, its key in `logging` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.runs.metrics_jsonl import JsonlSink
from cluster.runs.metrics_sink import MetricsSink
from cluster.runs.metrics_tensorboard import TensorboardSink

SINKS: dict[str, Callable[[Path], MetricsSink]] = {"jsonl": JsonlSink, "tensorboard": TensorboardSink}


def make_sinks(names: Iterable[str], directory: Path) -> list[MetricsSink]:
    """The named sinks of the run in `directory`."""
    return [SINKS[name](directory) for name in names]
