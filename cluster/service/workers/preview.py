"""The first rows of a prompts file as a chat, for the page. It runs in a helper process: a file may be hostile.

It knows the record format and how files are read; it validates nothing beyond what it shows. A row is at most
`LARGEST_ROW` bytes of JSON, whatever the file holds, so that an answer of 200 rows is at most 15 MiB: texts, lists and
objects are truncated if they are long, and "…" marks the place.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cluster.service.workers.truncate import CUT, MOST_ITEMS, OVER, JsonBudget
from trainers.data.detect import Shape, inspect
from trainers.data.findings import Finding
from trainers.data.messages import without_response
from trainers.data.parquet import batch_rows, batch_values, check_names, judge
from trainers.data.record import to_prompt
from trainers.data.source import UnreadableError
from trainers.data.strict import DecodeError, loads

_MESSAGES, _COLUMNS, _PROBLEM = 40 << 10, 24 << 10, 4 << 10  # bytes of JSON of one row
LARGEST_ROW = _MESSAGES + _COLUMNS + _PROBLEM + 4 * OVER
_MESSAGE = 1 << 9  # bytes that are left for another message to be begun
_LONGEST_ROLE = 20  # characters
_LONGEST_LINE = 1 << 22  # bytes; a longer record is not shown
_MOST_FINDINGS = 20  # of one record
_BATCH_ROWS = 16  # the file's own sizes count a value that repeats only once
_HIDDEN = ("prompt", "messages")
_Judge: TypeAlias = Callable[[Any], tuple[Shape | None, list[Finding]]]


def read_rows(path: Path, *, count: int, offset: int) -> list[dict[str, Any]]:
    """`count` rows after the first `offset`: {"line", "messages", "columns", "problem"}; blank lines are passed over.

    Raises OSError or ValueError where the file cannot be read at all.
    """
    if not path.name.endswith(".parquet"):
        return [_row(line, record, inspect) for line, record in itertools.islice(_lines(path), offset, offset + count)]
    try:
        return [_row(number, record, judge) for number, record in itertools.islice(_parquet(path, offset), count)]
    except UnreadableError as error:
        raise ValueError(_as_text(error.finding)) from error


def _row(line: int, record: Any, judged: _Judge) -> dict[str, Any]:
    messages, columns, problem = _parts(line, record, judged)
    return {
        "line": line,
        "messages": None if messages is None else _chat(messages),
        "columns": JsonBudget(_COLUMNS).fit(columns),
        "problem": None if problem is None else JsonBudget(_PROBLEM).fit(problem),
    }


def _parts(line: int, record: Any, judged: _Judge) -> tuple[Sequence[Any] | None, Mapping[str, Any], str | None]:
    """Messages, columns and problem, as large as they are."""
    if isinstance(record, str):
        return None, {}, record
    shape, findings = judged(record)
    wrong = [finding for finding in findings if finding.severity == "error"][:_MOST_FINDINGS]
    if shape is None or wrong:
        return None, _columns(record), "; ".join(map(_as_text, wrong)) or "no valid record"
    if shape.format in ("rlhf-online", "sft"):
        prompt = to_prompt(record, source=str(line), line=line)
        messages = record["messages"] if record.get("messages") is not None else prompt.messages
        return messages, _columns(prompt.columns), None
    turns = without_response(record["messages"]) if isinstance(record.get("messages"), list) else None
    return turns, _columns(record), None


def _as_text(finding: Finding) -> str:
    return f"{finding.field or 'record'}: found {finding.found}, expected {finding.expected}"


def _columns(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        return {}
    return {name: value for name, value in record.items() if name not in _HIDDEN}


def _chat(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages that there is room for; one that holds only "…" stands for the rest."""
    room = JsonBudget(_MESSAGES)
    shown: list[dict[str, Any]] = []
    turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in messages[: MOST_ITEMS + 1]]
    for turn in turns:
        role = str(turn.get("role", ""))[:_LONGEST_ROLE]
        if room.left < _MESSAGE or len(shown) == MOST_ITEMS:
            return [*shown, {"role": role, "content": CUT}]
        shown.append(room.fit({"role": role, "content": turn.get("content"), **{**turn, "role": role}}))
    return shown


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


def _parquet(path: Path, offset: int) -> Iterator[tuple[int, Any]]:
    """(row, values or why it has none) after the first `offset`, as a run reads them.

    Only so many rows are held at a time as may be large.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        check_names(file.schema_arrow)
        groups, number = list(range(file.num_row_groups)), 0
        while groups and number + file.metadata.row_group(groups[0]).num_rows <= offset:
            number += file.metadata.row_group(groups.pop(0)).num_rows
        size = min(batch_rows(file.metadata), _BATCH_ROWS)
        for batch in file.iter_batches(batch_size=size, row_groups=groups, use_threads=False):
            for index in range(batch.num_rows):
                number += 1
                if number > offset:
                    yield number, next(batch_values(batch.slice(index, 1)))
