"""Parquet through the same checks: rows from 1, nulls of shared structs, types that JSON does not have."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainers.data.findings import FileReport
from trainers.data.reader import ScanOptions, open_prompts, scan
from trainers.errors import UserError

NAN = float("nan")
USER = {"role": "user", "content": "Hi"}


def write(folder: Path, table: Any, **options: Any) -> str:
    path = folder / "p.parquet"
    pq.write_table(table, path, **options)
    return str(path)


def report(path: str) -> FileReport:
    return scan(path, ScanOptions(keep=False))[1].report()


def problems(path: str) -> list[tuple[int | None, str | None, str]]:
    return [(p.line, p.finding.field, p.finding.found) for p in report(path).problems]


def test_columns_keep_their_types(tmp_path: Path) -> None:
    row = {
        "prompt": "Hi",
        "day": datetime.date(2026, 11, 22),
        "price": decimal.Decimal("1.10"),
        "raw": b"\xff\x00",
        "tags": ["a", None],
        "big": 2**64 - 1,
        "none": None,
    }
    types = pa.schema(
        [
            ("prompt", pa.large_string()),
            ("day", pa.date32()),
            ("price", pa.decimal128(9, 2)),
            ("raw", pa.binary()),
            ("tags", pa.list_(pa.string())),
            ("big", pa.uint64()),
            ("none", pa.null()),
        ]
    )
    path = write(tmp_path, pa.Table.from_pylist([row] * 3, schema=types))
    prompts = open_prompts(path)
    assert [p.line for p in prompts] == [1, 2, 3]
    assert prompts[2].messages == ({"role": "user", "content": "Hi"},)
    assert dict(prompts[2].columns) == {k: v for k, v in row.items() if k != "prompt"}
    assert report(path).duplicates == 2


def test_messages_as_structs_lose_only_the_nulls_that_they_share(tmp_path: Path) -> None:
    call = [{"function": {"name": "add", "arguments": "{}"}, "type": None}]
    messages = [
        {"role": "user", "content": "2 + 2?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "4", "tool_calls": None},
    ]
    path = write(tmp_path, pa.Table.from_pylist([{"messages": messages, "prompt": None}]))
    assert open_prompts(path)[0].messages == (
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "4"},
    )


def test_dictionary_columns_and_small_row_groups(tmp_path: Path) -> None:
    column = pa.array([f"p{i % 7}" for i in range(100)]).dictionary_encode()
    prompts = open_prompts(write(tmp_path, pa.table({"prompt": column}), row_group_size=9))
    assert [p.messages[0]["content"] for p in prompts] == [f"p{i % 7}" for i in range(100)]


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"prompt": ["a", None]}, [(2, "prompt", "null")]),
        ({"prompt": [1, 2]}, [(1, "prompt", "a number: 1"), (2, "prompt", "a number: 2")]),
        ({"prompt": [b"a"]}, [(1, "prompt", "a value of type bytes")]),
        ({"prompt": ["a", "b"], "x": [1.0, float("inf")]}, [(2, "x", "inf")]),
        ({"prompt": ["a"], "x": [[{"y": float("-inf")}]]}, [(1, "x[0].y", "-inf")]),
        ({"prompt": [NAN]}, [(1, "prompt", "a number: nan"), (1, "prompt", "NaN")]),
        ({"messages": [[USER | {"weight": NAN}]]}, [(1, "messages[0].weight", "NaN")]),
        ({"answer": ["a"]}, [(1, None, "an object with `answer`")]),
        ({"prompt": pa.array([], pa.string())}, [(None, None, "no records (an empty file)")]),
    ],
)
def test_bad_rows(tmp_path: Path, table: Any, found: Any) -> None:
    path = write(tmp_path, pa.table(table))
    assert problems(path) == found
    with pytest.raises(UserError):
        open_prompts(path)


def test_nan_in_another_column_is_a_missing_value(tmp_path: Path) -> None:
    table = {
        "prompt": ["a", "b", "c"],
        "answer": [4.0, NAN, NAN],
        "tags": [[{"score": NAN, "name": "x"}], None, None],
        "weights": pa.array([[("k", 1.5)], [("k", NAN)], None], pa.map_(pa.string(), pa.float64())),
        "response": [None, NAN, None],  # a column of nothing but missing values, as pandas writes it
    }
    path = write(tmp_path, pa.table(table))
    found = report(path)
    assert (found.format, found.ready, found.records, found.errors) == ("rlhf-online", True, 3, 0)
    assert [(p.line, p.finding.field, p.finding.found, p.finding.severity) for p in found.problems] == [
        (1, "tags[0].score", "NaN", "warning"),
        (2, "answer", "NaN", "warning"),
        (2, "response", "NaN", "warning"),
        (2, "weights[0][1]", "NaN", "warning"),
        (3, "answer", "NaN", "warning"),
    ]
    assert found.problems_total == 5
    assert {p.finding.expected for p in found.problems} == {"null (NaN is read as a missing value)"}
    prompts = open_prompts(path)
    assert [p.columns["answer"] for p in prompts] == [4.0, None, None]
    assert prompts[0].columns["tags"] == [{"score": None, "name": "x"}]
    assert prompts[1].columns["weights"] == [("k", None)]


def test_nan_makes_no_difference_between_two_prompts(tmp_path: Path) -> None:
    table = {"messages": [[USER], None], "prompt": [None, "Hi"], "score": [NAN, 0.5]}
    assert report(write(tmp_path, pa.table(table))).duplicates == 1


def test_text_that_is_no_utf8_is_named_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd", b"good too"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = write(tmp_path, pa.table({"prompt": column}))
    assert problems(path) == [(2, "prompt", "byte 0xff at byte 1 of the value, not UTF-8")]
    prompts = open_prompts(path, skip_invalid=True, rejected=tmp_path / "rejected.jsonl")
    assert [p.line for p in prompts] == [1, 3]
    assert "0xff" in (tmp_path / "rejected.jsonl").read_text()


def test_a_date_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    far = pa.array([0, 2**62], pa.timestamp("us"))
    ((line, field, found),) = problems(write(tmp_path, pa.table({"prompt": ["a", "b"], "when": far})))
    assert (line, field) == (2, "when")
    assert "cannot be read" in found


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    assert problems(write(tmp_path, table)) == [(None, "prompt", "several columns of this name")]


@pytest.mark.parametrize("keep", [4, 100, -1, -200])
def test_damaged_files_are_told(tmp_path: Path, keep: int) -> None:
    path = Path(write(tmp_path, pa.table({"prompt": [f"prompt {i}" for i in range(999)]})))
    path.write_bytes(path.read_bytes()[:keep])
    ((line, _, found),) = problems(str(path))
    assert line is None
    assert found.startswith("a damaged Parquet file")


def test_remote_files_are_copied_once(tmp_path: Path) -> None:
    import fsspec

    path = write(tmp_path, pa.table({"prompt": ["a", "b"], "answer": [1, 2]}))
    fsspec.filesystem("memory").pipe("/parquet/p.parquet", Path(path).read_bytes())
    remote, local = open_prompts("memory://parquet/p.parquet"), open_prompts(path)
    assert [p.columns["answer"] for p in remote] == [1, 2]
    assert remote.fingerprint() == local.fingerprint()


def test_skipped_rows_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, pa.table({"prompt": ["a", "", "c"]}))
    prompts = open_prompts(path, skip_invalid=True, rejected=tmp_path / "rejected.jsonl")
    assert [(p.line, p.messages[0]["content"]) for p in prompts] == [(1, "a"), (3, "c")]
