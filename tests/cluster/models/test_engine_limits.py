"""What vLLM cannot do with a model that transformers trains is refused, with what to set instead."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import PolicyConfig
from cluster.models.engine_limits import engine_problems
from cluster.models.inspect import ModelInfo

DENSE = {"model_type": "qwen3"}
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 4}
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "train_type", "gpus", "message"),
    [
        (DENSE, "lora", False, None),
        (MIXTURE, "full", False, None),
        (MIXTURE, "lora", True, None),
        (MIXTURE, "lora", None, None),  # where the generators will run is not known yet
        (MIXTURE, "lora", False, "m is a mixture of experts (qwen3_moe), and vLLM cannot serve an adapter on one"),
        (MIXTURE, "qlora", False, "set full"),
        (MIXTURE, "adalora", False, "set full"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "lora", False, "(mixtral)"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "lora", False, "(deepseek_v3)"),
        (GPT_OSS, "full", True, "vLLM cannot take new weights of a whole model of type gpt_oss; set lora"),
        (GPT_OSS, "lora", True, None),
    ],
)
def test_what_is_refused(config: dict[str, Any], train_type: Any, gpus: bool | None, message: str | None) -> None:
    model = ModelInfo(name="m", config=config, parameters=None)
    found = engine_problems(model, PolicyConfig(model="m", train_type=train_type), gpus=gpus)
    assert [problem.where for problem in found] == ([] if message is None else ["policy.train_type"])
    assert message is None or message in found[0].message
