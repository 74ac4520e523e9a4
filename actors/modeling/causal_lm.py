"""Loading the policy and its tokenizer, and what a forward pass of it means. It knows transformers, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from actors.config import PolicyConfig
from trainers.adapter_folder import AdapterFolder
from trainers.logprobs import token_logprobs


def load_model(policy: PolicyConfig, *, quantized: bool = False) -> nn.Module:
    """The causal language model in the policy's type, dropout off (rollouts have none, so training must not)."""
    config = training_config(policy.model)
    options: dict[str, Any] = {}
    if quantized:
        from actors.modeling.quantized import quantization  # importing bitsandbytes is for those who need it

        options["quantization_config"] = quantization(getattr(torch, policy.dtype))
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        policy.model,
        config=config,
        dtype=getattr(torch, policy.dtype),
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    return model.train()


def load_policy(
    policy: PolicyConfig,
    *,
    total_steps: int,
    gradient_checkpointing: bool = False,
    adapter: AdapterFolder | None = None,
) -> nn.Module:
    """The model as it is trained: whole, or frozen below an adapter: a fresh one, or `adapter`."""
    model: Any = load_model(policy, quantized=policy.train_type == "qlora")
    if gradient_checkpointing:
        recompute_activations(model)
    if policy.train_type == "full":
        return model  # type: ignore[no-any-return]
    if policy.train_type == "qlora":
        from actors.modeling.quantized import hide_quantized

        hide_quantized(model)
    from actors.modeling.peft_adapters import attach_adapter, continue_adapter

    if adapter is not None:
        return continue_adapter(model, policy, adapter)
    return attach_adapter(model, policy, total_steps=total_steps)


def recompute_activations(model: Any) -> None:
    """In the backward pass, layer by layer, rather than keeping them."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def training_config(path: str) -> Any:
    """The model's config: no dropout, no cache, attention as the generators compute it. Before the model is made:
    modules keep the number, or ask it."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.use_cache = False
    use_exact_attention(config)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def use_exact_attention(config: Any) -> None:
    """Plain attention where the scores are capped (Gemma 2): transformers' default, PyTorch's fused attention, does
    not know the cap and leaves it out without a word."""
    if config.to_dict().get("attn_logit_softcapping") is not None:
        config._attn_implementation = "eager"


def load_tokenizer(policy: PolicyConfig, adapter: AdapterFolder | None = None) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with the configured chat template; where the adapter's folder has one, that."""
    source = policy.model if adapter is None else adapter.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if policy.chat_template is not None:
        tokenizer.chat_template = policy.chat_template
    return tokenizer


def forward(model: Callable[..., Any], tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits `[B, T, V]` of right-padded `tokens` `[B, T]` of these `lengths` `[B]`."""
    logits: Tensor = model(input_ids=tokens, attention_mask=inside(tokens, lengths).long()).logits
    return logits


def inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    """`[B, T]`, False where padded."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]


def chosen_logprobs(logits: Tensor, tokens: Tensor, lengths: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it, and the entropy of its distribution.

    Two float32 `[B, T]`, aligned with `tokens`; position 0 and the padding hold 0. Only the log-probabilities carry a
    gradient.
    """
    logprobs, entropy = token_logprobs(logits[:, :-1], tokens[:, 1:], temperature=temperature, entropy=True)
    real = inside(tokens, lengths)[:, 1:]
    return aligned(torch.where(real, logprobs, 0.0)), aligned(torch.where(real, entropy.detach(), 0.0))


def aligned(following: Tensor) -> Tensor:
    """`[B, T]` of `[B, T − 1]`: what was computed for the next token, at that token; 0 at the first."""
    return torch.cat([following.new_zeros(len(following), 1), following], dim=1)
