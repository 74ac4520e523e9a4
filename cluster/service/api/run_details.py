"""What is shown of one run beyond its state: details, and the doctor's diagnosis. It reads the run's directory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from cluster import doctor
from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.checkpoint import checkpoint_steps
from cluster.service.exceptions import ConflictError
from cluster.service.queue import placed
from cluster.service.results.downloads import model_files
from cluster.service.results.samples import Query as SampleQuery
from cluster.service.results.samples import find_samples, sample_steps
from cluster.service.run_creation import COMMAND, config_of
from cluster.service.run_view import actions, view
from cluster.service.schemas import CheckpointInfo, ModelFiles, RunDetails
from cluster.service.state import AppState
from cluster.service.vetting import redacted, short_yaml

_RECENT = 10  # steps that the pace is taken from
_LOOKED_AT = 3  # steps whose samples the doctor sees, at the beginning and at the end
_ALL = 1 << 30


def run_details(parts: AppState, run_id: str) -> RunDetails:
    """Everything about one run but its curves and samples."""
    directory = parts.runs.directory(run_id)
    run = placed(view(directory), parts.queue.waiting())
    tree, config = config_of(directory)
    rows: list[dict[str, Any]] = []
    problem = None
    try:
        rows = parts.metrics.read(directory.metrics)
    except RunDirectoryError as error:
        problem = str(error)
    durations = [row.get("time/step_s") for row in rows[-_RECENT:]]
    pace = [seconds for seconds in durations if isinstance(seconds, int | float)]
    step_s = median(pace) if pace else None
    files = model_files(directory.model) if directory.model.is_dir() else []
    checkpoints = [
        CheckpointInfo(step=step, bytes=_bytes(directory.checkpoints / f"step-{step:06d}"))
        for step in checkpoint_steps(directory.checkpoints)
    ]
    return RunDetails(
        run=run,
        config=redacted(tree),
        yaml=redacted(short_yaml(config)) if config is not None else None,
        command=COMMAND,
        actions=actions(run, directory),
        path=str(directory.path),
        steps_recorded=len(rows),
        metrics=rows[-1] if rows else None,
        metrics_problem=problem,
        checkpoints=checkpoints,
        model=ModelFiles(bytes=sum(f.stat().st_size for f in files), files=len(files)) if files else None,
        step_s=step_s,
        remaining_s=step_s * (run.steps - run.step) if step_s is not None and run.state == "running" else None,
        samples={"step": sample_steps(directory.rollouts, "step"), "eval": sample_steps(directory.rollouts, "eval")},
    )


def diagnosis(parts: AppState, run_id: str) -> dict[str, Any]:
    """The doctor's findings, the most severe first. Raises ConflictError if the run's config cannot be read."""
    directory = parts.runs.directory(run_id)
    tree, _ = config_of(directory)
    if tree is None:
        raise ConflictError("the run's config.yaml cannot be read")
    rows = parts.metrics.read(directory.metrics)
    steps = sample_steps(directory.rollouts, "step")
    chosen = sorted({*steps[:_LOOKED_AT], *steps[-_LOOKED_AT:]})
    summaries = [_summary(directory.rollouts, step, _changed(directory.rollouts, step)) for step in chosen]
    try:
        found = doctor.diagnose(rows, tree, summaries)
    except ValidationError:
        raise ConflictError("the run's config is of another version") from None
    return {"findings": redacted([finding.as_json() for finding in found]), "steps": len(rows)}


def _changed(rollouts: Path, step: int) -> int:
    return (rollouts / f"step-{step:06d}.parquet").stat().st_mtime_ns


@lru_cache(maxsize=64)
def _summary(rollouts: Path, step: int, changed: int) -> doctor.SampleSummary:
    samples = find_samples(rollouts, SampleQuery(step=step, limit=_ALL)).samples
    rows = [doctor.SampleRow(s.id, s.group, s.completion, s.finish_reason, s.valid, s.rewards) for s in samples]
    return doctor.summarize(step, rows)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
