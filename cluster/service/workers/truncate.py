"""Values of a file that may hold anything, as JSON of bounded size. It knows plain values only."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

CUT = "…"
LONGEST_TEXT = 4000  # characters
MOST_ITEMS = 200  # of one list or object
DEEPEST = 8  # levels
OVER = 1 << 8  # bytes by which marks may go over a room, one for each level
_BETWEEN = 4  # bytes of ", " and, in an object, ": "
_WIDEST = 12  # bytes of one character in JSON: an emoji as two escapes


class JsonBudget:
    """So many bytes of JSON, with everything but ASCII escaped. What does not fit is cut; "…" takes its place.

    >>> JsonBudget(1000).fit({"words": ["a" * 4001, 1.5]})["words"][0][-2:]
    'a…'
    >>> JsonBudget(50).fit(["one", "two", "thirty-three" * 3, "four"])
    ['one', 'two', 'th…', '…']
    """

    def __init__(self, size: int) -> None:
        self.left = size

    def fit(self, value: Any, depth: int = 0) -> Any:
        """The value, or what of it there is room for: at most the room's size and `OVER` bytes of JSON."""
        if isinstance(value, Mapping | list | tuple):
            if depth == DEEPEST:
                return self._text(CUT)
            self.left -= 2
            return self._mapping(value, depth) if isinstance(value, Mapping) else self._list(value, depth)
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            self.left -= _size(value)
            return value
        if isinstance(value, bytes):
            value = value[: LONGEST_TEXT + 1]
        return self._text(value if isinstance(value, str) else str(value))

    def _text(self, value: str) -> str:
        text = value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + CUT
        if _size(text) > self.left:  # nothing else comes after it
            text, self.left = value[: max(self.left, 0) // _WIDEST] + CUT, 0
        self.left -= _size(text)
        return text

    def _list(self, values: Sequence[Any], depth: int) -> list[Any]:
        shown = [self.fit(value, depth + 1) for value in self._while_room(values)]
        return shown if len(shown) == len(values) else [*shown, CUT]

    def _mapping(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        shown = [(self._text(str(key)), self.fit(value, depth + 1)) for key, value in self._while_room(values.items())]
        return dict(shown if len(shown) == len(values) else [*shown, (CUT, CUT)])

    def _while_room(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in itertools.islice(values, MOST_ITEMS):
            if self.left <= 0:
                return
            self.left -= _BETWEEN
            yield value


def _size(value: Any) -> int:
    return len(json.dumps(value))
