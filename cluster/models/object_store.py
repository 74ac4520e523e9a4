"""Folders in any store that fsspec knows (s3://, gs://, file://, …): what one contains, and its bytes, in plain words.

Nothing that a store says is trusted: names that could lead out of a folder are left out, and whatever its driver raises
becomes a `StoreError` with what to do about it. It knows nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from trainers.data.findings import printable

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S.*")
_PASSWORD = re.compile(r"://[^/]*:[^/]*@")
_NOT_PLAIN = ("?", "#", "%", "\\", "::", "*", "[", "]")
_NAME = re.compile(r"[^/\\\0]{1,255}")
_VERSION = (
    "ETag", "etag", "md5Hash", "content_md5", "generation", "blob_id", "mtime", "LastModified", "last_modified",
    "updated", "modificationTime", "last_write_time", "modify", "time", "created",
)  # fmt: skip
_BLOCK = 16 << 20  # bytes asked for at a time
_Result = TypeVar("_Result")


class StoreError(Exception):
    """A store cannot give what is asked of it; the message gives the cause and what to do."""


def is_address(name: str) -> bool:
    """Whether a model's name is an address in a store, and neither a path nor a hub id.

    >>> is_address("s3://bucket/policy"), is_address("/models/policy"), is_address("org/policy")
    (True, False, False)
    """
    return "://" in name


def within(address: str, root: str) -> bool:
    """Whether a plain address is a root or is below it; on this machine (file://) once links are followed.

    >>> within("s3://bucket/models/policy", "s3://bucket/models"), within("s3://bucket/models-of-others", "s3://bucket/models")
    (True, False)
    """
    root = root.rstrip("/")
    if address.rstrip("/") != root and not address.startswith(f"{root}/"):
        return False
    if root.partition("://")[0] not in LocalFileSystem.protocol:
        return True
    real, top = (os.path.realpath(LocalFileSystem._strip_protocol(place)) for place in (address, root))
    return Path(real).is_relative_to(top)


def address_problem(address: str) -> str | None:
    """Why this is not a plain address of a folder. The message never repeats it: it may contain a password.

    >>> address_problem("s3://bucket/models/../secret")
    'must not hold .. or empty parts'
    """
    if not _ADDRESS.fullmatch(address) or not address.isprintable():
        return "is not an address; expected one such as s3://bucket/folder"
    if _PASSWORD.search(address):
        return "must not hold a password; give it to the store's driver in the environment or in fsspec's config"
    if found := next((sign for sign in _NOT_PLAIN if sign in address), None):
        return f"must not hold {found}; give the plain address of one folder"
    parts = address.partition("://")[2].strip("/").split("/")
    return "must not hold .. or empty parts" if {"", ".", ".."} & set(parts) else None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a folder in a store; `version` changes when its content does. -1, empty: the store does not say."""

    name: str
    path: str
    size: int
    version: str

    @property
    def known(self) -> bool:
        """Whether a change would be noticed."""
        return self.size >= 0 and self.version != ""


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """What is in a folder of a store, at the time of the listing."""

    address: str
    filesystem: Any
    files: tuple[StoredFile, ...]
    folders: tuple[str, ...]  # names

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]

    def child(self, name: str) -> str:
        """The address of a folder in it."""
        return f"{self.address}/{name}"

    def digest(self, files: tuple[StoredFile, ...]) -> str:
        """Of the address and these files with their versions: another one means other content."""
        lines = [self.address, *(f"{file.name}\t{file.size}\t{file.version}" for file in files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def read(self, file: StoredFile, start: int, end: int) -> bytes:
        """A part of a file; fewer bytes where it ends before."""
        with answering(self.address):
            part = self.filesystem.cat_file(file.path, start=start, end=min(end, file.size))
            return bytes(part) if part else b""

    def pieces(self, file: StoredFile) -> Iterator[bytes]:
        """All of a file; StoreError where it has not the size of the listing."""
        count = 0
        with answering(self.address), self.filesystem.open(file.path, "rb", block_size=_BLOCK) as stored:
            while piece := stored.read(_BLOCK):
                count += len(piece)
                if count > file.size:
                    break
                yield piece
        if count != file.size:
            raise StoreError(f"{self.address}/{file.name} changed since it was listed; try again")


def list_folder(address: str) -> StoredFolder:
    """The folder at an address, listed again. StoreError if there is none, or it cannot be listed."""
    if problem := address_problem(address):
        raise StoreError(f"the address {problem}")
    address = address.rstrip("/")
    with answering(address):
        filesystem, path = fsspec.core.url_to_fs(address)
        filesystem.invalidate_cache()
        path = str(path).rstrip("/")
        entries = filesystem.ls(path, detail=True)
    files: list[StoredFile] = []
    folders: list[str] = []
    for entry in entries:
        where = str(entry["name"]).rstrip("/")
        name = where.rpartition("/")[2]
        if where != f"{path}/{name}" or not _is_safe(name):
            continue
        if entry.get("type") == "directory":
            folders.append(name)
        else:
            size = entry.get("size")
            version = next((f"{key} {entry[key]}" for key in _VERSION if entry.get(key) is not None), "")
            files.append(StoredFile(name, where, size if isinstance(size, int) else -1, version))
    if not files and not folders:
        raise StoreError(f"no such folder: {address}, or it is empty")
    files.sort(key=lambda file: file.name)
    return StoredFolder(address, filesystem, tuple(files), tuple(sorted(folders)))


def _is_safe(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.isprintable() and not name.startswith(".")


@contextmanager
def answering(address: str) -> Iterator[None]:
    """The named boundary for whatever a store's driver raises: it becomes a StoreError with its cause."""
    try:
        yield
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"no such folder: {address}") from error
    except PermissionError as error:
        raise StoreError(
            f"no access to {address}; the driver's credentials do not allow it ({_short(error)})"
        ) from error
    except ImportError as error:
        raise StoreError(f"no package to read {address}: {_short(error)}") from error
    except Exception as error:  # every driver has errors of its own
        raise StoreError(f"{address} cannot be read: {type(error).__name__}: {_short(error)}") from error


def _short(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


class Abandoned(Exception):
    """Nobody waits for this work any more; it must leave nothing behind."""


def run_with_stall_timeout(work: Callable[[Callable[[], None]], _Result], *, what: str, patience_s: float) -> _Result:
    """The result of `work`, which says that it moves by calling what it is given.

    StoreError where it has not moved for `patience_s`: a driver may wait for ever, and cannot be ended from outside.
    Its thread is left behind and meets `Abandoned` at its next move.
    """
    moved, left = threading.Event(), threading.Event()
    outcome: Future[_Result] = Future()

    def move() -> None:
        if left.is_set():
            raise Abandoned
        moved.set()

    def run() -> None:
        try:
            outcome.set_result(work(move))
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            outcome.set_exception(error)

    try:  # from its first moment, when an interruption may come too
        threading.Thread(target=run, name="store", daemon=True).start()
        while not wait([outcome], timeout=patience_s).done:
            if not moved.is_set():
                raise StoreError(f"no answer for {patience_s:g} s from {what}; look at the store, then try again")
            moved.clear()
        return outcome.result()
    finally:
        left.set()
