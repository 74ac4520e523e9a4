"""Learning-rate schedules by hand, and the draw of who writes."""

from __future__ import annotations

import math

import pytest

from trainers.schedule import learning_rate_factor, policy_writes


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


@pytest.mark.parametrize("lmbda", [0.1, 0.5, 0.9])
def test_the_policy_writes_as_often_as_lmbda_says(lmbda: float) -> None:
    n = 20_000
    share = sum(policy_writes(11, step, lmbda) for step in range(n)) / n
    assert abs(share - lmbda) < 4 * math.sqrt(lmbda * (1 - lmbda) / n)


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    first = [policy_writes(1, step, 0.5) for step in range(64)]
    assert first == [policy_writes(1, step, 0.5) for step in range(64)]
    assert first != [policy_writes(2, step, 0.5) for step in range(64)]
    assert all(policy_writes(1, step, 0.8) for step in range(64) if first[step])  # more of lmbda only adds
    assert all(policy_writes(1, step, 1.0) and not policy_writes(1, step, 0.0) for step in range(64))


@pytest.mark.parametrize("lmbda", [-0.1, 1.1, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(lmbda: float) -> None:
    with pytest.raises(ValueError, match="lmbda"):
        policy_writes(0, 0, lmbda)
