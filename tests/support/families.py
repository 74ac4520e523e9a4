"""A tiny random model of each family of architectures, for the tests of loading, syncing and serving them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.tiny_models import make_tokenizer

_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_HEAD = {"head_dim": 32}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
_LATENT = {  # DeepSeek's attention, in the one size that vLLM has a CPU kernel for
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

# Name → transformers' model type and what its config has beside `_SIZES`. Widths are such that kernels of CPUs take
# them; the experts of `qwen3_moe` are no multiple of 32, to which vLLM pads.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", _HEAD),
    "qwen2_moe": (
        "qwen2_moe",
        _EXPERTS | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "moe_intermediate_size": 64},
    ),
    "qwen3_moe": ("qwen3_moe", _HEAD | _EXPERTS | {"decoder_sparse_step": 1}),
    "olmoe": ("olmoe", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt_oss": (
        "gpt_oss",
        _HEAD
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("gemma2", _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": ("gemma3_text", _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "phi3": ("phi3", {}),
    "glm4": ("glm4", _HEAD),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "stablelm": ("stablelm", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", _GPT | {"rotary_dim": 16}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("falcon", {"num_kv_heads": 1, "new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
}


def make_family(name: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model of 2 layers with its tokenizer, saved as its family's checkpoints are; every weight is random, and large
    enough to be felt. `changes` are further keys of its config."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model_type, more = FAMILIES[name]
    config = AutoConfig.for_model(
        model_type,
        **(_SIZES | dict(more) | changes),
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.15)
            elif "norm" in parameter or "ln_" in parameter:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            else:
                weight.normal_(0.0, 0.1)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
