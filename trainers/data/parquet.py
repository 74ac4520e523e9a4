"""Reads Parquet rows into the tally, a few at a time. It knows Arrow, the tally and the index.

A row that a run can use is copied to disk as it is (dates, decimals and bytes included), for random access.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
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
        """Read all rows; `on_share` hears of each further share of them. Raises UnreadableError for a damaged file."""
        try:
            file = pq.ParquetFile(stored, buffer_size=2**20)
            _check_names(file.schema_arrow)
            row = 1
            for batch in file.iter_batches(batch_size=batch_rows(file.metadata)):
                self._rows(row, list(_rows(batch)))
                row += batch.num_rows
                if on_share is not None:
                    on_share(batch.num_rows / file.metadata.num_rows)
        except (pa.ArrowException, OSError) as e:
            found = f"a damaged Parquet file: {printable(str(e).splitlines()[0][:200])}"
            raise UnreadableError(Finding(None, found, "a whole one (copy or write it again)")) from e

    def _rows(self, first: int, rows: list[Any]) -> None:
        shapes: list[Shape | None] = []
        numbers = range(first, first + len(rows))
        for number, row in zip(numbers, rows, strict=True):
            shape, findings = _judge(row)
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


def _judge(row: dict[str, Any] | Finding) -> tuple[Shape | None, list[Finding]]:
    if isinstance(row, Finding):
        return None, [row]
    shape, findings = inspect(row)
    if not_finite := list(_not_finite(row)):
        return None, [*findings, *not_finite]
    return shape, findings


def batch_rows(metadata: Any) -> int:
    """Rows that together come to about BATCH_BYTES."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return int(min(max(BATCH_BYTES * metadata.num_rows // max(size, 1), 1), MAX_BATCH_ROWS))


def _check_names(schema: Any) -> None:
    names = schema.names
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UnreadableError(Finding(twice[0], "several columns of this name", "each column name once"))


def _rows(batch: Any) -> Iterator[dict[str, Any] | Finding]:
    """Rows as Python values; a row that has none (text that is no UTF-8, a date out of range) as a finding."""
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
    """Structs of one column share their keys: a null key of a message is one that this message does not have."""
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


def _not_finite(row: dict[str, Any]) -> Iterator[Finding]:
    level: list[tuple[str, Any]] = list(row.items())
    while level:
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                yield Finding(path, str(value), "a finite number, or null")
            elif isinstance(value, dict):
                below += [(f"{path}.{k}", v) for k, v in value.items()]
            elif isinstance(value, list | tuple):
                below += [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        level = below
