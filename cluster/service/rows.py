"""The first rows of a prompts file as a chat, for the page. It runs in a helper process: a file may be hostile.

It knows the record format and how files are read; it validates nothing beyond what it shows.
"""

from __future__ import annotations

import gzip
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.data.detect import inspect
from trainers.data.messages import without_answer
from trainers.data.record import to_prompt
from trainers.data.strict import DecodeError, loads

_LONGEST_LINE = 1 << 22  # bytes; a longer record is not shown
_LONGEST_VALUE = 4000  # characters
_HIDDEN = ("prompt", "messages")


def read_rows(path: Path, *, count: int, offset: int) -> list[dict[str, Any]]:
    """`count` rows after the first `offset`: {"line", "messages", "columns", "problem"}; blank lines are passed over.

    Raises OSError or ValueError where the file cannot be read at all.
    """
    records = _parquet(path, offset + count) if path.name.endswith(".parquet") else _lines(path)
    return [_row(line, record) for line, record in itertools.islice(records, offset, offset + count)]


def _row(line: int, record: Any) -> dict[str, Any]:
    if isinstance(record, str):
        return {"line": line, "messages": None, "columns": {}, "problem": record}
    shape, findings = inspect(record)
    wrong = [finding for finding in findings if finding.severity == "error"]
    if shape is None or wrong:
        problem = "; ".join(f"{f.field or 'record'}: found {f.found}, expected {f.expected}" for f in wrong)
        return {"line": line, "messages": None, "columns": _columns(record), "problem": problem or "no valid record"}
    if shape.format in ("rlhf-online", "sft"):
        prompt = to_prompt(record, source=str(line), line=line)
        messages = list(record["messages"]) if record.get("messages") is not None else list(prompt.messages)
        return {"line": line, "messages": messages, "columns": _columns(prompt.columns), "problem": None}
    turns = without_answer(record["messages"]) if isinstance(record.get("messages"), list) else None
    return {"line": line, "messages": turns, "columns": _columns(record), "problem": None}


def _columns(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        return {}
    return {str(name): _plain(value) for name, value in record.items() if name not in _HIDDEN}


def _plain(value: Any) -> Any:
    """A value that JSON holds; what is long is cut, with a mark."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "…"
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record), or (line, why it is none)."""
    with path.open("rb") as stored:
        file: Any = gzip.GzipFile(fileobj=stored) if path.name.endswith(".gz") else stored
        for number in itertools.count(1):
            line = file.readline(_LONGEST_LINE)
            if not line:
                return
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                yield number, f"a line longer than {_LONGEST_LINE:,} bytes is not shown"
                return
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                yield number, loads(line)
            except DecodeError as error:
                yield number, f"no valid JSON: {error}"


def _parquet(path: Path, last: int) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=min(max(last, 1), 256)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
