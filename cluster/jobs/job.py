"""A run as a job: what became of its process, what was asked of it, and how it is interrupted.

It reads run directories and their locks; of Ray it knows only the id of a job.
"""

from __future__ import annotations

import fcntl
import re
import secrets
import signal
import socket
from os import kill
from typing import Literal, TypeAlias

from cluster.runs.atomic_files import write_atomic
from cluster.runs.checkpoint import checkpoint_steps
from cluster.runs.directory import RunDirectory, RunError, RunRecord, RunState
from trainers.config import Config
from trainers.errors import UserError

Asked: TypeAlias = Literal["stop", "pause"]

JOB = "job.json"
_TAIL = 2000  # characters of a log that an error shows
_HOLDER = re.compile(r"process (\d+) on (.+)")


class Job(Config):
    """`job.json` of a run that the service was asked to start: its place between the queue and Ray."""

    since: float
    """When it joined the queue, in seconds since 1970; the order of the queue."""
    submission: str | None = None
    """The Ray job's id, written before Ray is asked to start it; null before the first attempt."""
    unconfirmed: bool = False
    """Whether Ray may or may not have accepted the submission. It is only ever tried again under the same id, of which
    Ray accepts one job."""
    asked: Asked | None = None
    """What was asked of it that has not happened yet."""

    @property
    def started(self) -> bool:
        """Whether Ray has accepted it; until then it waits."""
        return self.submission is not None and not self.unconfirmed


def new_submission(run_id: str) -> str:
    """A new id for a run's Ray job."""
    return f"{run_id}-{secrets.token_hex(3)}"


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


def current_state(directory: RunDirectory, record: RunRecord, job: Job | None) -> tuple[RunState, RunError | None]:
    """A run's state and error as they are now: `running` without a process is not, and a pause may be written down
    later."""
    if record.state == "stopped" and job is not None and job.asked == "pause":
        return "paused", record.error
    if record.state != "running" or is_held(directory):
        return record.state, record.error
    if job is not None and job.asked is not None:
        return ("paused" if job.asked == "pause" else "stopped"), None
    return "failed", vanished(directory)


def vanished(directory: RunDirectory) -> RunError:
    """The error of a run whose process ended without writing one down."""
    steps = checkpoint_steps(directory.checkpoints)
    cause = "The driver process exited without reporting an error (killed, out of memory, or node failure?)"
    advice = f"resume continues from step {steps[-1]}" if steps else "no checkpoint yet; resume starts from step 0"
    log = directory.logs / "driver.log"
    return RunError(
        role="driver",
        phase="train",
        type="Vanished",
        message=f"{cause}; {advice}",
        log=str(log) if log.is_file() else None,
    )


def not_started(directory: RunDirectory) -> RunError:
    """The error of a run whose process ended before the run began: the end of what it wrote."""
    log = directory.logs / "driver.log"
    try:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    message = text[-_TAIL:] or "The driver process exited before the run began and wrote no log."
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
        return Job.model_validate_json((directory.path / JOB).read_bytes())
    except (OSError, ValueError):
        return None


def write_job(directory: RunDirectory, job: Job) -> None:
    """Replace `job.json`."""
    write_atomic(directory.path / JOB, job.model_dump_json(indent=2) + "\n")


def record_or_none(directory: RunDirectory) -> RunRecord | None:
    """`run.json`, where it can be read."""
    try:
        return directory.record()
    except UserError:
        return None
