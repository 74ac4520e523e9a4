"""Random access to the records of a file: a table of offsets, kept on disk.

It knows offsets, not the content.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("line", "<u4")])  # 16 bytes a record
RowArray = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Row:
    """Where one record is."""

    offset: int
    length: int
    line: int

    @classmethod
    def of(cls, rows: RowArray, i: int) -> Row:
        """Row `i` of a table."""
        return cls(*rows[i].item())


class IndexWriter:
    """Takes rows while a file is read; `finish` gives the table."""

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="rlhf-index-")  # noqa: SIM115  lives as long as the table
        self._rows = 0

    def add(self, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], lines: npt.NDArray[np.int64]) -> None:
        """Append records: offset and length in bytes, physical line; all of one length."""
        rows = np.empty(len(offsets), dtype=ROW)
        rows["offset"], rows["length"], rows["line"] = offsets, lengths, lines
        self.add_rows(rows)

    def add_rows(self, rows: RowArray) -> None:
        """Append rows as they are."""
        self._file.write(rows.tobytes())
        self._rows += len(rows)

    def finish(self) -> RowArray:
        """The table, mapped from disk (the file itself goes with the last reference)."""
        if not self._rows:
            return np.empty(0, dtype=ROW)
        self._file.flush()
        return np.memmap(self._file, dtype=ROW, mode="r", shape=(self._rows,))


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Exactly `length` bytes at `offset`; fewer only if the file was truncated after it was indexed."""
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(descriptor, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
