"""Opens prompt files: validates and indexes each in one pass, then hands out prompts by number.

It knows every part of this package but the stream, the tokenizer and the config; it prints nothing.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trainers.data.detect import Detector
from trainers.data.findings import SHOWN, FileReport, Finding, LineProblem, plural
from trainers.data.index import IndexWriter, Row, RowArray, read_at
from trainers.data.jsonl import JsonlScan, Rejecter
from trainers.data.record import to_prompt
from trainers.data.source import (
    STDIN,
    Counted,
    Decompressed,
    Source,
    UnreadableError,
    as_entries,
    check_head,
    expand,
    source,
)
from trainers.data.tally import Tally
from trainers.errors import Problem, UserError
from trainers.types import Prompt

_HEAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How a file is read. `keep`: index its prompts for later; without it only the report is made."""

    strip_responses: bool = False
    keep: bool = True
    reject: Callable[[str], Rejecter] | None = None
    on_bytes: Callable[[int], None] | None = None
    stdin: BinaryIO | None = None


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The usable prompts of one file, read from disk one at a time."""

    source: str
    fingerprint: str  # SHA-256 of the content, decompressed
    rows: RowArray
    _file: BinaryIO
    _decode: Callable[[bytes], Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prompt:
        return to_prompt(self.record(i), source=self.source, line=self.line(i))

    def record(self, i: int) -> dict[str, Any]:
        """The complete record as written in the file, with integers of any size."""
        row = Row.of(self.rows, i)
        data = read_at(self._file.fileno(), row.offset, row.length)
        try:
            record = self._decode(data)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            where = f"{self.source}:{row.line}"
            raise UserError([Problem(where, "the file was changed while it is in use; start again with the new one")])
        return record

    def line(self, i: int) -> int:
        """The line of a prompt in its file, from 1 (a row, in Parquet)."""
        return Row.of(self.rows, i).line

    def identity(self) -> str:
        """Changes with the content of the file and with which of its prompts are used; not with its path."""
        digest = hashlib.sha256()
        for part in self.identifying():
            digest.update(part)
        return digest.hexdigest()

    def identifying(self) -> Iterator[bytes]:
        """What `identity` is made from, in parts: the content's digest, and the number of each line that is used."""
        yield f"{self.fingerprint} {len(self)}\n".encode()
        lines = self.rows["line"]
        for start in range(0, len(self), 2**16):
            yield lines[start : start + 2**16].tobytes()

    def reads(self, stored: BinaryIO) -> bool:
        """True if this file itself is read, not a copy."""
        return self._file is stored

    def only(self, kept: npt.NDArray[np.int64]) -> PromptFile:
        """The same file with some of its prompts, given by number in rising order."""
        writer = IndexWriter()
        for start in range(0, len(kept), 2**16):
            writer.add_rows(np.asarray(self.rows[kept[start : start + 2**16]]))
        return replace(self, rows=writer.finish())


class PromptSet(Sequence[Prompt]):
    """All prompts of several files, by number; memory does not grow with their length.

    `entries` maps the files to the entries of `data.prompts` (a glob is one entry).
    """

    def __init__(self, files: Sequence[PromptFile], *, entries: Sequence[int], reports: Sequence[FileReport]) -> None:
        assert sum(entries) == len(files)
        self.files = tuple(files)
        self.reports = tuple(reports)
        self._entries = tuple(entries)
        self._ends = list(itertools.accumulate(len(f) for f in files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        file, row = self._locate(i)
        return file[row]

    def entry_sizes(self) -> list[int]:
        """Prompts of each entry of `data.prompts`, in order."""
        sizes = iter([len(f) for f in self.files])
        return [sum(itertools.islice(sizes, n)) for n in self._entries]

    def fingerprint(self) -> str:
        """Changes with the content of any file and with which of its prompts are used; not with their paths."""
        digest = hashlib.sha256()
        for file in self.files:
            for part in file.identifying():
                digest.update(part)
        return digest.hexdigest()[:32]

    def only(self, kept: Sequence[npt.NDArray[np.int64]]) -> PromptSet:
        """The set with some prompts of each file, given by number within the file."""
        files = [f.only(k) for f, k in zip(self.files, kept, strict=True)]
        return PromptSet(files, entries=self._entries, reports=self.reports)

    def _locate(self, i: int) -> tuple[PromptFile, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"prompt {i} of {len(self)}")
        i %= len(self)
        file = bisect.bisect_right(self._ends, i)
        return self.files[file], i - (self._ends[file - 1] if file else 0)


def open_prompts(
    paths: str | Sequence[str],
    *,
    skip_invalid: bool = False,
    strip_responses: bool = False,
    rejected: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> PromptSet:
    """Validate and index prompt files (paths, globs, fsspec addresses) in one pass and constant memory.

    Raises UserError with every problem of every file: the first hundred by line, the rest counted. With
    `skip_invalid` bad lines are left out instead and written, with their reasons, to `rejected` (required then).
    """
    if skip_invalid and rejected is None:
        raise ValueError("skip_invalid needs `rejected`, the file for the lines that are left out")
    files: list[PromptFile] = []
    reports: list[FileReport] = []
    entries: list[int] = []
    problems: list[Problem] = []
    total = 0
    with RejectedFile(rejected if skip_invalid else None) as reject:
        options = ScanOptions(strip_responses=strip_responses, reject=reject.of, on_bytes=on_bytes)
        for entry in as_entries(paths):
            before = len(files)
            for address in _expanded(entry, problems):
                file, tally = scan(address, options)
                refusals = tally.refusals(skip_invalid=skip_invalid)
                problems += [p.as_problem(address) for p in refusals]
                total += max(tally.errors(), len(refusals)) if refusals else 0
                reports.append(tally.report())
                if file is not None:
                    files.append(file)
            entries.append(len(files) - before)
    if problems:
        raise UserError(_first_hundred(problems, max(total, len(problems))))
    if not any(len(f) for f in files):
        raise UserError(
            [Problem(", ".join(as_entries(paths)) or "data.prompts", "no usable prompt; give at least one")]
        )
    return PromptSet(files, entries=entries, reports=reports)


def scan(address: str, options: ScanOptions) -> tuple[PromptFile | None, Tally]:
    """Read one file to its end: its prompts (None if it cannot be read or is not kept) and the findings."""
    tally = Tally(address, Detector(options.strip_responses))
    stored: BinaryIO | None = None
    file: PromptFile | None = None
    try:
        src = None if address == STDIN else source(address)
        stored = _standard_input(options) if src is None else src.open()
        counted = Counted(stored, address, options.on_bytes)
        buffered = io.BufferedReader(counted, buffer_size=2**16)
        head = buffered.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        src = src or source(address, head)
        check_head(head, src.kind)
        if src.kind == "parquet":
            file = _scan_parquet(src, stored, buffered, tally, options)
        else:
            read = buffered.read if src.kind == "jsonl" else Decompressed(buffered, counted).read
            file = _scan_lines(src, stored, read, tally, options)
    except UnreadableError as e:
        tally.fatal.append(e.finding)
    except OSError as e:  # reading has its own boundary: this is the temporary copy or index
        tally.fatal.append(Finding(None, f"no room for a temporary copy: {e.strerror}", "space where TMPDIR points"))
    finally:
        if stored is not None and stored is not options.stdin and (file is None or not file.reads(stored)):
            stored.close()
    return file, tally


def _standard_input(options: ScanOptions) -> BinaryIO:
    if options.stdin is None:
        raise UnreadableError(Finding(None, "standard input", "a file (a run reads its prompts more than once)"))
    return options.stdin


def _scan_lines(
    src: Source, stored: BinaryIO, read: Callable[[int], bytes], tally: Tally, options: ScanOptions
) -> PromptFile | None:
    reject = options.reject(tally.file) if options.reject else None
    if not options.keep:
        JsonlScan(tally, reject=reject).run(read)
        return None
    index, digest = IndexWriter(), hashlib.sha256()
    in_place = src.local and src.kind == "jsonl"
    copy = stored if in_place else _temporary()

    def read_and_hash(size: int) -> bytes:
        data = read(size)
        digest.update(data)
        return data

    JsonlScan(tally, index=index, reject=reject).run(read_and_hash, copy=None if in_place else copy)
    copy.flush()
    return PromptFile(tally.file, digest.hexdigest(), index.finish(), copy, json.loads)


def _scan_parquet(
    src: Source, stored: BinaryIO, buffered: io.BufferedReader[Any], tally: Tally, options: ScanOptions
) -> PromptFile | None:
    """Parquet needs random access: a remote file is copied to disk first."""
    from trainers.data.parquet import ParquetScan  # Arrow is slow to import, and most files are lines

    reject = options.reject(tally.file) if options.reject else None
    on_share = None
    if src.local:
        local = stored
        if options.on_bytes is not None:
            on_share = _in_bytes(options.on_bytes, src.size() or 0)
    else:
        local = _temporary()
        shutil.copyfileobj(buffered, local)
    local.seek(0)
    if not options.keep:
        ParquetScan(tally, reject=reject).run(local, on_share=on_share)
        return None
    digest = hashlib.sha256()
    while data := local.read(2**20):
        digest.update(data)
    local.seek(0)
    index, copy = IndexWriter(), _temporary()
    ParquetScan(tally, index=index, copy=copy, reject=reject).run(local, on_share=on_share)
    copy.flush()
    return PromptFile(tally.file, digest.hexdigest(), index.finish(), copy, pickle.loads)


def _in_bytes(on_bytes: Callable[[int], None], size: int) -> Callable[[float], None]:
    return lambda share: on_bytes(round(share * size))


def _temporary() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="rlhf-prompts-")


def _expanded(entry: str, problems: list[Problem]) -> Iterator[str]:
    try:
        yield from expand(entry)
    except UnreadableError as e:
        problems.append(LineProblem(None, e.finding).as_problem(entry))


def _first_hundred(problems: list[Problem], total: int) -> list[Problem]:
    shown = problems[:SHOWN]
    if total > len(shown):
        shown.append(
            Problem("…", f"{plural(total - len(shown), 'more problem')}; `rlhf data check` shows them by file")
        )
    return shown


class RejectedFile:
    """The lines that a run leaves out, with their reasons: one object for each line; every run overwrites it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> RejectedFile:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def of(self, file: str) -> Rejecter:
        """What takes the lines of one file."""

        def reject(line: int, findings: list[Finding], text: bytes | None) -> None:
            if self._file is None:
                return
            reasons = [{"field": f.field, "found": f.found, "expected": f.expected} for f in findings]
            written = None if text is None else text.decode("utf-8", "backslashreplace")
            entry = {"file": file, "line": line, "reasons": reasons, "text": written}
            self._file.write(json.dumps(entry).encode() + b"\n")

        return reject
