"""Tables of `rlhf runs`. It knows rich and what cluster/runs/summary.py reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.runs.summary import RunDetails, RunSummary


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """One line for each run, with the headline metrics that any of them has."""
    shown = list(dict.fromkeys(key for run in runs if run.record for key in run.record.headline))
    table = Table("id", "name", "state", "step", *map(escape, shown))
    for run in runs:
        if run.record is None:
            table.add_row(escape(run.id), "", run.state, "", *[""] * len(shown))
            continue
        numbers = [_text(run.record.headline.get(key)) for key in shown]
        steps = f"{run.record.step} / {run.record.steps}"
        table.add_row(escape(run.id), escape(run.record.name), run.state, steps, *numbers)
    return table


def run_table(details: RunDetails) -> Table:
    """One run: `run.json`, what its directory contains, the last step's metrics."""
    table = Table("run", escape(details.run.id), show_header=True)
    values = details.as_json() | {"ranks": None}  # shown below, as a table
    for name, value in _rows("", {**values.pop("run"), **{key: values[key] for key in values if key != "metrics"}}):
        table.add_row(escape(name), escape(value))
    if details.metrics:
        table.add_section()
        for name, value in _rows("", details.metrics):
            table.add_row(escape(name), escape(value))
    if details.ranks:
        table.add_section()
        table.add_row("ranks", escape("\n".join(details.ranks.lines())))
    return table


def _rows(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted name and text of each value; absent and empty ones are left out."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _rows(f"{prefix}{key}.", value)
        elif value is not None and value != []:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
