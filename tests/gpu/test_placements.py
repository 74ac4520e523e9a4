"""Whole runs on NVIDIA GPUs: generators and learners in turn on one (ipc), or each on their own (nccl).

To run them elsewhere carry the repository alone, then: `make setup ACCELERATOR=gpu` and `.venv/bin/pytest tests/gpu`
(`tests/gpu/run.sh` does both). The models are made here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainers.tiny_models import make_random_policy

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

RLHF = str(Path(sys.executable).with_name("rlhf"))
REWARDS = """
def ascii(*, prompt, completion, **columns):
    return sum(c.isascii() for c in completion) / max(1, len(completion))
"""


def train(folder: Path, **changes: Any) -> list[dict[str, float]]:
    make_random_policy(folder / "policy")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(16)))
    tree = {
        "root": str(folder / "runs"),
        "policy": {"model": "policy", "dtype": "bfloat16"},
        "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 64},
        "rewards": [{"type": "function", "path": "rewards.py:ascii"}],
        "algorithm": {"type": "grpo"},
        "sampling": {"n": 4, "max_tokens": 16},
        "train": {"steps": 3, "prompts_per_step": 8, "learning_rate": 1e-3},
        "generators": {"gpu_memory_utilization": 0.3},
    } | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run([RLHF, "train", "run.yaml"], capture_output=True, text=True, timeout=800, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs").iterdir()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_agreeing(lines: list[dict[str, float]]) -> None:
    steps = [line for line in lines if line["step"] > 0]
    assert len(steps) == 3
    assert max(line["rollout/logprob_gap_mean"] for line in steps) < 0.05
    assert max(line["weights/canary_gap"] for line in steps) < 0.5


def test_colocated_on_one_gpu(tmp_path: Path) -> None:
    assert_agreeing(train(tmp_path, placement="colocated"))


@pytest.mark.parametrize("train_type", ["lora", "qlora", "adalora"])
def test_adapters_colocated_on_one_gpu(train_type: str, tmp_path: Path) -> None:
    policy = {"model": "policy", "dtype": "bfloat16", "train_type": train_type}
    assert_agreeing(train(tmp_path, placement="colocated", policy=policy))


def test_split_over_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_agreeing(train(tmp_path, placement="split"))
