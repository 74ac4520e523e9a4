r"""JSON as strict as a prompt file needs it: no duplicate keys, NaN, Infinity, lone surrogates or bottomless nesting.

The fast path is orjson with exact checks that cost little; the slow path parses a line again with the standard
library and locates each fault in the record. It knows JSON only, nothing about prompts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from trainers.data.findings import Finding, printable, shown

MAX_DEPTH = 100  # levels of nesting below a record; every later stage (templates, pickling) recurses
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTAINERS = (dict, list)

loads = orjson.loads
DecodeError = orjson.JSONDecodeError


class TooDeepError(ValueError):
    """A record is nested deeper than `MAX_DEPTH` levels; carries the finding for the user."""

    finding = Finding(None, f"nesting deeper than {MAX_DEPTH} levels", "a flatter record")


def count_nested_keys(values: Iterable[Any]) -> int:
    """Keys of all objects inside `values`, at any depth.

    >>> count_nested_keys(["text", {"a": {"b": 1}}, [{"c": 2}]])
    3
    """
    keys = depth = 0
    level = [v for v in values if type(v) in _CONTAINERS]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise TooDeepError
        below: list[Any] = []
        for container in level:
            if type(container) is dict:
                keys += len(container)
                below += [v for v in container.values() if type(v) in _CONTAINERS]
            else:
                below += [v for v in container if type(v) in _CONTAINERS]
        level = below
    return keys


def count_written_keys(line: bytes) -> int:
    r"""Keys as they are written in a valid JSON text; more than were parsed means that a key is repeated.

    >>> count_written_keys(b'{"a": "x: y", "a": {"b\\"": 1}}')
    3
    """
    return _STRING.sub(b"", line).count(b":")


def parse_exactly(line: bytes, *, offset: int) -> tuple[Any, list[Finding]]:
    """The value of one line with integers of any size, and everything that is wrong with it (then the value is None).

    `offset` is the position of the line's first byte in the (decompressed) file.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        return None, [
            Finding(
                None, f"byte 0x{line[e.start]:02x} at offset {offset + e.start:,}, not UTF-8", "text saved as UTF-8"
            )
        ]
    try:
        tree = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_Constant, parse_float=_float)
    except json.JSONDecodeError as e:
        return None, [_syntax(text, e)]
    except RecursionError:
        return None, [TooDeepError.finding]
    except ValueError:  # int() refuses more digits than sys.get_int_max_str_digits()
        return None, [Finding(None, "an integer of more than 4,300 digits", "a shorter number, or a string")]
    findings = list(_faults(tree))
    if findings:
        return None, findings
    return json.loads(text), []


class _Pairs(list[tuple[str, Any]]):
    """An object with its keys as written, duplicates included."""


class _Constant(str):
    """NaN, Infinity or -Infinity, which JSON does not have."""


def _float(text: str) -> float | _Constant:
    value = float(text)
    return value if math.isfinite(value) else _Constant(text[:20])


def _faults(tree: Any) -> Iterator[Finding]:
    """Walk level by level, without recursion; an entry is (path, value)."""
    level: list[tuple[str, Any]] = [("", tree)]
    for depth in itertools.count():
        if depth > MAX_DEPTH and any(isinstance(value, list) for _, value in level):  # _Pairs are lists too
            yield TooDeepError.finding
            return
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, _Constant):
                yield Finding(path or None, f"{value}, which is not a finite number", "a finite number, or null")
            elif isinstance(value, str) and _SURROGATE.search(value):
                yield _surrogate(path, value)
            elif isinstance(value, _Pairs):
                yield from _object(path, value, below)
            elif isinstance(value, list):
                below += [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        if not below:
            return
        level = below


def _object(path: str, pairs: _Pairs, below: list[tuple[str, Any]]) -> Iterator[Finding]:
    seen: set[str] = set()
    for key, value in pairs:
        name = f"{path}.{printable(key)}" if path else printable(key)
        if _SURROGATE.search(key):
            yield _surrogate(name, key)
        if key in seen:
            yield Finding(name, "the same key twice in one object", "each key once")
        seen.add(key)
        below.append((name, value))


def _surrogate(path: str, text: str) -> Finding:
    match = _SURROGATE.search(text)
    code = ord(match.group()) if match else 0
    return Finding(
        path or None, f"a lone surrogate \\u{code:04x}", "a complete character (half of an emoji was cut off?)"
    )


def _syntax(text: str, error: json.JSONDecodeError) -> Finding:
    """What is wrong with a text that is not JSON, naming the usual causes."""
    column = error.pos + 1
    near = printable(text[error.pos : error.pos + 20])
    found = f"invalid JSON at column {column:,}: {error.msg}" + (f", near `{near}`" if near else ", at the end")
    stripped = text.strip()
    if "\0" in text:
        return Finding(None, f"NUL bytes, the first at column {text.index(chr(0)) + 1:,}", "text (a damaged file?)")
    if stripped.startswith("\ufeff"):
        return Finding(None, "a byte order mark inside the file", "none, or one at the start of the file only")
    if stripped in ("{", "["):
        return Finding(None, f"a value spread over several lines (`{stripped}`)", "one complete object on each line")
    if error.msg == "Extra data":
        return Finding(None, f"more than one value on the line, from column {column:,}", "one object on each line")
    if stripped.startswith("{'") or ": '" in stripped[:200]:
        return Finding(None, found, "JSON with double quotes (this looks like a Python dict: write it with json.dumps)")
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return Finding(None, found, "a complete object (the line ends too early)")
    return Finding(None, found, "one JSON object on the line")


def not_an_object(value: Any) -> Finding:
    """The finding for a line that is not an object."""
    return Finding(None, shown(value), 'an object such as {"prompt": "…"}')
