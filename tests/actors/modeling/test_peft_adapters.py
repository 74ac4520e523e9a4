"""Fresh adapters: how little of the model they are, which is what a weight sync moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import LoraConfig, PolicyConfig
from actors.modeling.peft_adapters import attach_adapter, trained_parameters
from trainers import tiny_models

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def counted(hidden: int, targets: Any) -> tuple[int, int]:
    """Numbers of the full model (a tied matrix once) and of an adapter of rank 8."""
    config = tiny_models._config(tiny_models.make_tokenizer(), layers=tiny_models.LAYERS, hidden=hidden)
    model = tiny_models.Qwen3ForCausalLM(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    policy = PolicyConfig(model="m", train_type="lora", lora=LoraConfig(r=8, target_modules=targets))
    adapted = attach_adapter(model, policy, total_steps=1)
    return whole, sum(parameter.numel() for _, parameter in trained_parameters(adapted))


@pytest.mark.parametrize(
    ("hidden", "targets", "least"),
    [(tiny_models.HIDDEN, "all-linear", 13), (tiny_models.HIDDEN, ATTENTION, 20), (512, "all-linear", 20)],
)
def test_an_adapter_of_rank_8_is_little_of_the_model(hidden: int, targets: Any, least: int) -> None:
    """Rank times inputs plus outputs of each layer; at least 20 times less than the model's on the example's
    attention, or on every layer of a wider model (the ratio grows with the width)."""
    heads = hidden // 64 * 2
    wide, narrow = heads * 32, heads // 2 * 32
    inner = tiny_models.INTERMEDIATE * hidden // tiny_models.HIDDEN
    sizes = dict(zip(ATTENTION, [hidden + wide, hidden + narrow, hidden + narrow, wide + hidden], strict=True))
    sizes |= dict.fromkeys(MLP, hidden + inner)
    chosen = sizes if targets == "all-linear" else {name: sizes[name] for name in targets}
    whole, adapter = counted(hidden, targets)
    assert adapter == 8 * tiny_models.LAYERS * sum(chosen.values())
    assert whole / adapter > least


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_type", ["lora", "adalora"])
def test_everything_else_is_frozen(train_type: Any, dtype: Any, tmp_path: Path) -> None:
    tiny_models.make_random_policy(tmp_path)
    model = tiny_models.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    policy = PolicyConfig(model=str(tmp_path), dtype=dtype, train_type=train_type)
    adapted = attach_adapter(model, policy, total_steps=10)
    trained = dict(trained_parameters(adapted))
    assert all("lora_" in name and parameter.dtype == getattr(torch, dtype) for name, parameter in trained.items())
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if name not in trained)
