"""Checkpoints in two phases: learners write shards into a partial directory, then one rename makes it exist.

`checkpoints/step-000010/` holds the shards, `driver.json` (the driver's complete state) and `manifest.json` (file →
size, SHA-256). The manifest is written last and removed first: a directory without one does not exist. It knows
pydantic and the file system; nothing of torch or of what the shards hold. One process writes at a time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator

from cluster.config.field_errors import field_errors
from cluster.runs.atomic_files import RunDirectoryError, explained, fsync, sha256_file, write_atomic
from cluster.runs.daemon_threads import map_concurrently
from trainers.config import Config
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

_MANIFEST: Final = "manifest.json"
_STATE: Final = "driver.json"
_SAVED: Final = re.compile(r"step-(\d{6,})")
_SET_ASIDE: Final = re.compile(r"\.(step-\d{6,})\.replaced")
_PARTIAL: Final = re.compile(r"\.step-\d{6,}\.partial")
_LEFT_OUT_OF_1: Final = ("optimizer_steps", "config_digest")  # of the driver's state; saved, and never used


class DriverState(Config):
    """What the driver must know to resume as if it had never stopped; every part is required, at save and at load."""

    schema_version: Literal[2] = 2
    """Of this layout."""
    step: int = Field(ge=0)
    """Steps done."""
    policy_version: int = Field(ge=0)
    """Of the weights in the shards."""
    kl: dict[str, Any]
    """State of the KL controller."""
    stream: dict[str, Any]
    """The data cursor: the position in the prompt stream."""
    scorer: dict[str, Any]
    """The reward normalizers' statistics."""

    @field_validator("kl", "stream", "scorer")
    @classmethod
    def _survives_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            restored = json.loads(json.dumps(value, allow_nan=False))
        except TypeError as error:
            raise ValueError(str(error)) from error
        if restored != value:
            raise ValueError("would come back from JSON as something else (a tuple, or a key that is not a string)")
        return value


class FileEntry(Config):
    """One file of a checkpoint."""

    size: int = Field(ge=0)
    """In bytes."""
    sha256: str = Field(pattern="[0-9a-f]{64}")
    """Hexadecimal digest of its content."""


class Manifest(Config):
    """The content of `manifest.json`: every file but itself, by its path inside the checkpoint."""

    schema_version: Literal[1] = 1
    """Of this layout."""
    step: int = Field(ge=0)
    """Steps done when it was saved."""
    files: dict[str, FileEntry]
    """Path inside the checkpoint → size and digest."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file was checked."""

    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run: `begin`, let the learners write, `commit`; `latest` and `load_state` to resume."""

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept")
        self.directory = directory
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty directory for the shards of `step`; what an interrupted save left is removed first."""
        partial = self._partial(step)
        with explained(partial):
            self._tidy()
            partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, state: DriverState) -> Checkpoint:
        """Makes the checkpoint of `step` exist, durably and at once, and removes those beyond `keep`.

        Every rank has written and closed its shards in the directory that `begin` gave. A checkpoint of the same
        step is replaced: at every moment one of the two can be loaded. Raises `RunDirectoryError` where a part is
        missing or cannot be written; the earlier checkpoints stay.
        """
        partial, final = self._partial(step), self._final(step)
        if state.step != step:
            raise RunDirectoryError(f"checkpoint of step {step}: the driver's state is of step {state.step}")
        if not any(path.is_file() for path in partial.rglob("*")):
            raise RunDirectoryError(f"checkpoint of step {step}: the learners wrote no shard into {partial}")
        with explained(final):
            (partial / _MANIFEST).unlink(missing_ok=True)  # of a commit that failed and is tried again
            write_atomic(partial / _STATE, json.dumps(state.model_dump(), indent=2, allow_nan=False))
            manifest = Manifest(step=step, files=_entries(partial))
            write_atomic(partial / _MANIFEST, manifest.model_dump_json(indent=2))
            aside = self.directory / f".{final.name}.replaced"
            if final.exists():
                _remove(aside)
                os.rename(final, aside)
            os.rename(partial, final)
            fsync(self.directory)
            self._tidy()
            self._prune(step)
        return Checkpoint(step, final)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, every digest checked; None where there is none. Changes nothing.

        A directory without a manifest never existed (it is logged). One whose files do not fit its manifest is
        refused with `UserError`, so that damage is seen and never passed over by going further back.
        """
        if not self.directory.is_dir():
            return None
        for path in sorted(self._present(), key=_step_of, reverse=True):
            if (path / _MANIFEST).exists():
                return verify(path)
            logger.warning("checkpoint %s was never finished (no %s): left out", path, _MANIFEST)
        return None

    def load_state(self, path: Path) -> DriverState:
        """The driver's complete state in the checkpoint at `path`. `UserError` names what is damaged or absent."""
        manifest, file = _read_manifest(path), path / _STATE
        if _STATE not in manifest.files:
            raise UserError([Problem(str(path), f"the checkpoint lacks {_STATE}, the driver's state")])
        if problem := _damage(path, _STATE, manifest.files[_STATE]):
            raise UserError([problem])
        parts = _upgraded(json.loads(file.read_bytes()))
        if lacking := [name for name in DriverState.model_fields if name not in parts]:
            why = "a run cannot resume from a part of its state"
            raise UserError(Problem(str(file), f"the driver's state lacks {name!r}; {why}") for name in lacking)
        try:
            return DriverState.model_validate(parts)
        except ValidationError as error:
            raise UserError(
                Problem(str(file), f"the driver's state, {detail.path}: {detail.message}")
                for detail in field_errors(error.errors(include_url=False))
            ) from error

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: a run that resumes from `step` makes its own."""
        with explained(self.directory):
            self._tidy()
            for path in list(self._present()):
                if _step_of(path) > step:
                    _remove(path)

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step:06d}.partial"

    def _final(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _present(self) -> Iterator[Path]:
        """Saved directories, and one that was set aside by a replacement that a kill cut short."""
        for path in self.directory.iterdir():
            aside = _SET_ASIDE.fullmatch(path.name)
            if _SAVED.fullmatch(path.name) or (aside and not (self.directory / aside[1]).exists()):
                yield path

    def _tidy(self) -> None:
        """Finishes or undoes what a kill cut short."""
        if not self.directory.is_dir():
            return
        for path in list(self.directory.iterdir()):
            if aside := _SET_ASIDE.fullmatch(path.name):
                final = self.directory / aside[1]
                if final.exists():
                    _remove(path)
                else:
                    os.rename(path, final)
            elif _PARTIAL.fullmatch(path.name):
                _remove(path)

    def _prune(self, committed: int) -> None:
        finished = checkpoint_steps(self.directory)
        kept = {committed, *sorted((step for step in finished if step != committed), reverse=True)[: self.keep - 1]}
        for path in list(self._present()):
            if _step_of(path) not in kept:
                _remove(path)


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of the finished checkpoints under `directory`, ascending; their digests are not checked.

    >>> checkpoint_steps(Path("nowhere"))
    []
    """
    finished = directory.glob(f"step-*/{_MANIFEST}")
    return sorted(_step_of(path.parent) for path in finished if _SAVED.fullmatch(path.parent.name))


def verify(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file read and compared with the manifest.

    Raises `UserError` naming each file that is missing or differs, or the manifest where there is none.
    """
    manifest = _read_manifest(path)
    found = map_concurrently(lambda item: _damage(path, *item), sorted(manifest.files.items()))
    if problems := [problem for problem in found if problem]:
        raise UserError(problems)
    return Checkpoint(manifest.step, path)


def _upgraded(parts: dict[str, Any]) -> dict[str, Any]:
    """The driver's state as the layout of this version has it."""
    if parts.get("schema_version") != 1:
        return parts
    return {name: part for name, part in parts.items() if name not in _LEFT_OUT_OF_1} | {"schema_version": 2}


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(".").removesuffix(".replaced").removeprefix("step-"))


def _remove(path: Path) -> None:
    """The manifest goes first: a directory that is half removed does not exist."""
    if path.exists():
        (path / _MANIFEST).unlink(missing_ok=True)
        fsync(path)
        shutil.rmtree(path)


def _entries(directory: Path) -> dict[str, FileEntry]:
    """Size and digest of every file under `directory`, each made durable, and the directories that name them."""
    paths = sorted(directory.rglob("*"))
    for path in paths:
        fsync(path)
    files = [path for path in paths if path.is_file()]
    digests = map_concurrently(sha256_file, files)  # hashing releases the interpreter's lock
    return {
        path.relative_to(directory).as_posix(): FileEntry(size=path.stat().st_size, sha256=digest)
        for path, digest in zip(files, digests, strict=True)
    }


def _read_manifest(path: Path) -> Manifest:
    file = path / _MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError([Problem(str(path), f"is not a checkpoint: it has no {_MANIFEST}")]) from None
    except (OSError, ValidationError) as error:
        raise UserError([Problem(str(file), f"cannot be read: {error}; {_advice(path)}")]) from error


def _damage(path: Path, name: str, entry: FileEntry) -> Problem | None:
    file = path / name
    try:
        size = file.stat().st_size
        digest = sha256_file(file) if size == entry.size else None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror}), but the checkpoint's manifest names it"
    else:
        if size != entry.size:
            wrong = f"has {size} bytes, the checkpoint's manifest says {entry.size}"
        elif digest != entry.sha256:
            wrong = "is damaged: its SHA-256 is not the one in the checkpoint's manifest"
        else:
            return None
    return Problem(str(file), f"{wrong}; {_advice(path)}")


def _advice(directory: Path) -> str:
    return f"restore it from a copy, or remove {directory} to resume from the checkpoint before it"
