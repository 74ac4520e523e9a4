"""The demo's task: disjoint parts, the rule, and wrong answers that are wrong."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

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


def test_prompts_are_different_and_decided_by_the_seed(tmp_path: Path) -> None:
    records = arithmetic.make_prompts(9_000, seed=1)
    assert len({record["prompt"] for record in records}) == 9_000
    assert arithmetic.make_prompts(20, seed=1) != arithmetic.make_prompts(20, seed=2)
    arithmetic.write_prompts(tmp_path / "p.jsonl", 20, seed=1)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == arithmetic.make_prompts(20, seed=1)


def test_pairs_prefer_the_answer() -> None:
    for pair in arithmetic.make_pairs(200, seed=0, held_out=True):
        assert eval(pair["prompt"].removesuffix("=")) == int(pair["chosen"])
        assert not arithmetic.is_correct(pair["rejected"], pair["chosen"])


def test_the_examples_reward_function_is_the_rule() -> None:
    example = Path(__file__).parents[2] / "examples" / "arithmetic" / "rewards.py"
    correct = runpy.run_path(str(example))["correct"]
    for completion in ("85", " 85\n", "085", "85.", "", "8 5"):
        assert correct(prompt=[], completion=completion, answer="85") == arithmetic.is_correct(completion, "85")


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
