"""A run as the API shows it: what its directory says, and what that means when the process behind it is gone.

It reads run directories and their locks and changes nothing; runs of the command line and of the service alike.
"""

from __future__ import annotations

import fcntl
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import kill
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Path as InPath
from pydantic import BaseModel

from cluster.runs.atomic_files import write_atomic
from cluster.runs.checkpoint import checkpoint_steps
from cluster.runs.directory import RunDirectory, RunError, RunRecord
from cluster.runs.summary import RunSummary, read_run
from cluster.service.errors import not_found
from cluster.service.vetting import redacted
from trainers.config import Config
from trainers.errors import UserError

Action: TypeAlias = Literal["stop", "pause", "resume", "clone", "delete", "chat", "download"]
Asked: TypeAlias = Literal["stop", "pause"]

ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
RunId: TypeAlias = Annotated[str, InPath(pattern=f"^{ID}$")]
_TAIL = 2000  # characters of a log that an error shows
_JOB = "job.json"
_HOLDER = re.compile(r"process (\d+) on (.+)")
_GOING = ("queued", "running")


class Job(Config):
    """`job.json` of a run that the service was asked to start: where it stands between the queue and Ray."""

    since: float
    """When it joined the queue, in seconds since 1970; the order of the queue."""
    submission: str | None = None
    """The Ray job's id; null while it waits."""
    asked: Asked | None = None
    """What was asked of it that has not happened yet."""


class QueuePlace(BaseModel):
    """Where a run stands in the queue, and why it waits. Position 0: it is starting."""

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
        """The directory of exactly this run. Raises ApiError 404."""
        path = self.root / run_id
        if not re.fullmatch(ID, run_id) or path.is_symlink() or not (path / "run.json").is_file():
            raise not_found(f"there is no run {run_id[:100]}")
        return RunDirectory(path)

    def ids(self) -> list[str]:
        """Every run's id, newest first (ids begin with the time)."""
        found = (file.parent for file in self.root.glob("*/run.json"))
        return sorted(
            (path.name for path in found if re.fullmatch(ID, path.name) and not path.is_symlink()), reverse=True
        )

    def show(self, run_id: str) -> Run:
        """One run as it is now, not to be changed. Raises ApiError 404."""
        directory = self.directory(run_id)
        files = (_identity(directory.path / "run.json"), _identity(directory.path / _JOB))
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
    if record.state == "stopped" and job is not None and job.asked == "pause":
        run.state = "paused"  # the queue will write it down
    if record.state == "running" and not is_held(directory):
        run.state, run.error = "failed", vanished(directory).model_dump()
        if job is not None and job.asked is not None:
            run.state, run.error, run.stopping = ("paused" if job.asked == "pause" else "stopped"), None, False
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


def is_held(directory: RunDirectory) -> bool:
    """Whether a process is running this run: the operating system lets go of the lock however it ends."""
    try:
        with (directory.path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # BlockingIOError, or a file system that knows no locks
        return True
    return False


def vanished(directory: RunDirectory) -> RunError:
    """The error of a run whose process ended without writing one down."""
    steps = checkpoint_steps(directory.checkpoints)
    advice = f"resume goes on from step {steps[-1]}" if steps else "there is no checkpoint yet; resume starts it anew"
    log = directory.logs / "driver.log"
    return RunError(
        role="driver",
        phase="train",
        type="Vanished",
        message=f"its process is gone without a word (killed, out of memory, the machine went down?); {advice}",
        log=str(log) if log.is_file() else None,
    )


def not_started(directory: RunDirectory) -> RunError:
    """The error of a run whose process ended before the run began: the end of what it wrote."""
    log = directory.logs / "driver.log"
    try:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    message = text[-_TAIL:] or "its process ended before the run began, and wrote nothing"
    return RunError(role="driver", phase="start", type="NotStarted", message=message, log=str(log) if text else None)


def interrupt(directory: RunDirectory) -> bool:
    """Ask a run of the command line on this machine to stop, as Ctrl-C would; False where its process is not here."""
    try:
        held_by = _HOLDER.fullmatch((directory.path / ".lock").read_text(encoding="utf-8").strip())
    except OSError:
        return False
    if held_by is None or held_by[2] != socket.gethostname() or not is_held(directory):
        return False
    try:
        kill(int(held_by[1]), signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def read_job(directory: RunDirectory) -> Job | None:
    """`job.json`; None for a run that the service was never asked to start."""
    try:
        return Job.model_validate_json((directory.path / _JOB).read_bytes())
    except (OSError, ValueError):
        return None


def write_job(directory: RunDirectory, job: Job) -> None:
    """Replace `job.json`."""
    write_atomic(directory.path / _JOB, job.model_dump_json(indent=2) + "\n")


def record_or_none(directory: RunDirectory) -> RunRecord | None:
    """`run.json`, where it can be read."""
    try:
        return directory.record()
    except UserError:
        return None


def matching(runs: Sequence[Run], *, states: Sequence[str], text: str) -> list[Run]:
    """Those in one of the states (none given: all) whose id or name holds the text."""
    wanted = text.lower()
    return [run for run in runs if (not states or run.state in states) and wanted in f"{run.id} {run.name}".lower()]
