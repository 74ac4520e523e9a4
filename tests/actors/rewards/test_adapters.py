"""Reward models that are adapters: their scores are plain PEFT's, and what cannot judge is named before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.rewards.checks import validate_rewards
from actors.rewards.config import ModelReward
from actors.rewards.model import RewardModel
from tests.support import tiny
from tests.support.tiny_adapters import change, make_adapter
from tests.support.tiny_reward_models import make_reward_model
from trainers.errors import UserError
from trainers.types import Prompt

TEXTS = ["4", "forty two", "x" * 40]
PROMPT = Prompt(messages=({"role": "user", "content": "2+2?"},), source="p.jsonl", line=7)


def judge(base: Path, path: Path) -> Path:
    config = peft.LoraConfig(r=3, lora_dropout=0.3, target_modules="all-linear", task_type="SEQ_CLS")
    return make_adapter(base, path, config=config)


@pytest.fixture(params=["policy", "reward model"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A causal language model, as preference models are made of, or a reward model, which is trained further."""
    path = tmp_path / "base"
    return make_reward_model(path) if request.param == "reward model" else tiny.make_policy(path, tied=True)


def config_of(path: Path, **fields: Any) -> ModelReward:
    return ModelReward(type="model", model=str(path), threads=1, **({"dtype": "float32"} | fields))


def problem_of(path: Path) -> str:
    (problem,) = validate_rewards([config_of(path)], Path.cwd())
    assert problem.where == "rewards.0.model"
    return problem.message


@pytest.mark.filterwarnings("ignore:The PEFT config.s")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_plain_pefts(base: Path, dtype: str, tmp_path: Path) -> None:
    adapter = judge(base, tmp_path / "judge")
    assert validate_rewards([config_of(adapter)], Path.cwd()) == []
    model = RewardModel(config_of(adapter, dtype=dtype))
    chats = [model.encode(PROMPT, text) for text in TEXTS]
    found = model.score([chat for chat in chats if isinstance(chat, list)])
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(plain, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = []
    for text in TEXTS:
        chat = [*PROMPT.messages, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).input_ids
        with torch.no_grad():
            expected.append(plain(input_ids=ids).logits.item())
    assert found == pytest.approx(expected, **({"abs": 1e-5} if dtype == "float32" else {"rel": 0.1, "abs": 0.1}))
    assert max(expected) - min(expected) > 0.2


def test_adapters_that_do_not_judge(tmp_path: Path) -> None:
    base = tiny.make_policy(tmp_path / "base", tied=True)
    assert "is an adapter for CAUSAL_LM; a reward model's is for SEQ_CLS" in problem_of(
        make_adapter(base, tmp_path / "sft")
    )
    adapter = judge(base, tmp_path / "judge")
    weights = load_file(adapter / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    save_file(weights | {"base_model.model.score.weight": head.repeat(2, 1)}, adapter / "adapter_model.safetensors")
    assert "a classifier with 2 labels" in problem_of(adapter)
    save_file(weights, adapter / "adapter_model.safetensors")
    assert "holds its head's weights" in problem_of(adapter)
    with pytest.raises(UserError, match="has 0 labels"):
        RewardModel(config_of(adapter))
    change(adapter, base_model_name_or_path="/nowhere/base")
    assert "is not here: /nowhere/base" in problem_of(adapter)
    (tmp_path / "empty").mkdir()
    change(judge(base, tmp_path / "other"), base_model_name_or_path=str(tmp_path / "empty"))
    assert "has no config.json" in problem_of(tmp_path / "other")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "has no *.safetensors" in problem_of(tmp_path / "other")
