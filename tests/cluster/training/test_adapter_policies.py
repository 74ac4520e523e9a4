"""Whole runs of a policy that is a PEFT adapter: trained on as it is, or merged into its base first."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.support.recorded import adapter_bytes, recorded_gap
from tests.support.warm_rlhf import WarmRlhf
from trainers.tiny_models import make_random_policy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 3
Run = Callable[..., Path]
GRPO: dict[str, Any] = {"type": "grpo", "kl": {"coef": 0.02}}

REWARDS = """
def ascii(*, prompt, completion, **columns):
    return sum(c.isascii() for c in completion) / max(1, len(completion))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells")
    make_random_policy(path / "policy")
    (path / "rewards.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) for i in range(10, 22)]
    (path / "sft.jsonl").write_text("\n".join(lines) + "\n")
    return path


def run_in(folder: Path, warm_rlhf: WarmRlhf, name: str, **changes: Any) -> Path:
    tree = {
        "name": name,
        "root": str(folder / "runs"),
        "policy": {"model": "policy", "dtype": "float32"},
        "data": {
            "prompts": "sft.jsonl",
            "eval_prompts": "sft.jsonl",
            "max_prompt_tokens": 64,
            "strip_responses": True,
        },
        "rewards": [{"type": "function", "path": "rewards.py:ascii"}],
        "sampling": {"n": 4, "max_tokens": 8},
        "train": {"steps": STEPS, "prompts_per_step": 4, "learning_rate": 0.01},
        "learners": {"zero_stage": 3},
        "checkpoint": {"every": 2},
        "eval": {"every": 0, "n": 2},
    } | changes
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    finished = warm_rlhf("train", str(config))
    assert finished.code == 0, finished.output
    (found,) = (folder / "runs").glob(f"*-{name}-*")
    return found


@pytest.fixture(scope="module")
def run(folder: Path, warm_rlhf: WarmRlhf) -> Run:
    """Train in the folder, with changes to a small config; the run's directory."""
    return partial(run_in, folder, warm_rlhf)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def assert_proved(lines: list[dict[str, float]]) -> None:
    assert len(lines) == STEPS
    for line in lines:
        assert line["weights/canary_gap"] < 1e-4
        assert line.get("rollout/logprob_gap_max", 0.0) < 1e-4


def rollouts(run: Path, name: str = f"eval-{STEPS:06d}") -> Path:
    """A file of what the generator wrote; with the last weights, unless it is named."""
    return run / "rollouts" / f"{name}.parquet"


@pytest.fixture(scope="module")
def sft(folder: Path) -> Path:
    """An adapter trained on the policy elsewhere; configs name it relative to their own folder."""
    base = AutoModelForCausalLM.from_pretrained(folder / "policy")
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder / "sft")
    return folder / "sft"


def on(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_an_adapter_is_trained_on(folder: Path, sft: Path, run: Run) -> None:
    """It writes from the first step on, is its own reference, and comes out as an adapter on the same base."""
    policy = {"model": "sft", "adapter": "continue", "dtype": "float32", "train_type": "lora"}
    written = run("continued", policy=policy, algorithm=GRPO)
    lines = metrics(written)
    assert_proved(lines)
    assert {line["weights/sync_bytes"] for line in lines} == {adapter_bytes(sft)}
    assert recorded_gap(on(folder / "policy", sft), rollouts(written, "step-000001")) < 1e-4
    assert lines[0]["kl/mean"] == pytest.approx(0.0, abs=1e-6)
    assert abs(lines[-1]["kl/mean"]) > 1e-5  # an estimate on samples may be below 0
    assert recorded_gap(on(folder / "policy", written / "model"), rollouts(written)) < 1e-4
    assert json.loads((written / "model" / "adapter_config.json").read_text())["r"] == 3


def test_an_adapter_is_merged_once_and_a_resumed_run_finds_it(folder: Path, sft: Path, run: Run) -> None:
    policy = {"model": "sft", "dtype": "float32", "train_type": "lora"}
    train = {"steps": 1, "prompts_per_step": 4, "learning_rate": 0.01}
    begun = run("merged", policy=policy, algorithm=GRPO, train=train)
    files = {file.name: file.stat().st_mtime_ns for file in (begun / "merged").iterdir()}
    assert run("merged", policy=policy, algorithm=GRPO, train={**train, "steps": STEPS}) == begun
    assert {file.name: file.stat().st_mtime_ns for file in (begun / "merged").iterdir()} == files
    lines = metrics(begun)
    assert_proved(lines)
    assert recorded_gap(on(folder / "policy", sft), rollouts(begun, "step-000001")) < 1e-4
    assert lines[0]["kl/mean"] == pytest.approx(0.0, abs=1e-6)
    assert recorded_gap(on(begun / "merged", begun / "model"), rollouts(begun)) < 1e-4
    base = json.loads((begun / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(begun / "merged")
