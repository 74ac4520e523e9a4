"""Which steps of a long run are shown: few enough to draw, and none of what a person looks for lost.

Pure: rows of numbers in, row numbers out. A row chosen is shown as it was recorded, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
_LARGEST = 1e100  # so that ranges and sums of what is shown stay finite


def telling_rows(rows: Sequence[Mapping[str, Any]], *, keys: Sequence[str], points: int) -> list[int]:
    """`points` (> 0) row numbers, or all where there are fewer, ascending.

    The last row; each key's highest and lowest; rows with a key that fewer than half of the rows have (evaluations),
    a third of the points at most; of as many equal stretches as there is room for, the last row and the one that stands
    out most from its stretch, in some key relative to its full range; others, evenly, while there is still room.

    >>> telling_rows([{"a": 0}, {"a": 0}, {"a": 9}, {"a": 0}, {"a": 1}], keys=["a"], points=3)
    [0, 2, 4]
    """
    if len(rows) <= points:
        return list(range(len(rows)))
    table = _table(rows, keys)
    counts = np.isfinite(table).sum(axis=0)
    table, counts = table[:, counts > 0], counts[counts > 0]
    dense = 2 * counts >= len(rows)
    rare = np.flatnonzero(np.isfinite(table[:, ~dense]).any(axis=1)).tolist()
    kept: dict[int, None] = {}  # in the order of their weight
    kept.update(dict.fromkeys([len(rows) - 1, *np.nanargmax(table, axis=0), *np.nanargmin(table, axis=0)]))
    kept.update(dict.fromkeys(_evenly(rare, points // 3)))
    stretches = (points - len(kept)) // 2
    if stretches > 0:
        kept.update(dict.fromkeys(_of_stretches(table[:, dense], stretches)))
    if len(kept) < points:
        kept.update(dict.fromkeys(_evenly([row for row in range(len(rows)) if row not in kept], points - len(kept))))
    return sorted(int(row) for row in list(kept)[:points])


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    """[rows, keys]; NaN where a row has no finite number."""
    names = keys or [key for key in dict.fromkeys(key for row in rows for key in row) if key != "step"]
    table = np.column_stack([_column(rows, name) for name in names]) if names else np.empty((len(rows), 0))
    table[~np.isfinite(table)] = math.nan
    return table.clip(-_LARGEST, _LARGEST)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Table:
    try:
        return np.fromiter((row.get(name, math.nan) for row in rows), np.float64, len(rows))
    except (TypeError, ValueError, OverflowError):  # a value is not a number, or too large for a float
        return np.fromiter((_number(row.get(name)) for row in rows), np.float64, len(rows))


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _evenly(rows: Sequence[int], most: int) -> Sequence[int]:
    if len(rows) <= most:
        return rows
    return [rows[i * (len(rows) - 1) // max(most - 1, 1)] for i in range(most)]


def _of_stretches(table: Table, stretches: int) -> Iterable[int]:
    """The last row of each stretch, and the one farthest from its stretch's mean in units of a key's full range."""
    filled = np.where(np.isfinite(table), table, np.nanmean(table, axis=0)) if table.size else table
    span = np.ptp(filled, axis=0) if table.size else np.empty(0)
    scaled = filled[:, span > 0] / span[span > 0]
    for part in np.array_split(np.arange(len(table)), stretches):
        yield int(part[-1])
        if scaled.shape[1] and len(part) > 1:
            distance = np.abs(scaled[part] - scaled[part].mean(axis=0)).max(axis=1)
            yield int(part[distance.argmax()])
