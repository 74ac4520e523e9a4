"""The reader on made-up and mutated files, held against the plain second opinion in prompt_oracle.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.prompt_oracle import compare

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SECONDS = int(os.environ.get("RLHF_FUZZ_SECONDS", "4"))  # hours: RLHF_FUZZ_SECONDS=36000

TEXT = st.text(st.sampled_from('aé🙂":\\{}[],\n\t\r \u2028\0')) | st.text(max_size=5)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": TEXT})
RECORD = st.fixed_dictionaries({"prompt": TEXT}, optional={"answer": VALUE, "x:": VALUE}) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)}, optional={"task": VALUE}
)


def written(record: Any, style: int) -> bytes:
    separators = [(", ", ": "), (",", ":"), (" ,\t", " : ")][style % 3]
    return json.dumps(record, ensure_ascii=bool(style & 4), separators=separators).encode("utf-8", "surrogatepass")


LINE = st.builds(written, RECORD | VALUE, st.integers(0, 7)) | st.sampled_from(
    [b"", b" \t", b"\r", b"{", b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\\ud83d"}', b'{"prompt": "\xff"}']
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Lines of records and worse, joined by either line end, sometimes with a byte changed, cut out or put in."""
    data = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(draw(st.lists(LINE, max_size=6)))
    data = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + data
    for place, cut, put in draw(
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=2)), max_size=2)
    ):
        data = data[:place] + put + data[place + cut :]
    return data


@settings(max_examples=250, deadline=None)
@given(data=files(), block=st.integers(1, 64))
def test_any_file_is_judged_line_by_line(data: bytes, block: int) -> None:
    compare(data, block=block)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), block=st.integers(1, 8))
def test_any_bytes_are_survived(data: bytes, block: int) -> None:
    compare(data, block=block)


@pytest.mark.integration
def test_coverage_guided(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no build for this Python")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, path in enumerate(sorted((ROOT / "examples" / "prompts").glob("*.jsonl"))):
        (corpus / str(i)).write_bytes(b"\x40" + path.read_bytes()[:600])
    (corpus / "odd").write_bytes(b"\x10" + b'\xef\xbb\xbf{"prompt": "a:", "x": {"y": NaN, "y" : 1e999}}\r\n\n[1]\n')
    limits = [f"-max_total_time={SECONDS}", "-max_len=2000", "-timeout=10", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_reader.py"), *limits, str(corpus)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
    )
    found = [p.read_bytes() for p in tmp_path.iterdir() if p.is_file()]
    assert done.returncode == 0, f"{found}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Done" in done.stderr
