"""The runs under a root as `rlhf runs` shows them, whatever state their files are in; nothing is changed.

It knows the run's directory and how its metrics are read, while another process may be writing them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from cluster.runs.adalora_ranks import RankTable, read_ranks
from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.checkpoint import checkpoint_steps
from cluster.runs.directory import RunDirectory, RunRecord
from cluster.runs.metrics_jsonl import read_metrics
from trainers.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `run.json` says, or why it cannot be read."""

    path: Path
    record: RunRecord | None
    unreadable: str | None = None

    @property
    def id(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def state(self) -> str:
        """As in `run.json`; `unreadable` where it is not known."""
        return self.record.state if self.record else "unreadable"

    def as_json(self) -> dict[str, Any]:
        """`run.json`, with the directory; or id, state `unreadable` and the reason."""
        if self.record:
            return {**self.record.model_dump(mode="json"), "id": self.id, "path": str(self.path)}
        return {"id": self.id, "state": self.state, "path": str(self.path), "unreadable": self.unreadable}


@dataclass(frozen=True, slots=True)
class RunDetails:
    """A run with what is in its directory."""

    run: RunSummary
    steps_recorded: int
    metrics: dict[str, Any] | None  # the last step's
    metrics_problem: str | None
    checkpoints: list[int]  # steps
    model: Path | None  # None: not written yet
    ranks: RankTable | None  # of an AdaLoRA adapter

    def as_json(self) -> dict[str, Any]:
        """For `rlhf runs show --json`."""
        return {
            "run": self.run.as_json(),
            "steps_recorded": self.steps_recorded,
            "metrics": self.metrics,
            "metrics_problem": self.metrics_problem,
            "checkpoints": self.checkpoints,
            "model": str(self.model) if self.model else None,
            "ranks": self.ranks.as_json() if self.ranks else None,
        }


def read_run(path: Path) -> RunSummary:
    """The run in a directory."""
    try:
        return RunSummary(path, RunDirectory(path).record())
    except UserError as error:
        return RunSummary(path, None, " ".join(error.problems[0].message.split()))


def list_runs(root: Path) -> list[RunSummary]:
    """Every run under a root, oldest first; a folder without `run.json` is not one. UserError if there is no root."""
    if not root.is_dir():
        raise UserError([Problem(str(root), "no such folder; give the folder that holds the runs with --root")])
    runs = [read_run(file.parent) for file in root.glob("*/run.json")]
    return sorted(runs, key=lambda run: (_age(run), run.id))


def _age(run: RunSummary) -> str:
    """Sorts like the time of creation; an id begins with it, to the second."""
    return f"{run.record.created.astimezone(UTC):%Y%m%d-%H%M%S-%f}" if run.record else run.id


def find_run(root: Path, run_id: str) -> RunSummary:
    """The run of that id, or the only one whose id begins so; UserError names runs that there are."""
    runs = list_runs(root)
    found = [run for run in runs if run.id == run_id] or [run for run in runs if run.id.startswith(run_id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            [Problem(run_id, f"matches several runs: {', '.join(run.id for run in found)}; write more of it")]
        )
    known = ", ".join(run.id for run in runs[-5:]) or "none"
    raise UserError([Problem(run_id, f"no such run in {root}; the last ones there: {known}")])


def details(run: RunSummary) -> RunDetails:
    """What the directory of a run holds now; broken metrics are said, not raised."""
    directory = RunDirectory(run.path)
    steps: list[dict[str, Any]] = []
    problem = None
    try:
        steps = read_metrics(directory.metrics)
    except RunDirectoryError as error:
        problem = str(error)
    return RunDetails(
        run=run,
        steps_recorded=len(steps),
        metrics=steps[-1] if steps else None,
        metrics_problem=problem,
        checkpoints=checkpoint_steps(directory.checkpoints),
        model=directory.model if directory.model.is_dir() else None,
        ranks=read_ranks(directory.model),
    )
