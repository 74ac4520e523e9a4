"""Reads lines of JSON: one pass, a block at a time, fast on valid blocks and exact on lines with problems.

It knows JSON lines, the tally and the index; it knows neither where the bytes come from nor what a run does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from trainers.data.detect import Shape, inspect
from trainers.data.findings import Finding
from trainers.data.index import IndexWriter
from trainers.data.lines import MAX_LINE_BYTES, Block, blocks
from trainers.data.plain import plain_block
from trainers.data.source import UnreadableError, looks_like
from trainers.data.strict import (
    DecodeError,
    TooDeepError,
    count_nested_keys,
    count_written_keys,
    loads,
    parse_exactly,
)
from trainers.data.tally import Tally, prompt_key

Int64Array: TypeAlias = npt.NDArray[np.int64]
BOM = b"\xef\xbb\xbf"
_MISSING = object()  # marks a line without a value
_BLANK = np.isin(np.arange(256), list(b" \t\r"))
_ENDS_KEY = np.isin(np.arange(256), list(b'" \t\r'))  # may precede a blank that precedes a key's colon


class Rejecter(Protocol):
    """Takes the lines that are left out, with their reasons."""

    def __call__(self, line: int, findings: list[Finding], text: bytes | None) -> None:
        """Write one line away; `text` is None if the line was too long to hold."""


class JsonlScan:
    """Validates one stream of lines into a tally; `index` gets the rows that a run can use."""

    def __init__(self, tally: Tally, *, index: IndexWriter | None = None, reject: Rejecter | None = None) -> None:
        self._tally = tally
        self._index = index
        self._reject = reject

    def run(self, read: Callable[[int], bytes], *, copy: BinaryIO | None = None) -> None:
        """Read to the end; `copy` gets all bytes as they come. Raises UnreadableError for other content."""
        for block in blocks(_copying(read, copy) if copy else read):
            if block.data is None:
                found = f"a line of {block.size:,} bytes"
                findings = [Finding(None, found, f"at most {MAX_LINE_BYTES:,} bytes")]
                self._tally.findings.add(block.line, findings)
                self._write_away(block.line, findings, None)
                continue
            if block.offset == 0:
                block = _first(block)
            if block.data and not block.data.isspace():
                self._block(block, block.data)

    def _block(self, block: Block, data: bytes) -> None:
        view = _View(data)
        numbers = range(block.line, block.line + len(view.lines))
        faults: dict[int, list[Finding]] = {}
        records = self._parse(view, faults, block.offset)
        plain = plain_block(records)
        if plain is not None:
            shapes: list[Shape | None] = [plain.shape] * len(records)
            _find_duplicate_keys(view, plain.keys, faults)
        else:
            shapes = _judge(view, records, faults)
        for i, findings in sorted(faults.items()):
            self._tally.findings.add(numbers[i], findings)
            if any(f.severity == "error" for f in findings):
                shapes[i] = None
                self._write_away(numbers[i], findings, view.lines[i])
        if plain is not None and not faults:
            self._tally.count(shapes, numbers, plain.prompts)
        else:
            valid = (r for r, s in zip(records, shapes, strict=True) if s is not None)
            self._tally.count(shapes, numbers, map(prompt_key, valid))
        if self._index is not None or self._reject is not None:
            self._keep(shapes, block, view)

    def _parse(self, view: _View, faults: dict[int, list[Finding]], offset: int) -> list[Any]:
        try:
            return list(map(loads, view.lines))
        except DecodeError:
            pass  # at least one line is blank or wrong
        records = []
        for i, line in enumerate(view.lines):
            value: Any = _MISSING
            if line and not line.isspace():
                try:
                    value = loads(line)
                except DecodeError as e:
                    exact, findings = parse_exactly(line, offset=offset + int(view.starts[i]))
                    if findings or exact is None:
                        faults[i] = findings or [Finding(None, f"invalid JSON: {e}", "one JSON object on the line")]
                    else:
                        value = exact  # an integer that only the exact parser can represent
            records.append(value)
        return records

    def _keep(self, shapes: list[Shape | None], block: Block, view: _View) -> None:
        distinct = set(shapes)
        usable = {s for s in distinct if s is not None and self._tally.detector.usable(s)}
        if self._index is not None:
            every = usable == distinct
            rows = np.arange(len(shapes)) if every else np.flatnonzero([s in usable for s in shapes])
            starts = view.starts[rows]
            self._index.add(block.offset + starts, view.lengths[rows], block.line + rows)
        for i, shape in enumerate(shapes) if distinct - usable - {None} and self._reject else ():
            if shape is not None and shape not in usable:
                self._write_away(block.line + i, [self._tally.detector.unusable(shape)], view.lines[i])

    def _write_away(self, line: int, findings: list[Finding], text: bytes | None) -> None:
        if self._reject is not None:
            self._reject(line, findings, text)


class _View:
    """A block's lines, and their positions in it (computed on demand)."""

    def __init__(self, data: bytes) -> None:
        self.lines = data.split(b"\n")
        self.bytes = np.frombuffer(data, dtype=np.uint8)

    @cached_property
    def ends(self) -> Int64Array:
        """Positions of the ends of all lines but the last."""
        return np.flatnonzero(self.bytes == ord("\n"))

    @cached_property
    def starts(self) -> Int64Array:
        """Position of each line's first byte."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self.ends + 1])

    @cached_property
    def lengths(self) -> Int64Array:
        """Bytes of each line, without its end."""
        return np.append(self.ends, len(self.bytes)) - self.starts


def _judge(view: _View, records: list[Any], faults: dict[int, list[Finding]]) -> list[Shape | None]:
    """The shape of each record, None if it is not a valid one; findings are added to `faults`."""
    shapes: list[Shape | None] = []
    keys: list[int] = []
    for i, record in enumerate(records):
        shape, count = None, -1
        findings: list[Finding] = []
        if record is not _MISSING:
            try:
                if type(record) is dict:
                    count = len(record) + count_nested_keys(record.values())
                shape, findings = inspect(record)
            except TooDeepError as e:
                findings = [e.finding]
        if findings:
            faults[i] = findings
        shapes.append(shape)
        keys.append(count)
    _find_duplicate_keys(view, keys, faults)
    return shapes


def _find_duplicate_keys(view: _View, keys: list[int], faults: dict[int, list[Finding]]) -> None:
    """Compare `keys`, the number parsed from each line (-1: not an object), with the keys as written.

    A line is examined closely only if more colons may follow a key than the parser found keys.
    """
    colons = np.flatnonzero(view.bytes == ord(":"))
    before = view.bytes[colons - 1]
    colons = colons[(before == ord('"')) | (_BLANK[before] & _ENDS_KEY[view.bytes.take(colons - 2, mode="clip")])]
    if len(colons) == sum(keys):
        return  # no line has fewer colons than keys, so none has more
    written = np.bincount(np.searchsorted(view.ends, colons), minlength=len(keys))
    for i in np.flatnonzero(written != np.array(keys)).tolist():
        if keys[i] >= 0 and count_written_keys(view.lines[i]) != keys[i]:
            _, findings = parse_exactly(view.lines[i], offset=0)
            faults[i] = [*findings, *faults.get(i, [])]


def _copying(read: Callable[[int], bytes], copy: BinaryIO) -> Callable[[int], bytes]:
    def read_and_copy(size: int) -> bytes:
        data = read(size)
        copy.write(data)
        return data

    return read_and_copy


def _first(block: Block) -> Block:
    """Skip a byte order mark; refuse content that is not JSON lines once, instead of once for every line."""
    data = block.data or b""
    start = len(BOM) if data.startswith(BOM) else 0
    data = data[start:]
    first_line = block.line + data[: len(data) - len(data.lstrip())].count(b"\n")
    if seen := looks_like(data[:512]):
        raise UnreadableError(Finding(None, f"content that looks like {seen}", "lines of JSON in UTF-8"))
    first, _, rest = data.strip().partition(b"\n")
    second = rest.lstrip().split(b"\n", 1)[0]
    if first.startswith(b"[") and (first.rstrip() == b"[" or _spans_lines(first, second)):
        found = "a JSON array instead of lines"
        raise UnreadableError(Finding(None, found, "one object on each line (jq -c '.[]' FILE > FILE.jsonl)"))
    if first.rstrip() == b"{" and _spans_lines(first, second):
        found = f"JSON objects spread over several lines (first at line {first_line:,})"
        raise UnreadableError(Finding(None, found, "one object on each line (jq -c . FILE > FILE.jsonl)"))
    return Block(block.offset + start, block.line, data, block.size - start)


def _spans_lines(first: bytes, second: bytes) -> bool:
    """True if one value spans the file: the first line is the only one, or neither line is complete by itself."""
    if not second:
        return first[1:].lstrip().startswith(b"{")
    return not _is_json(second) and not _is_json(first)


def _is_json(line: bytes) -> bool:
    try:
        loads(line)
    except DecodeError:
        return False
    return True
