"""What vLLM cannot do with a model that transformers trains: refused before a run starts, by what `config.json` says.

The families were tried one by one; `docs/models.md` has the table.
"""

from __future__ import annotations

from actors.config import PolicyConfig
from cluster.models.inspect import ModelInfo
from trainers.errors import Problem

# Model types whose loader in vLLM copies past its layer-wise reload: new weights would never reach the model.
_NOT_RELOADED = ("gpt_oss",)


def engine_problems(model: ModelInfo, policy: PolicyConfig, *, gpus: bool | None) -> list[Problem]:
    """Why vLLM cannot serve the model as it is trained; `gpus` None: not known where the generators will run."""
    where = "policy.train_type"
    kind = model.config.get("model_type")
    if policy.train_type == "full":
        if kind not in _NOT_RELOADED:
            return []
        message = f"vLLM cannot take new weights of a whole model of type {kind}; set lora"
        return [Problem(where, message)]
    if not model.experts or gpus is not False:
        return []
    message = (
        f"{model.name} is a mixture of experts ({kind}), and vLLM cannot serve an adapter on one without GPUs; set full"
    )
    return [Problem(where, message)]
