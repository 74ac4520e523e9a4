"""The demo, whole: it learns from the learned reward; its model loads where people load models.

That nothing is learned without a learning rate is in `test_train.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.demo import MODELS
from tests.support.greedy_answers import greedy_answers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

RLHF = str(Path(sys.executable).with_name("rlhf"))


def rlhf(*arguments: str) -> str:
    done = subprocess.run([RLHF, *arguments], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def only_run(root: Path) -> Path:
    (found,) = root.iterdir()
    return found


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/correct" in line]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run, and what the command printed."""
    root = tmp_path_factory.mktemp("demo") / "runs"
    printed = rlhf("demo", "--root", str(root))
    return only_run(root), printed


def test_it_learns_from_the_learned_reward(demo: tuple[Path, str]) -> None:
    run, _ = demo
    before, *_, after = evaluations(run)
    assert before["eval/correct"] < 0.5
    assert after["eval/correct"] > 0.8
    assert after["eval/reward_mean"] > before["eval/reward_mean"] + 1


def test_it_says_what_was_learned_and_where_it_lies(demo: tuple[Path, str]) -> None:
    run, printed = demo
    before, *_, after = evaluations(run)
    for said in (f"{before['eval/correct']:.3f}", f"{after['eval/correct']:.3f}", "completions before", "peak MiB"):
        assert said in printed
    assert str(run / "model") in printed.replace("\n", "")


def test_the_model_answers_alike_in_transformers_and_in_vllm(demo: tuple[Path, str]) -> None:
    prompts = [json.loads(line)["prompt"] for line in (MODELS / "held_out.jsonl").read_text().splitlines()[:24]]
    model = str(demo[0] / "model")
    plain, served = greedy_answers(prompts, [{"model": model}])[model]
    assert served == plain
    right = sum(answer == str(eval(prompt.rstrip("="))) for prompt, answer in zip(prompts, served, strict=True))
    assert right > 0.9 * len(prompts)
