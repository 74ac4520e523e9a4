"""Reads Parquet rows into the tally, a few at a time. It knows Arrow, the tally and the index.

A row that a run can use is copied to disk as it is (dates, decimals and bytes included), for random access.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.data.detect import Shape, inspect
from trainers.data.findings import Finding, printable
from trainers.data.index import IndexWriter
from trainers.data.jsonl import Rejecter
from trainers.data.source import UnreadableError
from trainers.data.tally import Tally, prompt_key

BATCH_BYTES = 2**22
MAX_BATCH_ROWS = 1024


class ParquetScan:
    """Validates the rows of one file; `index` and `copy` get those that a run can use."""

    def __init__(
        self,
        tally: Tally,
        *,
        index: IndexWriter | None = None,
        copy: BinaryIO | None = None,
        reject: Rejecter | None = None,
    ) -> None:
        self._tally = tally
        self._index = index
        self._copy = copy
        self._reject = reject
        self._copied = 0

    def run(self, stored: BinaryIO, *, on_share: Callable[[float], None] | None = None) -> None:
        """Read all rows; `on_share` gets each further share of them. Raises UnreadableError for a damaged file."""
        try:
            file = pq.ParquetFile(stored, buffer_size=2**20)
            check_names(file.schema_arrow)
            row = 1
            for batch in file.iter_batches(batch_size=batch_rows(file.metadata)):
                self._rows(row, list(batch_values(batch)))
                row += batch.num_rows
                if on_share is not None:
                    on_share(batch.num_rows / file.metadata.num_rows)
        except (pa.ArrowException, OSError) as e:
            found = f"a damaged Parquet file: {printable(str(e).splitlines()[0][:200])}"
            raise UnreadableError(Finding(None, found, "a complete Parquet file (copy or write it again)")) from e

    def _rows(self, first: int, rows: list[Any]) -> None:
        shapes: list[Shape | None] = []
        numbers = range(first, first + len(rows))
        for number, row in zip(numbers, rows, strict=True):
            shape, findings = judge(row)
            self._tally.findings.add(number, findings)
            shapes.append(shape)
            if shape is not None and self._tally.detector.usable(shape):
                self._keep(number, row)
            elif self._reject is not None:
                reasons = findings if shape is None else [self._tally.detector.unusable(shape)]
                self._reject(number, reasons, repr(row).encode("utf-8", "backslashreplace"))
        valid = (row for row, shape in zip(rows, shapes, strict=True) if shape is not None)
        self._tally.count(shapes, numbers, map(prompt_key, valid))

    def _keep(self, number: int, row: dict[str, Any]) -> None:
        if self._index is None or self._copy is None:
            return
        data = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        self._copy.write(data)
        self._index.add(np.array([self._copied]), np.array([len(data)]), np.array([number]))
        self._copied += len(data)


def judge(row: dict[str, Any] | Finding) -> tuple[Shape | None, list[Finding]]:
    """The shape of a row and the findings about it. NaN outside `prompt` and `messages` becomes None in the row."""
    if isinstance(row, Finding):
        return None, [row]
    not_finite = list(_not_finite(row))
    for name in {f.column for f in not_finite if f.missing}:
        row[name] = _nan_to_none(row[name])
    shape, findings = inspect(row)
    found = [f.finding() for f in not_finite]
    return (None if any(not f.missing for f in not_finite) else shape), [*findings, *found]


def batch_rows(metadata: Any) -> int:
    """Rows that together come to about BATCH_BYTES."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return int(min(max(BATCH_BYTES * metadata.num_rows // max(size, 1), 1), MAX_BATCH_ROWS))


def check_names(schema: Any) -> None:
    """Raises UnreadableError where two columns share a name."""
    names = schema.names
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UnreadableError(Finding(twice[0], "several columns of this name", "each column name once"))


def batch_values(batch: Any) -> Iterator[dict[str, Any] | Finding]:
    """Rows as Python values; a row that cannot be converted (not UTF-8, a date out of range) as a finding."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        for i in range(batch.num_rows):
            yield from _one_row(batch.slice(i, 1))
        return
    for row in rows:
        yield _as_written(row)


def _one_row(batch: Any) -> Iterator[dict[str, Any] | Finding]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as e:
            yield Finding(
                name, f"byte 0x{e.object[e.start]:02x} at byte {e.start} of the value, not UTF-8", "UTF-8 text"
            )
            return
        except (ValueError, OverflowError, pa.ArrowException) as e:
            yield Finding(
                name, f"a value that cannot be read: {printable(str(e)[:100])}", "a value that Python can hold"
            )
            return
    yield _as_written(row)


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Structs of one column share their keys: a null key of a message is a key that this message lacks."""
    messages = row.get("messages")
    if isinstance(messages, list):
        row["messages"] = [_without_nulls(m, keep="content") for m in messages]
    return row


def _without_nulls(value: Any, *, keep: str | None = None) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == keep}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


@dataclass(frozen=True, slots=True)
class _NotFinite:
    """A number that is NaN or infinite, and where it was found."""

    column: str
    path: str
    value: float

    @property
    def missing(self) -> bool:
        """True for a missing value: pandas and datasets write it as NaN."""
        return math.isnan(self.value) and self.column not in ("prompt", "messages")

    def finding(self) -> Finding:
        """A warning for a missing value, else an error."""
        if self.missing:
            return Finding(self.path, "NaN", "null (NaN is read as a missing value)", severity="warning")
        return Finding(self.path, "NaN" if math.isnan(self.value) else str(self.value), "a finite number, or null")


def _not_finite(row: dict[str, Any]) -> Iterator[_NotFinite]:
    """Every number of a row that is not finite, level by level, without recursion."""
    level: list[tuple[str, str, Any]] = [(name, name, value) for name, value in row.items()]
    while level:
        below: list[tuple[str, str, Any]] = []
        for column, path, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                yield _NotFinite(column, path, value)
            elif isinstance(value, dict):
                below += [(column, f"{path}.{k}", v) for k, v in value.items()]
            elif isinstance(value, list | tuple):
                below += [(column, f"{path}[{i}]", v) for i, v in enumerate(value)]
        level = below


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):  # entries of an Arrow map are tuples
        return type(value)(_nan_to_none(v) for v in value)
    return value
