"""The demo's task: disjoint parts, the rule, and wrong answers that are wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from trainers import arithmetic


def test_training_and_held_out_sums_are_disjoint_in_both_orders() -> None:
    train, held_out = (set(arithmetic.sums(held_out=h)) for h in (False, True))
    assert len(train) + len(held_out) == 100 * 100
    assert not train & held_out
    assert all((b, a) in held_out for a, b in held_out)


def test_prompts_state_their_answers() -> None:
    for record in arithmetic.make_prompts(50, seed=3, held_out=True):
        a, b = map(int, record["prompt"].removesuffix("=").split("+"))
        assert record["answer"] == str(a + b)
        assert arithmetic.is_held_out(a, b)


def test_more_prompts_than_there_are_sums() -> None:
    with pytest.raises(ValueError, match="held-out part has"):
        arithmetic.make_prompts(9_000, seed=0, held_out=True)


@pytest.mark.parametrize(
    ("completion", "right"),
    [("85", True), (" 85\n", True), ("085", False), ("85.", False), ("", False), ("8 5", False)],
)
def test_the_rule(completion: str, right: bool) -> None:
    assert arithmetic.is_correct(completion, "85") is right


@pytest.mark.parametrize("spoil", [arithmetic.wrong_answer, arithmetic.near_miss])
def test_wrong_answers_are_wrong(spoil: Callable[[str, random.Random], str]) -> None:
    rng = random.Random(0)
    for answer in ("0", "7", "85", "198"):
        assert not any(arithmetic.is_correct(spoil(answer, rng), answer) for _ in range(500))
