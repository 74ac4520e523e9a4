"""The demo, from the command to its result: it learns from the learned reward and shows what it learned.

That nothing is learned without a learning rate is in `test_train.py`; that its model gives the same answers in
transformers and in vLLM is in `test_cells.py`, of which this run is the cell grpo-full.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.demo_run import DemoRun

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/correct" in line]


def test_it_learns_from_the_learned_reward(demo_run: DemoRun) -> None:
    before, *_, after = evaluations(demo_run.path)
    assert before["eval/correct"] < 0.5
    assert after["eval/correct"] > 0.8
    assert after["eval/reward_mean"] > before["eval/reward_mean"] + 1


def test_it_shows_what_was_learned_and_where_the_model_is(demo_run: DemoRun) -> None:
    before, *_, after = evaluations(demo_run.path)
    for shown in (f"{before['eval/correct']:.3f}", f"{after['eval/correct']:.3f}", "completions before", "peak MiB"):
        assert shown in demo_run.printed
    assert str(demo_run.path / "model") in demo_run.printed.replace("\n", "")
