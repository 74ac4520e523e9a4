"""The fast path: a block of records that are all written the usual way is judged at once, at C speed.

Its result is what `detect.inspect` and `strict.count_nested_keys` give for each record; if it is not sure of every
record, it gives none. It knows the detector's shapes and the rules for messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from operator import itemgetter
from typing import Any

from trainers.data.detect import DECISIVE, MESSAGES, PROMPT, Shape
from trainers.data.messages import check_messages
from trainers.data.strict import TooDeepError, count_nested_keys
from trainers.data.tally import turns_key

_CONTAINERS = frozenset({dict, list})
_BESIDE_MESSAGES = (DECISIVE - {"messages"}) | {"prompt", "label"}
_TURN = itemgetter("role", "content")
_TURN_NAMES = frozenset({("role", "content"), ("content", "role")})


@dataclass(frozen=True, slots=True)
class PlainBlock:
    """One shape for all records of a block; for each its number of keys, and what makes its prompt the same prompt."""

    shape: Shape
    keys: list[int]
    prompts: list[Any]


def plain_block(records: Sequence[Any]) -> PlainBlock | None:
    """The judgment on a block if it is the same for all records and has no finding, else None."""
    if set(map(type, records)) != {dict}:
        return None
    names = set(map(tuple, records))
    if all("prompt" in n and DECISIVE.isdisjoint(n) for n in names):
        return _prompts(records)
    if all("messages" in n and _BESIDE_MESSAGES.isdisjoint(n) for n in names):
        return _messages(records)
    return None


def _prompts(records: Sequence[dict[str, Any]]) -> PlainBlock | None:
    prompts = [r["prompt"] for r in records]
    if not _all_texts(prompts):
        return None
    keys = list(map(len, records))
    if not _CONTAINERS.isdisjoint(map(type, chain.from_iterable(map(dict.values, records)))):
        try:
            keys = [n + count_nested_keys(r.values()) for n, r in zip(keys, records, strict=True)]
        except TooDeepError:
            return None
    return PlainBlock(PROMPT, keys, prompts)


def _messages(records: Sequence[dict[str, Any]]) -> PlainBlock | None:
    types = list(map(type, chain.from_iterable(map(dict.values, records))))
    if dict in types or types.count(list) != len(records):
        return None
    dialogues = [r["messages"] for r in records]
    if set(map(type, dialogues)) != {list}:
        return None
    turns: list[Any] = list(chain.from_iterable(dialogues))
    if set(map(type, turns)) != {dict} or not set(map(tuple, turns)) <= _TURN_NAMES:
        return None
    roles, contents = zip(*map(_TURN, turns), strict=True)
    if not _all_texts(roles) or not _all_texts(contents):
        return None
    lengths = list(map(len, dialogues))
    orders = _split(roles, lengths)
    for order in set(orders):
        if check_messages([{"role": role, "content": "…"} for role in order]) or order[-1] == "assistant":
            return None
    keys = [len(r) + 2 * n for r, n in zip(records, lengths, strict=True)]
    return PlainBlock(MESSAGES, keys, list(map(turns_key, orders, _split(contents, lengths))))


def _split(values: Sequence[Any], lengths: list[int]) -> list[tuple[Any, ...]]:
    """A flat sequence cut into tuples of these lengths."""
    if len(set(lengths)) == 1:
        return list(zip(*[iter(values)] * lengths[0], strict=True))
    return list(map(tuple, map(islice, repeat(iter(values)), lengths)))


def _all_texts(values: Sequence[Any]) -> bool:
    """True if every value is a string that is more than white space."""
    return set(map(type, values)) == {str} and all(values) and not any(map(str.isspace, values))
