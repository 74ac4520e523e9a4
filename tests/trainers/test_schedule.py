"""Learning-rate schedules by hand."""

from __future__ import annotations

import math

import pytest

from trainers.schedule import learning_rate_factor


def factors(schedule: str, *, warmup: int, total: int, steps: int) -> list[float]:
    return [
        learning_rate_factor(s, schedule=schedule, warmup_steps=warmup, total_steps=total)  # type: ignore[arg-type]
        for s in range(steps)
    ]


def test_constant() -> None:
    assert factors("constant", warmup=0, total=3, steps=5) == [1, 1, 1, 1, 1]
    assert factors("constant", warmup=4, total=8, steps=6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear() -> None:
    assert factors("linear", warmup=0, total=4, steps=6) == [1, 0.75, 0.5, 0.25, 0, 0]
    assert factors("linear", warmup=2, total=6, steps=7) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]


def test_cosine() -> None:
    root = math.sqrt(0.5) / 2
    expected = [1, 0.5 + root, 0.5, 0.5 - root, 0]
    assert factors("cosine", warmup=0, total=4, steps=5) == pytest.approx(expected)
    assert factors("cosine", warmup=1, total=5, steps=7) == pytest.approx([1, *expected, 0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_is_all_warm_up(schedule: str) -> None:
    assert factors(schedule, warmup=4, total=4, steps=4) == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_it_rises_then_falls_and_stays_within_bounds(schedule: str, warmup: int) -> None:
    values = factors(schedule, warmup=warmup, total=20, steps=25)
    peak = values.index(max(values))
    assert max(values) == 1
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert min(values) >= 0
    if schedule != "constant":
        assert values[20:] == pytest.approx([0] * 5)
