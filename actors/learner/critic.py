"""PPO's critic: a model with a value head on every token. It knows transformers, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from actors.config import LoraConfig
from actors.modeling.causal_lm import aligned, inside, training_config
from trainers.adapter_folder import AdapterFolder
from trainers.algorithms.config import CriticConfig

_HEADS = ("score", "classifier")  # what transformers calls the layer of one output


def load_critic(
    path: str, config: CriticConfig, lora: LoraConfig, *, dtype: str, adapter: AdapterFolder | None = None
) -> nn.Module:
    """A copy of a policy (with its `adapter` merged, where it has one) or of a reward model with one number for each
    token, as it is trained: whole, or its head and an adapter; `UserError` where no layer has a name that it wants.

    A reward model keeps its head; a policy gets one that says 0 everywhere, which is what an untaught critic should.
    """
    if config.train_type == "full":
        return _load(path, adapter, dtype=dtype)
    from actors.modeling.peft_adapters import (
        attach_beside,  # importing PEFT and bitsandbytes is for those who need them
    )

    options: dict[str, Any] = {}
    if config.train_type == "qlora":
        assert adapter is None, "the plan refuses a quantized copy of a policy that continues its adapter"
        from actors.modeling.quantized import quantization

        options["quantization_config"] = quantization(getattr(torch, dtype), whole=_HEADS)
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
    critic = _load(path, adapter, dtype=dtype, **options)
    if config.train_type == "qlora":
        from actors.modeling.quantized import hide_quantized

        hide_quantized(critic)
    attach_beside(critic, value_head(critic), lora, dtype=dtype)
    return critic


def _load(path: str, adapter: AdapterFolder | None, *, dtype: str, **options: Any) -> nn.Module:
    config = training_config(path)
    judges = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    config.num_labels = 1
    config.classifier_dropout = 0.0
    model: Any = AutoModelForTokenClassification.from_pretrained(
        path,
        config=config,
        dtype=getattr(torch, dtype) if adapter is None else torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    if adapter is not None:
        from actors.modeling.merge import merged  # importing PEFT takes a second

        model = merged(model, adapter, where="policy.model")
        model = model.requires_grad_(True).to(getattr(torch, dtype))
    head = value_head(model)
    with torch.no_grad():
        if head.bias is not None:
            head.bias.zero_()
        if not judges:
            head.weight.zero_()
    critic: nn.Module = model.train()
    return critic


def value_head(model: nn.Module) -> nn.Linear:
    """The layer of one output; the last one of the model."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    return heads[-1]


def forward_values(model: Callable[..., Any], tokens: Tensor, lengths: Tensor) -> Tensor:
    """V of the state in which each token was chosen: float32 `[B, T]`, aligned with `tokens`; 0 for the first token
    and the padding. `tokens` `[B, T]` right-padded, `lengths` `[B]`."""
    real = inside(tokens, lengths)
    values = model(input_ids=tokens, attention_mask=real.long()).logits[..., 0].float()
    return aligned(torch.where(real[:, 1:], values[:, :-1], 0.0))
