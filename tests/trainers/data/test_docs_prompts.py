"""docs/prompts.md says what the program says: every example line in it is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trainers.data.reader import ScanOptions, scan

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "prompts.md").read_text()
ROW = re.compile(
    r"^\| `(?P<line>.*?)` \| (`(?P<field>[^|]*)`)? ?\| (?P<found>[^|]*) \| (?P<expected>[^|]*) \|$", re.MULTILINE
)
ROWS = [(m["line"], m["field"], m["found"], m["expected"]) for m in ROW.finditer(DOCUMENT)]


def told(path: Path, text: str) -> list[tuple[str | None, str, str]]:
    path.write_text(text)
    report = scan(str(path), ScanOptions(keep=False))[1].report()
    return [(p.finding.field, p.finding.found, p.finding.expected) for p in report.problems]


@pytest.mark.parametrize(("line", "field", "found", "expected"), ROWS)
def test_every_example_line_is_told_as_documented(
    tmp_path: Path, line: str, field: str | None, found: str, expected: str
) -> None:
    alone = told(tmp_path / "p.jsonl", f"{line}\n")
    among = told(tmp_path / "p.jsonl", '{"prompt": "good"}\n' + f"{line}\n")
    assert [(field, found, expected)] in (alone, among)


def test_there_are_as_many_rows_as_there_are_examples() -> None:
    assert len(ROWS) >= 50


def test_the_example_records_are_ready(tmp_path: Path) -> None:
    block = DOCUMENT.split("```json\n")[1].split("```")[0]
    assert told(tmp_path / "p.jsonl", block) == []


def test_the_example_report_is_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = json.loads(DOCUMENT.split("```json\n")[2].split("```")[0])["files"][0]
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 5}\n')
    assert scan("prompts.jsonl", ScanOptions(keep=False))[1].report().as_json() == example
