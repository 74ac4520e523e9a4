"""`rlhf data check`: what people and programs get, on good, bad and bundled files."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli.data_check import _lines, data_check
from trainers.tiny_models import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = sorted((ROOT / "examples").rglob("*.jsonl"))


def run(capsys: pytest.CaptureFixture[str], *files: str, **options: Any) -> tuple[int, str]:
    code = data_check(list(files), **({"model": None, "strip_responses": False, "as_json": False} | options))
    return code, capsys.readouterr().out


def reports(capsys: pytest.CaptureFixture[str], *files: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    code, out = run(capsys, *files, as_json=True, **options)
    whole = json.loads(out)
    assert list(whole) == ["files"]
    return code, whole["files"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_lines(*lines: str, name: str = "p.jsonl") -> str:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write_lines


@pytest.mark.parametrize("path", BUNDLED, ids=lambda p: p.name)
def test_bundled_prompts_are_ready(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (report,) = reports(capsys, str(path))
    assert (code, report["ready"], report["format"]) == (0, True, "rlhf-online")
    assert report["problems"] == []
    assert report["records"] == len(path.read_text().splitlines())


def test_there_are_bundled_prompts() -> None:
    assert len(BUNDLED) >= 5


def test_the_json_is_the_public_contract(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write('{"prompt": "a"}', '{"prompt": "a"}', '{"prompt": 5}')
    code, (report,) = reports(capsys, path)
    assert code == 2
    assert report == {
        "file": path,
        "format": "rlhf-online",
        "ready": False,
        "records": 2,
        "duplicates": 1,
        "evidence": [{"shape": "`prompt`, no response", "format": "rlhf-online", "records": 2, "first_line": 1}],
        "problems": [
            {
                "line": None,
                "field": "prompt",
                "found": "1 repeated prompt of 2",
                "expected": "each prompt once (repeats are kept and trained on more often)",
                "severity": "warning",
            },
            {"line": 3, "field": "prompt", "found": "a number: 5", "expected": "a string", "severity": "error"},
        ],
        "problems_total": 2,
    }


def test_one_report_a_file_and_a_missing_one_is_its_own_problem(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = write('{"prompt": "a"}'), write('{"text": "a"}', name="t.jsonl")
    code, found = reports(capsys, good, "missing.jsonl", other)
    assert code == 2
    assert [(r["ready"], r["format"], r["problems_total"]) for r in found] == [
        (True, "rlhf-online", 0),
        (False, "unknown", 1),
        (False, "pretrain", 1),
    ]
    assert found[1]["problems"][0]["found"] == "no such file"
    assert reports(capsys, good)[0] == 0


def test_globs_name_their_files(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write('{"prompt": "a"}', name="a.jsonl"), write('{"prompt": "a"}', name="b.jsonl")
    code, found = reports(capsys, f"{tmp_path}/*.jsonl", f"{tmp_path}/none*.jsonl")
    assert [Path(r["file"]).name for r in found] == ["a.jsonl", "b.jsonl", "none*.jsonl"]
    assert code == 2


def test_responses_can_be_stripped(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write('{"prompt": "a", "response": "b"}')
    code, (report,) = reports(capsys, path)
    assert (code, report["format"], report["ready"]) == (2, "sft", False)
    assert "data.strip_responses: true" in report["problems"][0]["expected"]
    code, (report,) = reports(capsys, path, strip_responses=True)
    assert (code, report["format"], report["ready"], report["problems"]) == (0, "sft", True, [])


def test_the_text_says_verdict_evidence_and_problems(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(*['{"prompt": "Hi"}'] * 3, '{"text": "x"}', *['{"prompt": 5}'] * 200)
    code, out = run(capsys, path)
    assert code == 2
    flat = re.sub(r"\s+", " ", out)
    assert f"{path}: unknown, not ready" in flat
    assert "rlhf-online: 3 records with `prompt`, no response (first: line 1)" in flat
    assert "4 error `pretrain`: `text` only `rlhf-online`, as 3 others are" in flat
    assert "and 102 more problems" in flat  # 200 bad lines, one that disagrees, one warning; 100 shown


def test_with_a_model_the_lengths_are_shown(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = write('{"prompt": "a"}', json.dumps({"prompt": "x" * 1100}))
    code, (report,) = reports(capsys, path, model=str(tmp_path / "model"))
    assert code == 2
    assert [p["line"] for p in report["problems"]] == [2]
    assert report["lengths"]["over_limit"] == 1
    assert sum(b["prompts"] for b in report["lengths"]["histogram"]) == 1
    assert "over the limit" in run(capsys, path, model=str(tmp_path / "model"))[1]


def test_a_model_that_cannot_be_loaded_is_bad_input(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_check([write('{"prompt": "a"}')], model=str(tmp_path), strip_responses=False, as_json=True) == 2
    assert "no tokenizer can be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input(packed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    stream = io.TextIOWrapper(io.BytesIO(gzip.compress(data) if packed else data))
    monkeypatch.setattr(sys, "stdin", stream)
    code, (report,) = reports(capsys, "-")
    assert (code, report["file"], report["records"]) == (0, "-", 2)


def test_a_slow_pipe_is_read_to_its_end() -> None:
    call = "data_check(['-'], model=None, strip_responses=False, as_json=True)"
    code = f"from cluster.cli.data_check import data_check; {call}"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    for i in range(20):
        child.stdin.write(b'{"prompt": "p%d"}\n' % i)
        child.stdin.flush()
    child.stdin.close()
    report = json.loads(child.stdout.read())["files"][0]
    assert child.wait(timeout=60) == 0
    assert report["records"] == 20


def test_unreadable_files_are_told(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    code, (report,) = reports(capsys, str(tmp_path / "folder.jsonl"))
    assert code == 2
    assert report["problems"][0]["found"] == "a folder"


def test_the_import_stays_light() -> None:
    """Neither torch nor Arrow is needed to say that a file is ready."""
    code = "import sys, cluster.cli.data_check; print({'torch', 'pyarrow', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "set()"


def test_without_a_terminal_progress_is_told_in_lines() -> None:
    output = io.StringIO()
    count = _lines("p.jsonl", Console(file=output, width=80))
    for _ in range(5):
        count(2**27)  # a line for every 2^28 bytes: after the second and the fourth
    assert output.getvalue().splitlines() == ["p.jsonl: 268 MB read", "p.jsonl: 537 MB read"]
