"""Sample summaries, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.doctor import summarize
from cluster.doctor.sample_summary import loops

PROSE = (
    "The committee met on Tuesday to discuss the budget for the coming year. After two hours the members agreed that "
    "the library needs a new roof, that the school bus must be replaced before winter, and that nobody knows where the "
    "money for either will come from. The treasurer offered to write a letter to the county."
)


def row(group: int, sample: str, completion: str, **other: Any) -> dict[str, Any]:
    return {
        "group": group,
        "sample_id": sample,
        "completion": completion,
        "finish_reason": "stop",
        "valid": True,
        "rewards": {"judge": 1.0},
    } | other


def test_by_hand() -> None:
    rows = [
        row(0, "a", "4"),
        row(0, "b", "4 "),
        row(0, "c", "5"),
        row(0, "d", "6"),  # three different ones of four
        row(1, "e", "yes"),
        row(1, "f", "yes", finish_reason="length"),  # one of two
        row(2, "g", "alone", valid=False, rewards=[("judge", None), ("rules", 1.0)]),  # as Arrow gives maps
    ]
    summary = summarize(7, rows)
    assert (summary.step, summary.samples) == (7, 7)
    assert summary.distinct_share == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert summary.alike == ("e", "f")
    assert summary.truncated == ("f",)
    assert (summary.failed, summary.failed_by) == (("g",), ("judge",))
    assert summary.looping_share == 0


def test_nothing() -> None:
    assert summarize(1, []).distinct_share is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        ("I am sorry, I cannot do that. " * 30, True),
        ("对不起。" * 60, True),
        ("ha" * 50, False),  # too short to judge
        ("\ud800 lone " * 100, True),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) is expected
