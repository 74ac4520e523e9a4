"""Rows of files that were made to be large: answers and memory are bounded, whatever a file holds."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.service.workers.messages import RowsWork
from cluster.service.workers.pool import Helper
from cluster.service.workers.preview import LARGEST_ROW, read_rows
from cluster.service.workers.truncate import DEEPEST, LONGEST_TEXT, MOST_ITEMS, OVER, JsonBudget
from trainers.errors import UserError

PEAK = """
import sys
from pathlib import Path
from cluster.service.workers import main
before = main.rows(main.RowsWork(path=sys.argv[1], count=1, offset=0))
status = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
held = status()
rows = main.rows(main.RowsWork(path=sys.argv[2], count=5, offset=150))
print(len(rows), status() - held)
"""


@pytest.fixture
async def helper() -> AsyncIterator[Helper]:
    found = Helper()
    yield found
    await found.close()


def repeated(path: Path, text: str, count: int) -> Path:
    """A Parquet file of `count` rows that hold the same text, which it stores once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd", store_schema=False)
    return path


def row(tmp_path: Path, *records: Any) -> dict[str, Any]:
    """The last of the rows that these records are shown as."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return read_rows(path, count=200, offset=0)[-1]


def test_a_value_that_a_file_stores_once_is_not_held_for_every_row(tmp_path: Path) -> None:
    """155 rows of 4 MiB, 620 MiB in all, were held twice; 16 rows at a time are 64 MiB."""
    small = repeated(tmp_path / "small.parquet", "a", 1)
    large = repeated(tmp_path / "large.parquet", "a" * (4 << 20), 155)
    assert large.stat().st_size < 1 << 20
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    count, kib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 5
    assert int(kib) < 256 << 10


def test_a_parquet_row_is_shown_as_a_run_reads_it(tmp_path: Path) -> None:
    """NaN beside the prompt is a missing value, a null key of a message is not there, NaN in the prompt is an error."""
    call = [{"function": {"name": "add"}, "type": None}]
    asked: list[dict[str, Any]] = [{"role": "user", "content": "2 + 2?", "tool_calls": None}]
    calling = [*asked, {"role": "assistant", "content": None, "tool_calls": call}]
    answered = [*calling, {"role": "tool", "content": "4", "tool_calls": None}]
    table = {"messages": [asked, answered, None], "answer": [float("nan"), 4.0, 1.0]}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    first, second, third = read_rows(tmp_path / "p.parquet", count=9, offset=0)
    assert first["columns"] == {"answer": None}
    assert first["messages"] == [{"role": "user", "content": "2 + 2?"}]
    assert second["messages"][1]["tool_calls"] == [{"function": {"name": "add"}}]
    assert second["messages"][2] == {"role": "tool", "content": "4"}
    assert third["problem"].startswith("messages: found null")


def test_a_parquet_row_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd"], pa.binary())
    pq.write_table(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), tmp_path / "p.parquet")
    good, bad = read_rows(tmp_path / "p.parquet", count=9, offset=0)
    assert good["messages"] == [{"role": "user", "content": "good"}]
    assert bad["problem"] == "prompt: found byte 0xff at byte 1 of the value, not UTF-8, expected UTF-8 text"


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="prompt: found several columns of this name"):
        read_rows(tmp_path / "p.parquet", count=9, offset=0)


async def test_rows_that_take_too_much_memory_are_a_users_problem(helper: Helper, tmp_path: Path) -> None:
    """16 rows of 80 MiB are more than the reader's 1 GiB; it goes on with the next file."""
    large = repeated(tmp_path / "large.parquet", "a" * (80 << 20), 1000)
    small = repeated(tmp_path / "small.parquet", "a", 1)
    with pytest.raises(UserError, match=r"large.parquet: cannot be shown: these rows take more than 1 GiB of memory"):
        await helper.call(RowsWork(path=str(large), count=1, offset=0), deadline_s=60)
    (shown,) = await helper.call(RowsWork(path=str(small), count=1, offset=0), deadline_s=60)
    assert shown["messages"] == [{"role": "user", "content": "a"}]


async def test_many_long_lines_are_an_answer_of_bounded_size(helper: Helper, tmp_path: Path) -> None:
    """150 lines of 2 MB of emoji would be 900 MB of JSON, more than a helper may answer."""
    path = tmp_path / "p.jsonl.gz"
    line = json.dumps({"prompt": "😀" * 500_000}, ensure_ascii=False).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(150):
            file.write(line)
    rows = await helper.call(RowsWork(path=str(path), count=150, offset=0), deadline_s=60)
    assert len(rows) == 150
    assert rows[149]["messages"] == [{"role": "user", "content": "😀" * 3410 + "…"}]  # 40 KiB less 31, by 12 bytes
    assert len(json.dumps(rows)) <= 150 * (LARGEST_ROW + 100)


def test_messages_are_cut_as_columns_are(tmp_path: Path) -> None:
    shown = row(tmp_path, {"prompt": "p" * 4001, "answer": "a" * 4001, "note": "n" * 4000})
    assert shown["messages"] == [{"role": "user", "content": "p" * 4000 + "…"}]
    assert shown["columns"] == {"answer": "a" * 4000 + "…", "note": "n" * 4000}


def test_many_messages_end_in_one_that_stands_for_the_rest(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(301)]
    few, many = row(tmp_path, {"messages": turns[:199]}), row(tmp_path, {"messages": turns})
    assert few["messages"] == turns[:199]
    assert many["messages"] == [*turns[:200], {"role": "user", "content": "…"}]
    long = [{**turn, "content": "x" * 4000} for turn in turns]
    shown = row(tmp_path, {"messages": long})["messages"]
    assert shown[:10] == long[:10]  # 10 × 4037 bytes and what stands between them are in 40 KiB, 11 are not
    assert len(shown) == 12
    assert shown[10]["content"].endswith("x…")
    assert shown[11] == {"role": "assistant", "content": "…"}


@pytest.mark.parametrize(
    "value",
    [
        [0] * 100_000,
        [[[["x" * 50] * 20] * 20] * 10],
        {f"{'k' * 3000}{i}": i for i in range(100)},
        {str(i): {str(j): "😀" * 1000 for j in range(10)} for i in range(10)},
        "\u0001" * 50_000,
        [{}] * 100_000,
        [True, None, 1.5, -(2**63)] * 10_000,
    ],
)
@pytest.mark.parametrize("where", ["column", "message", "junk", "other format"])
def test_a_row_is_bounded_whatever_it_holds(tmp_path: Path, value: Any, where: str) -> None:
    record: dict[str, Any] = {
        "column": {"prompt": "x", "a": value, "b": value},
        "message": {"messages": [{"role": "user", "content": "x", "more": value, "name": "n" * 5000}] * 5},
        "junk": {"messages": value, "b": value},
        "other format": {"chosen": [], "rejected": [], "messages": [value, {"role": value, "content": value}]},
    }[where]
    shown = row(tmp_path, record)
    assert len(json.dumps(shown)) <= LARGEST_ROW + 100  # the keys of the row itself
    assert "…" in json.dumps(shown, ensure_ascii=False)


def test_what_fits_is_whole() -> None:
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": ["d"]}}
    assert JsonBudget(200).fit(value) == value
    assert JsonBudget(1 << 20).fit([0] * (MOST_ITEMS + 1)) == [*[0] * MOST_ITEMS, "…"]
    assert JsonBudget(1 << 20).fit("x" * (LONGEST_TEXT + 1)) == "x" * LONGEST_TEXT + "…"
    assert JsonBudget(1 << 20).fit([float("nan"), b"\xff"]) == ["nan", "b'\\xff'"]


def test_what_is_nested_deeper_is_cut() -> None:
    deep: Any = "bottom"
    for _ in range(DEEPEST + 1):
        deep = [deep]
    assert JsonBudget(1000).fit(deep[0]) == deep[0]
    shown = JsonBudget(1000).fit(deep)
    for _ in range(DEEPEST):
        (shown,) = shown
    assert shown == "…"


@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000])
def test_a_room_is_never_left_by_more_than_its_marks(size: int) -> None:
    nested: Any = ["x" * 30, {"key": "😀"}, 12345]
    for _ in range(DEEPEST - 2):
        nested = [*nested, nested]
    assert len(json.dumps(JsonBudget(size).fit(nested))) <= size + OVER


def test_a_damaged_file_is_a_users_problem(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a"}\n' * 10_000)
    for name, content in {
        "cut.jsonl.gz": whole[:60],
        "damaged.jsonl.gz": whole[:30] + b"\xff" * 20 + whole[50:],
        "none.parquet": b"PAR1 but no more",
    }.items():
        (tmp_path / name).write_bytes(content)
    call = "rows(RowsWork(path=sys.argv[1], count=9, offset=9000))"
    script = f"import sys; from cluster.service.workers.main import RowsWork, rows; {call}"
    for name in ("cut.jsonl.gz", "damaged.jsonl.gz", "none.parquet"):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True)
        assert f"UserError: {name}: cannot be shown" in done.stderr.replace("trainers.errors.", ""), done.stderr


def test_an_operators_own_limit_of_memory_stays(tmp_path: Path) -> None:
    script = (
        "import sys, resource as r; r.setrlimit(r.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from cluster.service.workers import main\n"
        "main.rows(main.RowsWork(path=sys.argv[1], count=1, offset=0)); soft, hard = r.getrlimit(r.RLIMIT_AS); "
        "print(1 << 30 < soft < 4 << 30, hard == 8 << 30)"
    )
    path = repeated(tmp_path / "p.parquet", "a", 1)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
