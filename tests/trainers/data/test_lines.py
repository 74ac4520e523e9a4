"""Blocks of lines against a plain split of the whole text."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data import lines as module
from trainers.data.lines import blocks


def numbered(read: Callable[[int], bytes]) -> list[tuple[int, int, bytes]]:
    """(offset, line number, bytes) of every line."""
    found = []
    for block in blocks(read):
        assert block.data is not None
        assert block.size == len(block.data)
        offset = block.offset
        for i, line in enumerate(block.data.split(b"\n")):
            found.append((offset, block.line + i, line))
            offset += len(line) + 1
    return found


def plain(data: bytes) -> list[tuple[int, int, bytes]]:
    rows, offset = [], 0
    for i, line in enumerate(data.splitlines(keepends=True) if b"\r" not in data else []):
        rows.append((offset, i + 1, line.rstrip(b"\n")))
        offset += len(line)
    return rows


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\n\n"])).map(b"".join), size=st.integers(1, 5))
def test_lines_offsets_and_numbers(data: bytes, size: int) -> None:
    stream = io.BytesIO(data)
    assert numbered(lambda _: stream.read(size)) == plain(data)


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.sampled_from([b"a" * 9, b"bc", b"\n"])).map(b"".join), size=st.integers(1, 5))
def test_an_overlong_line_is_passed_over_and_the_rest_read(data: bytes, size: int) -> None:
    stream = io.BytesIO(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_LINE_BYTES", 12)
        found = list(blocks(lambda _: stream.read(size)))
    long = {(b.offset, b.line, b.size) for b in found if b.data is None}
    lines = plain(data)
    assert {(o, n, len(text)) for o, n, text in lines if len(text) > 12 + size} <= long
    assert long <= {(o, n, len(text)) for o, n, text in lines if len(text) > 12}
    rest = [(b.offset, b.line, b.data) for b in found if b.data is not None]
    kept = [(o, n, t) for o, n, t in lines if (o, n, len(t)) not in long]
    assert sum(d.count(b"\n") + 1 for _, _, d in rest) == len(kept)
    assert {(o, n) for o, n, _ in rest} <= {(o, n) for o, n, _ in kept}


def test_held_memory_is_bounded() -> None:
    reads = 0

    def endless(size: int) -> bytes:
        nonlocal reads
        reads += 1
        return b"x" * size if reads < 4000 else b""

    (block,) = blocks(endless)  # one line of about a gigabyte
    assert block.data is None
    assert block.size == 3999 * module.BLOCK_BYTES
