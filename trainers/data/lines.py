"""Cuts a stream of bytes into blocks of complete lines in bounded memory. It does not interpret the lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 2**17  # fits the processor's cache together with the parsed records
MAX_LINE_BYTES = 2**27  # 128 MiB


@dataclass(frozen=True, slots=True)
class Block:
    """Complete lines, without the last one's end. `data` is None for a single line over `MAX_LINE_BYTES`."""

    offset: int  # of the first byte in the stream, from 0
    line: int  # physical number of the first line, from 1
    data: bytes | None
    size: int


def blocks(read: Callable[[int], bytes]) -> Iterator[Block]:
    """All lines of a stream, in blocks; a line over the limit is skipped without being held.

    >>> import io
    >>> [(b.offset, b.line, b.data) for b in blocks(io.BytesIO(b"a\\nb\\n\\nc").read)]
    [(0, 1, b'a\\nb\\n'), (5, 4, b'c')]
    """
    offset, line = 0, 1
    parts: list[bytes] = []  # the beginning of a line whose end has not come
    held = passed = 0  # bytes in `parts`; bytes of an overlong line already let go
    while data := read(BLOCK_BYTES):
        cut = data.rfind(b"\n")
        if passed:
            end = data.find(b"\n")
            if end < 0:
                passed += len(data)
                continue
            yield Block(offset, line, None, passed + end)
            offset, line, passed = offset + passed + end + 1, line + 1, 0
            data, cut = data[end + 1 :], cut - end - 1
        if cut >= 0:
            parts.append(data[:cut])
            block = Block(offset, line, b"".join(parts), held + cut)
            parts, held = [], 0
            yield block
            offset, line = offset + block.size + 1, line + _count_lines(block)
            data = data[cut + 1 :]
            del block
        if data:
            parts.append(data)
            held += len(data)
        if held > MAX_LINE_BYTES:
            passed, parts, held = held, [], 0
    if passed:
        yield Block(offset, line, None, passed)
    elif parts:
        yield Block(offset, line, b"".join(parts), held)


def _count_lines(block: Block) -> int:
    return (block.data or b"").count(b"\n") + 1
