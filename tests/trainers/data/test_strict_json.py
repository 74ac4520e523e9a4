"""Strict JSON: what is refused, where it stands, and that the fast path and the exact one agree."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.strict import MAX_DEPTH, TooDeepError, count_nested_keys, count_written_keys, parse_exactly


def faults(line: str | bytes, offset: int = 0) -> list[tuple[str | None, str]]:
    raw = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    return [(f.field, f.found) for f in parse_exactly(raw, offset=offset)[1]]


@pytest.mark.parametrize(
    ("line", "field", "found"),
    [
        ('{"a": NaN}', "a", "NaN, which is not a finite number"),
        ('{"a": [1, {"b": -Infinity}]}', "a[1].b", "-Infinity, which is not a finite number"),
        ('{"a": 1e999}', "a", "1e999, which is not a finite number"),
        ('{"a": {"b": 1, "b": 2}}', "a.b", "the same key twice in one object"),
        ('{"a": 1, "\\u0061": 2}', "a", "the same key twice in one object"),
        ('{"a": "x\\ud83d"}', "a", "a lone surrogate \\ud83d"),
        ('{"\\udc00": 1}', "\\udc00", "a lone surrogate \\udc00"),
        ('{"a": 1} {"b": 2}', None, "more than one value on the line, from column 10"),
        ('{"a": "x\0"}', None, "NUL bytes, the first at column 9"),
        ("{", None, "a value spread over several lines (`{`)"),
        ('{"a": ' + "9" * 4301 + "}", None, "an integer of more than 4,300 digits"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", None, f"nesting deeper than {MAX_DEPTH} levels"),
    ],
)
def test_fault_and_place(line: str, field: str | None, found: str) -> None:
    assert faults(line) == [(field, found)]


def test_all_faults_of_a_line_are_named() -> None:
    assert [field for field, _ in faults('{"a": NaN, "b": {"c": 1, "c": "\\ud800"}, "a": Infinity}')] == [
        "a",
        "a",
        "b.c",
        "a",
        "b.c",
    ]


def test_bytes_that_are_no_utf8_are_named_with_their_offset_in_the_file() -> None:
    assert faults(b'{"a": "\xff"}', offset=1000) == [(None, "byte 0xff at offset 1,007, not UTF-8")]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("{'prompt': 'Hi'}", "json.dumps"),
        ('{"prompt": "Hi', "ends too early"),
        ('{"prompt": "Hi"', "ends too early"),
        ("hello", "one JSON object"),
        ("\ufeff{}", "start of the file only"),
    ],
)
def test_usual_causes_are_told(line: str, hint: str) -> None:
    (finding,) = parse_exactly(line.encode(), offset=0)[1]
    assert hint in finding.expected


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**400])
def test_integers_of_any_size_are_kept(number: int) -> None:
    assert parse_exactly(b'{"a": %d}' % number, offset=0) == ({"a": number}, [])


def test_depth_limit_is_the_same_on_both_paths() -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        line = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
        exact = not parse_exactly(line, offset=0)[1]
        try:
            count_nested_keys(json.loads(line).values())
            fast = True
        except TooDeepError:
            fast = False
        assert exact == fast == (depth == MAX_DEPTH)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('ab":\\ {')), inner, max_size=4)
    ),
    max_leaves=20,
)


def count_keys(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(count_keys, value.values()))
    return sum(map(count_keys, value)) if isinstance(value, list) else 0


@settings(max_examples=200, deadline=None)
@given(value=st.dictionaries(st.text(st.sampled_from('ab":\\ ,{')), JSON, max_size=4), spaced=st.booleans())
def test_valid_json_is_accepted_exactly_and_its_keys_counted(value: dict[str, object], spaced: bool) -> None:
    line = json.dumps(value, ensure_ascii=False, separators=(" , ", " : ") if spaced else None).encode()
    parsed, findings = parse_exactly(line, offset=0)
    assert findings == []
    assert parsed == value
    assert count_written_keys(line) == count_keys(value) == len(value) + count_nested_keys(value.values())


@settings(max_examples=100, deadline=None)
@given(number=st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_are_accepted_where_they_are_finite(number: float) -> None:
    _, findings = parse_exactly(json.dumps({"a": [number]}).encode(), offset=0)
    assert bool(findings) == (not math.isfinite(number))
