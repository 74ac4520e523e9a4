"""Sample summaries, by hand."""

from __future__ import annotations

import pytest

from cluster.doctor import SampleRow, summarize
from cluster.doctor.sample_summary import loops

PROSE = (
    "The committee met on Tuesday to discuss the budget for the coming year. After two hours the members agreed that "
    "the library needs a new roof, that the school bus must be replaced before winter, and that nobody knows where the "
    "money for either will come from. The treasurer offered to write a letter to the county."
)


def test_by_hand() -> None:
    rows = [
        SampleRow("a", 0, "4"),
        SampleRow("b", 0, "4 "),
        SampleRow("c", 0, "5"),
        SampleRow("d", 0, "6"),  # three different ones of four
        SampleRow("e", 1, "yes"),
        SampleRow("f", 1, "yes", finish_reason="length"),  # one of two
        SampleRow("g", 2, "alone", valid=False, rewards={"judge": None, "rules": 1.0}),
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
