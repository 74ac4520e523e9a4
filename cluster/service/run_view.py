"""A run as the API shows it: what its directory says, and what that means when the process behind it is gone.

It reads run directories and their locks and changes nothing; runs of the command line and of the service alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from cluster.jobs.job import JOB, current_state, is_held, read_job
from cluster.runs.directory import RunDirectory
from cluster.runs.summary import RunSummary, read_run
from cluster.service.exceptions import NotFoundError
from cluster.service.vetting import redacted

Action: TypeAlias = Literal["stop", "pause", "resume", "clone", "delete", "chat", "download"]

ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_GOING = ("queued", "running")


class QueuePlace(BaseModel):
    """A run's position in the queue, and why it waits. Position 0: it is starting."""

    position: int
    reason: str


class Run(BaseModel):
    """A run in every answer."""

    id: str
    name: str = ""
    state: str
    step: int = 0
    steps: int = 0
    created: str | None = None
    started: str | None = None
    ended: str | None = None
    headline: dict[str, float] = {}
    error: dict[str, Any] | None = None
    queue: QueuePlace | None = None
    stopping: bool = False
    by_service: bool = False
    versions: dict[str, str] = {}
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs under a root; those that have ended are remembered until their files change."""

    root: Path
    _ended: dict[str, tuple[object, Run]] = field(default_factory=dict, repr=False, compare=False)

    def directory(self, run_id: str) -> RunDirectory:
        """The directory of exactly this run. Raises NotFoundError."""
        path = self.root / run_id
        if not re.fullmatch(ID, run_id) or path.is_symlink() or not (path / "run.json").is_file():
            raise NotFoundError(f"there is no run {run_id[:100]}")
        return RunDirectory(path)

    def ids(self) -> list[str]:
        """Every run's id, newest first (ids begin with the time)."""
        found = (file.parent for file in self.root.glob("*/run.json"))
        return sorted(
            (path.name for path in found if re.fullmatch(ID, path.name) and not path.is_symlink()), reverse=True
        )

    def show(self, run_id: str) -> Run:
        """One run as it is now, not to be changed. Raises NotFoundError."""
        directory = self.directory(run_id)
        files = (_identity(directory.path / "run.json"), _identity(directory.path / JOB))
        known = self._ended.get(run_id)
        if known is not None and known[0] == files:
            return known[1]
        run = view(directory)
        if run.state in ("succeeded", "failed", "stopped") and run.ended is not None:
            self._ended[run_id] = files, run
        return run


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def view(directory: RunDirectory) -> Run:
    """What the directory says; `running` without a process is shown as failed."""
    summary = read_run(directory.path)
    job = read_job(directory)
    if summary.record is None:
        return Run(id=summary.id, state="unreadable", unreadable=summary.unreadable, by_service=job is not None)
    record = summary.record
    run = Run.model_validate({**_plain(summary), "by_service": job is not None})
    if record.state in _GOING and job is not None:
        run.stopping = job.asked is not None
        if record.state == "queued":
            run.queue = QueuePlace(position=0, reason="starting" if job.submission else "waiting")
    state, error = current_state(directory, record, job)
    if state != record.state:
        run.state, run.stopping = state, False
        run.error = None if error is None else redacted(error.model_dump())
    return run


def _plain(summary: RunSummary) -> dict[str, Any]:
    assert summary.record is not None
    plain = summary.record.model_dump(mode="json")
    return {**plain, "id": summary.id, "error": redacted(plain["error"])}


def actions(run: Run, directory: RunDirectory) -> list[Action]:
    """What the state allows now."""
    able: list[Action] = []
    if run.state in _GOING and not run.stopping:
        able += ["stop", "pause"] if run.by_service else ["stop"]
    if run.state in ("paused", "stopped", "failed"):
        able.append("resume")
    if run.state != "unreadable":
        able.append("clone")
    forsaken = run.state == "queued" and not run.by_service and not is_held(directory)
    if run.state not in _GOING or forsaken:
        able.append("delete")
    if directory.model.is_dir():
        able += ["chat", "download"]
    return able


def matching(runs: Sequence[Run], *, states: Sequence[str], text: str) -> list[Run]:
    """Those in one of the states (none given: all) whose id or name holds the text."""
    wanted = text.lower()
    return [run for run in runs if (not states or run.state in states) and wanted in f"{run.id} {run.name}".lower()]
