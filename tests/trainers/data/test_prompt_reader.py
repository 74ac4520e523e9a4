"""The reader on real files: every handled case of the public contract, by file, line and field."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from trainers.data import lines as lines_module
from trainers.data import source as source_module
from trainers.data.findings import FileReport
from trainers.data.reader import PromptSet, ScanOptions, open_prompts, scan
from trainers.errors import UserError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of records (dicts), lines (str) or bytes and returns its path."""

    def write_file(content: bytes | Iterable[Any], name: str = "p.jsonl") -> str:
        path = tmp_path / name
        if not isinstance(content, bytes):
            lines = [c if isinstance(c, str) else json.dumps(c) for c in content]
            content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write_file


def report(path: str, *, strip_responses: bool = False) -> FileReport:
    return scan(path, ScanOptions(keep=False, strip_responses=strip_responses))[1].report()


def problems(path: str) -> list[tuple[int | None, str | None, str]]:
    """(line, field, found) of every error."""
    return [(p.line, p.finding.field, p.finding.found) for p in report(path).problems if p.finding.severity == "error"]


def texts(prompts: PromptSet) -> list[str]:
    return [p.messages[-1]["content"] for p in prompts]


GOOD = {"prompt": "Hi", "answer": "4"}


def test_prompts_come_back_as_written_with_every_column(write: Write) -> None:
    records = [
        {"prompt": "Write a haiku about coding.", "answer": None, "big": 2**80, "nested": {"a": [1, {"b": 0.5}]}},
        {"messages": [{"role": "system", "content": "ü🙂"}, {"role": "user", "content": "Hi", "name": "x"}], "task": 1},
    ]
    prompts = open_prompts(write(records))
    assert len(prompts) == 2
    assert prompts[0].messages == ({"role": "user", "content": "Write a haiku about coding."},)
    assert prompts[0].columns == {"answer": None, "big": 2**80, "nested": {"a": [1, {"b": 0.5}]}}
    assert prompts[1].messages == tuple(records[1]["messages"])
    assert prompts[1].columns == {"task": 1}
    assert [(p.line, Path(p.source).name) for p in prompts] == [(1, "p.jsonl"), (2, "p.jsonl")]


def test_bom_crlf_blank_lines_and_trailing_space_are_handled_and_lines_are_physical(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}  \t\r\n\n {"prompt": "c"}')
    prompts = open_prompts(path)
    assert [(p.line, p.messages[0]["content"]) for p in prompts] == [(1, "a"), (4, "b"), (6, "c")]


def test_duplicates_are_counted_by_their_prompt_alone(write: Write) -> None:
    path = write(
        [
            {"prompt": "a", "answer": 1},
            {"prompt": "a", "answer": 2},
            {"messages": [{"role": "user", "content": "a"}]},
            {
                "messages": [
                    {"content": "b", "role": "user"},
                    {"role": "assistant", "content": "c"},
                    {"role": "user", "content": "d"},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "c"},
                    {"content": "d", "role": "user"},
                ]
            },
            {"prompt": "b"},
        ]
    )
    found = report(path)
    assert found.duplicates == 3
    assert found.ready
    assert [(p.line, p.finding.severity) for p in found.problems] == [(None, "warning")]
    assert len(open_prompts(path)) == 6  # repeated prompts are allowed


@pytest.mark.parametrize(
    ("line", "field", "found"),
    [
        ('{"prompt": "a", "x": NaN}', "x", "NaN, which is not a finite number"),
        ('{"prompt": "a", "x": {"y": [Infinity]}}', "x.y[0]", "Infinity, which is not a finite number"),
        ('{"prompt": "a", "x": 1, "x": 2}', "x", "the same key twice in one object"),
        ('{"prompt": "a", "prompt": "a"}', "prompt", "the same key twice in one object"),
        ('{"prompt": "a", "x" \t: 1, "x": 2}', "x", "the same key twice in one object"),
        ('{"prompt": "a", "x": {"y": 1, "y": ":"}}', "x.y", "the same key twice in one object"),
        ('{"prompt": "a", "\\"": 1, "\\"": 2}', '"', "the same key twice in one object"),
        (
            '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
            "messages[0].role",
            "the same key twice in one object",
        ),
        ('{"prompt": "a\\ud800"}', "prompt", "a lone surrogate \\ud800"),
        ('{"prompt": "a", "x": ["\\udfff"]}', "x[0]", "a lone surrogate \\udfff"),
        ('{"prompt": ""}', "prompt", "an empty string"),
        ('{"prompt": " \\n\\t"}', "prompt", "white space only"),
        ('{"prompt": 7}', "prompt", "a number: 7"),
        ('{"prompt": true}', "prompt", "true"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "prompt", "both `prompt` and `messages`"),
        ("[1, 2]", None, "a list of 2"),
        ('"text"', None, 'a string: "text"'),
        ("null", None, "null"),
        ('{"prompt": "a", "x": ' + "[" * 200 + "]" * 200 + "}", None, "nesting deeper than 100 levels"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", None, "nesting deeper than 100 levels"),
        ('{"prompt": "a", "x": ' + '{"x":' * 100_000, None, "nesting deeper than 100 levels"),
    ],
)
def test_a_bad_line_among_good_ones(write: Write, line: str, field: str | None, found: str) -> None:
    path = write([GOOD, "", line, GOOD])
    assert problems(path) == [(3, field, found)]
    assert report(path).records == 2
    with pytest.raises(UserError) as error:
        open_prompts(path)
    assert [p.where for p in error.value.problems] == [f"{path}:3"]


def test_colons_quotes_and_escapes_in_texts_are_no_duplicate_keys(write: Write) -> None:
    texts_ = ['He said: "a": b', '{"a": 1, "a": 2}', "\\", '\\":', "a : b", ' ":', "::::"]
    records: list[Any] = [{"prompt": t, t: {t: t, "k\\": ":"}} for t in texts_]
    assert problems(write(records)) == []
    assert texts(open_prompts(write(records))) == texts_


def test_bytes_that_are_no_utf8_are_named_with_their_offset(write: Write) -> None:
    good = json.dumps(GOOD).encode() + b"\n"
    for bom in (b"", b"\xef\xbb\xbf"):
        path = write(bom + good + b'{"prompt": "\xff"}\n' + good)
        offset = len(bom) + len(good) + len(b'{"prompt": "')
        assert problems(path) == [(2, None, f"byte 0xff at offset {offset:,}, not UTF-8")]


def test_big_integers_are_kept_exactly(write: Write) -> None:
    numbers = [2**64, -(2**63) - 1, 10**400, 2**53 + 1]
    assert [p.columns["n"] for p in open_prompts(write([{"prompt": "a", "n": n} for n in numbers]))] == numbers
    line = '{"prompt": "a", "n": ' + "9" * 5000 + "}"
    assert problems(write([line])) == [(1, None, "an integer of more than 4,300 digits")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no records (an empty file)"),
        (b"\n \n", "no records (an empty file)"),
        (b'[{"prompt": "a"}, {"prompt": "b"}]', "a JSON array instead of lines"),
        (b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', "a JSON array instead of lines"),
        (b'[\n  {\n    "prompt": "a"\n  }\n]\n', "a JSON array instead of lines"),
        (b'{\n  "prompt": "a"\n}\n', "JSON objects spread over several lines (first at line 1)"),
        (b'\xef\xbb\xbf\n \n{\n  "prompt": "a"\n}\n', "JSON objects spread over several lines (first at line 3)"),
        (b"PK\x03\x04rest", "content that looks like a zip archive (or an office document)"),
        (b"PAR1rest", "content that looks like Parquet"),
        ('{"prompt": "a"}'.encode("utf-16"), "content that looks like UTF-16 text"),
        (b"<!DOCTYPE html><html>", "content that looks like a web page (a failed download?)"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "content that looks like gzip"),
    ],
)
def test_a_file_that_is_something_else_gets_one_clear_error(write: Write, content: bytes, found: str) -> None:
    path = write(content)
    assert problems(path) == [(None, None, found)]
    assert report(path).format == "unknown"
    with pytest.raises(UserError):
        open_prompts(path, skip_invalid=True, rejected=Path(path).parent / "rejected.jsonl")


def test_a_list_on_the_first_of_many_lines_is_that_lines_problem(write: Write) -> None:
    assert problems(write([[1], GOOD, GOOD])) == [(1, None, "a list of 1")]
    assert problems(write(["{", GOOD, GOOD])) == [(1, None, "a value spread over several lines (`{`)")]


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.txt", "prompts", "p.jsonl.zst"])
def test_other_suffixes_are_refused(write: Write, name: str) -> None:
    ((line, _, found),) = problems(write([GOOD], name))
    assert line is None
    assert found.startswith("the suffix")


def test_all_problems_are_collected_and_a_hundred_shown(write: Write) -> None:
    path = write([GOOD, *[{"prompt": i} for i in range(250)]])
    found = report(path)
    assert (len(found.problems), found.problems_total, found.errors) == (100, 250, 250)
    assert [p.line for p in found.problems][:2] == [2, 3]


def test_open_names_every_file_and_counts_the_rest(write: Write) -> None:
    a, b = write([{"prompt": i} for i in range(90)], "a.jsonl"), write([{"prompt": i} for i in range(90)], "b.jsonl")
    with pytest.raises(UserError) as error:
        open_prompts([a, b, "missing.jsonl"])
    where = [p.where for p in error.value.problems]
    assert len(where) == 101
    assert where[0] == f"{a}:1"
    assert where[90] == f"{b}:1"
    assert "81 more problems" in error.value.problems[-1].message


def test_skip_invalid_leaves_bad_lines_out_and_writes_them_with_reasons(write: Write, tmp_path: Path) -> None:
    lines = [
        GOOD,
        '{"prompt": 1, "x": 2}',
        GOOD,
        b'{"prompt": "\xff"}'.decode("latin-1"),
        {"prompt": "q", "response": "r"},
        GOOD,
    ]
    path = write(lines)
    rejected = tmp_path / "run" / "rejected.jsonl"
    prompts = open_prompts(path, skip_invalid=True, rejected=rejected)
    assert [p.line for p in prompts] == [1, 3, 4, 6]
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(e["file"], e["line"]) for e in entries] == [(path, 2), (path, 5)]
    assert entries[0]["text"] == '{"prompt": 1, "x": 2}'
    assert entries[0]["reasons"] == [{"field": "prompt", "found": "a number: 1", "expected": "a string"}]
    open_prompts(write([GOOD], "good.jsonl"), skip_invalid=True, rejected=rejected)
    assert rejected.read_text() == ""  # a new run begins anew


def test_skip_invalid_keeps_bytes_that_are_no_text(write: Write, tmp_path: Path) -> None:
    path = write(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert len(open_prompts(path, skip_invalid=True, rejected=tmp_path / "r.jsonl")) == 1
    assert json.loads((tmp_path / "r.jsonl").read_text())["text"] == '{"prompt": "\\xff"}'


def test_skip_invalid_refuses_a_file_of_another_format(write: Write, tmp_path: Path) -> None:
    sft = [{"prompt": "a", "response": "b"}] * 3
    for records in (sft, [*sft, GOOD], [{"prompt": 1}]):
        with pytest.raises(UserError):
            open_prompts(write(records), skip_invalid=True, rejected=tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="rejected"):
        open_prompts(write([GOOD]), skip_invalid=True)


def test_strip_responses_uses_the_prompts_of_sft_data(write: Write) -> None:
    path = write(
        [
            {"prompt": "a", "response": "r1", "answer": 1},
            {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "r2"}]},
            {"instruction": "c", "input": "d", "output": "r3", "id": 7},
            {"prompt": "e"},
        ]
    )
    with pytest.raises(UserError, match="strip_responses"):
        open_prompts(write([{"prompt": "a", "response": "b"}], "sft.jsonl"))
    assert not report(path).ready
    assert report(path, strip_responses=True).ready
    prompts = open_prompts(path, strip_responses=True)
    assert texts(prompts) == ["a", "b", "c\nd", "e"]
    assert [p.columns for p in prompts] == [{"answer": 1}, {}, {"id": 7}, {}]
    assert [prompts[i].response for i in range(4)] == ["r1", "r2", "r3", None]


def test_gzip_globs_and_several_files(write: Write, tmp_path: Path) -> None:
    write([{"prompt": "b"}], "b.jsonl.gz")
    write([{"prompt": "a"}, {"prompt": "a2"}], "a.jsonl")
    c = write([{"prompt": "c"}], "other.jsonl")
    prompts = open_prompts([f"{tmp_path}/[ab].jsonl*", c])
    assert texts(prompts) == ["a", "a2", "b", "c"]
    assert prompts.entry_sizes() == [3, 1]
    assert prompts[-1].messages == prompts[3].messages
    assert [p.line for p in prompts[1:3]] == [2, 1]
    with pytest.raises(IndexError):
        prompts[4]


@pytest.mark.parametrize(("address", "told"), [("none/*.jsonl", "matches no file"), ("no.jsonl", "no such file")])
def test_missing_files_are_problems(tmp_path: Path, address: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        open_prompts(str(tmp_path / address))
    with pytest.raises(UserError, match="a folder"):
        open_prompts(str(tmp_path))


def test_fsspec_addresses(write: Write) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"prompt": "a"}\n')
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    assert texts(open_prompts("memory://bucket/*.jsonl*")) == ["a", "b"]
    assert texts(open_prompts("memory://bucket/b.jsonl.gz")) == ["b"]
    with pytest.raises(UserError, match="no such file"):
        open_prompts("memory://bucket/c.jsonl")
    with pytest.raises(UserError, match="Protocol"):
        open_prompts("nosuch://bucket/c.jsonl")


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        (lambda data: data[:-9], "truncated gzip stream"),
        (lambda data: data[: len(data) // 2], "truncated gzip stream"),
        (lambda data: data[:30] + b"\0\xff" + data[32:], "damaged gzip stream: "),
    ],
)
def test_damaged_gzip_files_are_reported(write: Write, cut: Callable[[bytes], bytes], found: str) -> None:
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(20_000)))
    path = write(b"", "p.jsonl")
    Path(path + ".gz").write_bytes(cut(whole))
    assert problems(path + ".gz")[-1][2].startswith(found)
    Path(path + ".gz").write_bytes(b'{"prompt": "a"}\n')
    assert problems(path + ".gz") == [(None, None, "content that looks like JSON")]


def test_a_long_line_is_read_and_a_longer_one_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([GOOD, {"prompt": "x" * 3_000_000}, GOOD])
    assert len(open_prompts(path)[1].messages[0]["content"]) == 3_000_000
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1_000_000)
    assert problems(path) == [(2, None, "a line of 3,000,014 bytes")]
    assert [p.line for p in open_prompts(path, skip_invalid=True, rejected=Path(path + ".rejected"))] == [1, 3]
    assert json.loads(Path(path + ".rejected").read_text())["text"] is None


@pytest.mark.parametrize("unit", [b"\0" * 2**20, b"\n" * 2**20, b'{"prompt": "a"}\n' * 2**16])
def test_decompression_bombs_stop_early(write: Write, monkeypatch: pytest.MonkeyPatch, unit: bytes) -> None:
    monkeypatch.setattr(source_module, "BOMB_BYTES", 2**21)
    path = write(unit * 8, "bomb.jsonl.gz")
    found = problems(path)[-1]
    assert found[0] is None
    assert "expands" in found[2]


def test_a_file_that_changes_while_in_use_is_told(write: Write) -> None:
    path = write([GOOD, GOOD])
    prompts = open_prompts(path)
    os.truncate(path, 5)
    with pytest.raises(UserError, match="was changed"):
        prompts[1]


def test_fingerprint_is_of_content_and_use_not_of_place(write: Write, tmp_path: Path) -> None:
    records = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": 1}]
    skip = {"skip_invalid": True, "rejected": tmp_path / "rejected.jsonl"}
    here = open_prompts(write(records, "a.jsonl"), **skip).fingerprint()
    assert here == open_prompts(write(records, "b.jsonl.gz"), **skip).fingerprint()
    assert here != open_prompts(write(records[:2], "c.jsonl"), **skip).fingerprint()
    assert here != open_prompts(write([{"prompt": "A"}, *records[1:]], "d.jsonl"), **skip).fingerprint()


def test_progress_counts_stored_bytes(write: Write) -> None:
    path = write([GOOD] * 1000, "p.jsonl.gz")
    read: list[int] = []
    open_prompts(path, on_bytes=read.append)
    assert sum(read) == Path(path).stat().st_size


def test_control_characters_never_reach_a_terminal(write: Write) -> None:
    ((_, _, found),) = problems(write([{"prompt": {"\x1b[31m": 1}}]))
    assert "\x1b" not in found
