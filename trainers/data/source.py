"""Where prompts come from: paths, globs, fsspec addresses, standard input; and what a file's first bytes look like.

It knows bytes only. What cannot be read is raised as `UnreadableError`, with what to do about it.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec.core  # type: ignore[import-untyped]

from trainers.data.findings import Finding, printable

Kind = Literal["jsonl", "jsonl.gz", "parquet"]
STDIN = "-"
BOMB_BYTES = 2**28  # from here on an archive must not expand more than BOMB_RATIO-fold
BOMB_RATIO = 500  # deflate reaches 1,032 at most, and only for pure repetition
_SUFFIXES: tuple[tuple[str, Kind], ...] = ((".jsonl", "jsonl"), (".jsonl.gz", "jsonl.gz"), (".parquet", "parquet"))
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "a zip archive (or an office document)"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"ARROW1", "an Arrow IPC file"),
    (b"Obj\x01", "Avro"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "PDF"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x89HDF", "HDF5"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


class UnreadableError(Exception):
    """A file, or the rest of it, cannot be read; carries the finding for the user."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(finding.found)


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read: `address` as the user may give it again, and the kind that its suffix stands for."""

    address: str
    kind: Kind

    @property
    def local(self) -> bool:
        """True if the file itself allows random access, without a copy."""
        return self.address != STDIN and "://" not in self.address

    def size(self) -> int | None:
        """Bytes as stored, None if unknown."""
        if self.address == STDIN:
            return None
        with reading(self.address):
            if self.local:
                return os.stat(self.address).st_size
            filesystem, path = fsspec.core.url_to_fs(self.address)
            size = filesystem.size(path)
            return None if size is None else int(size)

    def open(self) -> BinaryIO:
        """The stored bytes, from the start."""
        with reading(self.address):
            if self.local:
                return open(self.address, "rb")
            filesystem, path = fsspec.core.url_to_fs(self.address)
            opened: BinaryIO = filesystem.open(path, "rb")
            return opened


def expand(address: str) -> list[str]:
    """The files that a path, glob or address names, sorted; raises UnreadableError if there is none."""
    if address == STDIN:
        return [address]
    with reading(address):
        if "://" in address:
            return _expand_remote(address)
        path = Path(address).expanduser()
        if path.is_dir():
            raise UnreadableError(Finding(None, "a folder", f"files, such as {address.rstrip('/')}/*.jsonl"))
        if path.exists() or not glob.has_magic(address):
            return [str(path)]
        found = sorted(f for f in glob.glob(str(path), recursive=True) if os.path.isfile(f))
    return _matched(found)


def _expand_remote(address: str) -> list[str]:
    if not glob.has_magic(address):
        return [address]
    filesystem, path = fsspec.core.url_to_fs(address)
    return _matched(sorted(filesystem.unstrip_protocol(str(f)) for f in filesystem.glob(path)))


def _matched(found: list[str]) -> list[str]:
    if not found:
        raise UnreadableError(Finding(None, "a pattern that matches no file", "at least one file"))
    return found


def source(address: str, head: bytes | None = None) -> Source:
    """The source at an address; the suffix decides how it is read (standard input: its first bytes, `head`)."""
    if head is not None:
        kind: Kind = "jsonl.gz" if head.startswith(b"\x1f\x8b") else "parquet" if head.startswith(b"PAR1") else "jsonl"
        return Source(address, kind)
    name = address.lower().split("?")[0] if "://" in address else address.lower()
    for suffix, kind in _SUFFIXES:
        if name.endswith(suffix):
            return Source(address, kind)
    ending = "".join(Path(name).suffixes[-2:])[:20] or "no suffix"
    raise UnreadableError(
        Finding(None, f"the suffix {ending}", ".jsonl, .jsonl.gz or .parquet, which determine how it is read")
    )


def check_head(head: bytes, kind: Kind) -> None:
    """Refuse stored bytes that do not match the suffix; `head` is their beginning (a few hundred bytes)."""
    wanted = {"jsonl.gz": "gzip", "parquet": "Parquet", "jsonl": None}[kind]
    seen = looks_like(head)
    if seen == wanted or not head:
        return
    if seen is None:
        seen = "JSON" if head.lstrip()[:1] in (b"{", b"[") else "something else"
    expected = {
        "jsonl": "lines of JSON in UTF-8, as the suffix .jsonl promises",
        "jsonl.gz": "gzip, as the suffix .gz promises",
        "parquet": "Parquet, as the suffix promises",
    }[kind]
    right = {"gzip": "; name it .jsonl.gz", "Parquet": "; name it .parquet", "JSON": "; name it .jsonl"}.get(seen, "")
    raise UnreadableError(Finding(None, f"content that looks like {seen}", expected + right))


def looks_like(head: bytes) -> str | None:
    """What the first bytes are known for.

    >>> looks_like(b"PK\\x03\\x04..."), looks_like(b'{"prompt": "Hi"}')
    ('a zip archive (or an office document)', None)
    """
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    start = head.lstrip()[:14].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a failed download?)"
    return None


class Counted(io.RawIOBase):
    """Stored bytes on their way in: counts them, and turns storage errors into UnreadableError."""

    def __init__(self, stored: BinaryIO, address: str, on_bytes: Callable[[int], None] | None) -> None:
        self._stored = stored
        self._address = address
        self._on_bytes = on_bytes
        self.count = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        with reading(self._address):
            data = self._stored.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        if self._on_bytes is not None:
            self._on_bytes(len(data))
        return len(data)


class Decompressed:
    """The content of a gzip stream; refuses a damaged stream, and one that expands without end."""

    def __init__(self, buffered: io.BufferedReader[Any], counted: Counted) -> None:
        self._gzip = gzip.GzipFile(fileobj=buffered, mode="rb")
        self._counted = counted
        self._out = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end."""
        try:
            data = self._gzip.read(size)
        except EOFError as e:
            raise UnreadableError(Finding(None, "truncated gzip stream", "a complete gzip file (copy it again)")) from e
        except (gzip.BadGzipFile, zlib.error) as e:
            raise UnreadableError(
                Finding(None, f"damaged gzip stream: {e}", "an intact gzip file (copy it again)")
            ) from e
        self._out += len(data)
        if self._out > BOMB_BYTES and self._out > BOMB_RATIO * self._counted.count:
            found = (
                f"a gzip stream that expands {self._out // self._counted.count}-fold, past {self._out // 2**20:,} MiB"
            )
            raise UnreadableError(Finding(None, found, "not a decompression bomb; if it is none, unpack it to .jsonl"))
        return data


@contextmanager
def reading(address: str) -> Iterator[None]:
    """The boundary for storage errors: each becomes an UnreadableError with its cause."""
    try:
        yield
    except UnreadableError:
        raise
    except FileNotFoundError as e:
        raise UnreadableError(Finding(None, "no such file", "an existing file")) from e
    except ImportError as e:
        found = f"no package to read {address.split('://')[0]}:// ({printable(str(e))})"
        raise UnreadableError(Finding(None, found, "that package to be installed")) from e
    except (OSError, ValueError) as e:
        reason = printable(getattr(e, "strerror", None) or str(e))
        raise UnreadableError(Finding(None, f"a file that cannot be read ({reason})", "a readable file")) from e
    except Exception as e:  # storage packages raise their own errors, which are not OSErrors
        if "://" not in address:
            raise
        found = f"a file that cannot be read ({type(e).__name__}: {printable(str(e)[:200])})"
        raise UnreadableError(Finding(None, found, "a readable file")) from e


def as_entries(addresses: str | Sequence[str]) -> list[str]:
    """One address or several, as a list."""
    return [addresses] if isinstance(addresses, str) else list(addresses)
