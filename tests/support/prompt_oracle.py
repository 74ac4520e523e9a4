"""What the public contract says of a file of lines, written plainly on the standard library: the tests' second opinion.

It knows nothing of the reader but its result; `compare` states what must hold for any bytes whatever.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from trainers.data import lines
from trainers.data.reader import ScanOptions, scan


class Refused(ValueError):
    """A line that is no strict JSON."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise Refused("duplicate key")
    return dict(pairs)


def _constant(name: str) -> None:
    raise Refused(name)


def _float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise Refused(text)
    return float(text)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def strict_json(line: bytes) -> Any:
    """The value of a line; raises ValueError (or RecursionError) where it is no strict JSON."""
    text = line.decode("utf-8")
    value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    if isinstance(value, dict) and _depth(value) > 101:  # the record itself and a hundred levels below
        raise Refused("too deep")
    return value


def is_prompt_record(value: Any) -> bool:
    """True for a record whose only special field is a valid `prompt`."""
    special = {"messages", "response", "completion", "chosen", "rejected", "rejected_response", "rejected_messages"}
    if not isinstance(value, dict) or any(value.get(k) is not None for k in special):
        return False
    prompt = value.get("prompt")
    return isinstance(prompt, str) and bool(prompt.strip()) and not isinstance(value.get("label"), bool)


def compare(data: bytes, *, block: int) -> None:
    """Read `data` plainly and packed and hold the result against this module's opinion of each line."""
    results = [_read(data, ".jsonl", 2**18), _read(data, ".jsonl", block), _read(data, ".jsonl.gz", block)]
    if any(tally.fatal for tally, _ in results):  # refused as a whole: it says so, whatever the lines
        assert not any(tally.report().ready for tally, _ in results if tally.fatal)
        return
    first = results[0][0].report()
    assert all(tally.report().as_json() | {"file": ""} == first.as_json() | {"file": ""} for tally, _ in results)
    body = data.removeprefix(b"\xef\xbb\xbf")
    written = dict(enumerate(body.split(b"\n"), 1))
    wrong = {p.line for p in first.problems if p.finding.severity == "error" and p.line is not None}
    for number, line in written.items():
        if not line or line.isspace():
            assert number not in wrong
            continue
        try:
            value = strict_json(line)
        except (ValueError, RecursionError):
            assert number in wrong or first.errors > 100, line
            continue
        if is_prompt_record(value) and first.format != "unknown":
            assert number not in wrong, line
    for _, file in results:
        assert file is not None
        for i in range(len(file)):
            prompt = file[i]
            value = strict_json(written[prompt.line])
            assert file.record(i) == value
            if value.get("prompt") is not None:
                assert prompt.messages == ({"role": "user", "content": value["prompt"]},)
            else:
                assert list(prompt.messages) == value["messages"]


def _read(data: bytes, suffix: str, block: int) -> tuple[Any, Any]:
    before, lines.BLOCK_BYTES = lines.BLOCK_BYTES, block
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"p{suffix}"
            path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
            file, tally = scan(str(path), ScanOptions())
            return tally, file
    finally:
        lines.BLOCK_BYTES = before
