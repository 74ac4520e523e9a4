"""Loading the policy and its tokenizer, and what a forward pass of it means. It knows transformers, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from actors.config import PolicyConfig
from trainers.logprobs import token_logprobs


def load_model(policy: PolicyConfig, *, gradient_checkpointing: bool = False) -> nn.Module:
    """The causal language model in the policy's type, dropout off (rollouts have none, so training must not)."""
    config = AutoConfig.from_pretrained(policy.model, trust_remote_code=False)
    config.use_cache = False
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # before the model is made: its modules keep the number, or ask the config
    model: Any = AutoModelForCausalLM.from_pretrained(
        policy.model,
        config=config,
        dtype=getattr(torch, policy.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained: nn.Module = model.train()
    return trained


def load_tokenizer(policy: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with the configured chat template."""
    tokenizer = AutoTokenizer.from_pretrained(policy.model, trust_remote_code=False)
    if policy.chat_template is not None:
        tokenizer.chat_template = policy.chat_template
    return tokenizer


def forward_logprobs(
    model: Callable[..., Any], tokens: Tensor, lengths: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it, and the entropy of its distribution.

    `tokens` `[B, T]` right-padded, `lengths` `[B]`; returns two float32 `[B, T]`, aligned with `tokens`; position 0
    and the padding hold 0. Only the log-probabilities carry a gradient.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    attention = positions[None, :] < lengths[:, None]
    logits = model(input_ids=tokens, attention_mask=attention.long()).logits
    logprobs, entropy = token_logprobs(logits[:, :-1], tokens[:, 1:], temperature=temperature, entropy=True)
    inside = attention[:, 1:]
    first = logprobs.new_zeros(tokens.shape[0], 1)
    aligned = torch.cat([first, torch.where(inside, logprobs, 0.0)], dim=1)
    return aligned, torch.cat([first, torch.where(inside, entropy.detach(), 0.0)], dim=1)
