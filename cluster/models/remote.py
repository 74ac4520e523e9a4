"""Models in a store, as local folders: everything below the driver and the plan sees folders only.

A model at an address comes to `<root>/.models/<name>-<digest>/<name>/`; the digest is of the address and of what the
store lists there, so that an unchanged model is fetched once and a changed one gets a folder of its own. `root` is on a
file system that the cluster's nodes share. Before a run starts its outline is enough (`<name>-<digest>-outline/`): the
small files, and in place of each weights' file one with its header, its length and nothing between.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cluster.config.run import MODELS, RunConfig, parse_config
from cluster.config.tree import set_path, strings_at
from cluster.models.object_store import (
    StoredFile,
    StoredFolder,
    StoreError,
    is_address,
    list_folder,
    run_with_stall_timeout,
)
from cluster.runs.atomic_files import RunDirectoryError, explained, free_bytes, fsync, write_atomic
from cluster.runs.directory import RunDirectory
from cluster.runs.resume import find_resumable
from trainers.errors import Problem, UserError

WEIGHTS = ".safetensors"
SUFFIXES = (".json", WEIGHTS, ".jinja", ".model", ".txt")
CONFIGS = ("config.json", "adapter_config.json")

Extent: TypeAlias = Literal["complete", "outline"]
Note: TypeAlias = Callable[[str], None]

_PATIENCE_S: dict[Extent, float] = {"complete": 300.0, "outline": 60.0}
_LARGEST_SMALL = 64 << 20  # bytes of a file that holds no weights
_LARGEST_HEADER = 100 << 20  # as safetensors has it
_FIRST_BYTES = 256 << 10  # of a weights' file: they hold most headers
_MOST_FILES = 2000
_NOTE_S = 60.0
_WAIT_S = 0.5


def model_store(root: Path) -> Path:
    """Where the models that were fetched for runs under a root lie; absolute, since roles run elsewhere."""
    return root.resolve() / ".models"


def model_files(folder: StoredFolder) -> tuple[StoredFile, ...]:
    """The files that loading needs. StoreError if the folder is not a model's, or a file is larger than any model's."""
    files = tuple(file for file in folder.files if file.name.endswith(SUFFIXES))
    if not any(file.name in CONFIGS for file in files):
        raise StoreError(f"{folder.address} has no config.json and no adapter_config.json, so it is not a model")
    if len(files) > _MOST_FILES:
        raise StoreError(f"{folder.address} holds {len(files)} files, more than any model")
    for file in files:
        if not file.known:
            raise StoreError(f"the store does not say size and time of {folder.child(file.name)}; use one that does")
        if file.size > _LARGEST_SMALL and not file.name.endswith(WEIGHTS):
            limit = f"more than the {_shown(_LARGEST_SMALL)} of any model's"
            raise StoreError(f"{folder.child(file.name)} has {_shown(file.size)}, {limit}; take it out of the folder")
    return files


def fetch(address: str, store: Path, extent: Extent, *, note: Note = lambda _: None) -> Path:
    """The local folder of the model at an address, as the store has it now; fetched where it is not here yet.

    StoreError where the store cannot give it, RunDirectoryError where it cannot be written.
    """
    asked = _Fetch(address, store, extent, note)
    return run_with_stall_timeout(asked.run, what=address, patience_s=_PATIENCE_S[extent])


@dataclass(frozen=True, slots=True)
class _Fetch:
    address: str
    store: Path
    extent: Extent
    note: Note

    def run(self, move: Callable[[], None]) -> Path:
        folder = list_folder(self.address)
        files = model_files(folder)
        digest = folder.digest(files)
        target = self.store / f"{folder.name}-{digest}{'-outline' if self.extent == 'outline' else ''}"
        found, partial = target / folder.name, self.store / f".{target.name}.partial"
        if found.is_dir():
            return found
        with explained(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
        with explained(target), self._alone(target, move):
            if found.is_dir():  # another process has just done it
                return found
            inside = partial / folder.name
            inside.mkdir(parents=True, exist_ok=True)
            if self.extent == "outline":
                _write_outline(folder, files, inside, move)
            else:
                self._write_complete(folder, files, inside, move)
            if (now := list_folder(self.address)).digest(model_files(now)) != digest:
                shutil.rmtree(partial)
                raise StoreError(f"{self.address} changed while it was fetched; try again")
            fsync(inside)
            move()
            partial.rename(target)
            fsync(self.store)
        return found

    @contextmanager
    def _alone(self, target: Path, move: Callable[[], None]) -> Iterator[None]:
        """One process at a time fetches a model; the operating system lets go of what a killed one held."""
        with (self.store / f".{target.name}.lock").open("a") as lock:
            waited = False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waited:
                        self.note(f"another process is fetching {self.address}; waiting for it")
                    waited = True
                    move()
                    time.sleep(_WAIT_S)
            yield

    def _write_complete(
        self, folder: StoredFolder, files: Iterable[StoredFile], inside: Path, move: Callable[[], None]
    ) -> None:
        """All files; those that an interrupted fetch of the same listing completed are kept."""
        missing = [file for file in files if not (inside / file.name).is_file()]
        size = sum(file.size for file in missing)
        if (free := free_bytes(self.store)) < size:
            needed = f"{_shown(size)} are needed, {_shown(free)} are free"
            raise StoreError(f"too little space in {self.store} for {self.address}: {needed}")
        self.note(f"fetching {self.address} ({_shown(size)})")
        done, noted = 0, time.monotonic()
        for file in missing:
            with _complete_file(inside / file.name) as part, part.open("wb") as out:
                for piece in folder.pieces(file):
                    out.write(piece)
                    done += len(piece)
                    move()
                    if time.monotonic() - noted > _NOTE_S:
                        self.note(f"fetching {self.address}: {_shown(done)} of {_shown(size)}")
                        noted = time.monotonic()


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that becomes it once the block has written all of it."""
    part = path.with_name(f".{path.name}.part")
    yield part
    fsync(part)
    part.rename(path)


def _write_outline(folder: StoredFolder, files: Iterable[StoredFile], inside: Path, move: Callable[[], None]) -> None:
    for file in files:
        write_outline(folder, file, inside)
        move()


def write_outline(folder: StoredFolder, file: StoredFile, inside: Path) -> None:
    """Everything of a file but its weights: a small file in full, of a large one its header and length."""
    if file.name.endswith(WEIGHTS):
        head = _header(folder, file)
    else:
        head = folder.read(file, 0, file.size)
        if len(head) != file.size:
            raise StoreError(f"{folder.child(file.name)} changed since it was listed; try again")
    with _complete_file(inside / file.name) as part, part.open("wb") as out:
        out.write(head)
        out.truncate(file.size)


def _header(folder: StoredFolder, file: StoredFile) -> bytes:
    """A safetensors file up to where its weights begin; what is none is left to whoever reads it."""
    head = folder.read(file, 0, _FIRST_BYTES)
    length = 8 + int.from_bytes(head[:8], "little")
    if length - 8 > _LARGEST_HEADER:
        return head
    return head[:length] if length <= len(head) else head + folder.read(file, len(head), length)


def addresses(config: RunConfig) -> dict[str, str]:
    """The models of a config that lie in stores: key → address."""
    tree = config.model_dump(mode="json")
    named = (found for pattern in MODELS for found in strings_at(tree, pattern))
    return {where: name for where, name in named if is_address(name)}


@dataclass(frozen=True, slots=True)
class Located:
    """A config whose models are all in local folders or on the hub, and the address that each folder replaces."""

    config: RunConfig
    folders: Mapping[str, Path]  # by address

    def named(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with the addresses that the user gave, not the folders that stand for them."""
        return [Problem(problem.where, self._shown(problem.message)) for problem in problems]

    def _shown(self, text: str) -> str:
        for address, folder in self.folders.items():
            text = text.replace(str(folder), address)
        return text


def located(config: RunConfig, folders: Mapping[str, Path]) -> Located:
    """The config with folders in place of these addresses."""
    tree: Any = config.model_dump(mode="json")
    for where, address in addresses(config).items():
        if address in folders:
            tree = set_path(tree, where, str(folders[address]))
    return Located(parse_config(tree) if folders else config, folders)


def fetch_all(
    wanted: Mapping[str, str], store: Path, extent: Extent, *, note: Note = lambda _: None
) -> dict[str, Path]:
    """The folder of every address among `wanted`, by key. UserError with a problem for each that cannot be had."""
    folders: dict[str, Path] = {}
    problems: list[Problem] = []
    for where, address in wanted.items():
        if address in folders:
            continue
        try:
            folders[address] = fetch(address, store, extent, note=note)
        except (StoreError, RunDirectoryError) as error:
            problems.append(Problem(where, str(error)))
    if problems:
        raise UserError(problems)
    return folders


def outlined(config: RunConfig) -> Located:
    """The config with an outline of each model that lies in a store: enough for a plan, never for a run."""
    return located(config, fetch_all(addresses(config), model_store(Path(config.root)), "outline"))


def fetched(config: RunConfig, run: RunDirectory, *, note: Note) -> RunConfig:
    """The config with every model here, complete. What the run began with is noted in its directory: a resumed run uses
    that, whatever the store holds by then."""
    wanted = addresses(config)
    if not wanted:
        return config
    store, pins = model_store(run.path.parent), _read_pins(run)
    kept = {address: store / pin for address, pin in pins.items() if (store / pin).is_dir()}
    folders = fetch_all({k: a for k, a in wanted.items() if a not in kept}, store, "complete", note=note) | kept
    changed = [
        Problem(
            where, f"{address} is not what this run began with, and {store / pins[address]} is gone; start a new run"
        )
        for where, address in wanted.items()
        if address in pins and folders[address] != store / pins[address]
    ]
    if changed:
        raise UserError(changed)
    names = {address: str(folders[address].relative_to(store)) for address in sorted(set(wanted.values()))}
    write_atomic(run.stored_models, json.dumps(pins | names, indent=2) + "\n")
    return located(config, folders).config


def as_run(config: RunConfig, run: RunDirectory) -> RunConfig:
    """The config with the folders that the run's models came to; an address that was not fetched stays."""
    store = model_store(run.path.parent)
    found = {address: store / pin for address, pin in _read_pins(run).items()}
    return located(config, {address: folder for address, folder in found.items() if folder.is_dir()}).config


def as_resumed(config: RunConfig, resume: str) -> RunConfig:
    """The config as `rlhf train --resume` will run it, for its checks: if it resumes a run, with that run's
    folders, so that the store need not have the models any more."""
    if resume == "never" or not addresses(config):
        return config
    run = find_resumable(Path(config.root).resolve(), config) if resume == "auto" else RunDirectory(Path(resume))
    return config if run is None else as_run(config, run)


def _read_pins(run: RunDirectory) -> dict[str, str]:
    try:
        pins = json.loads(run.stored_models.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError([Problem(str(run.stored_models), f"cannot be read: {error}")]) from error
    return {str(address): str(pin) for address, pin in pins.items()} if isinstance(pins, dict) else {}


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e8 else f"{size / 1e6:,.1f} MB"
