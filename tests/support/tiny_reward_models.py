"""Reward models with random weights and a token for every character, for the tests only."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "</s>", "<unk>", *string.printable]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_reward_model(path: Path, *, chat_template: str | None = CHAT_TEMPLATE, **config: Any) -> Path:
    """A Qwen3 classifier with one label in `path`, float32; `config` overrides its config."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(chat_template)
    fields = {
        "vocab_size": len(tokenizer),
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 256,
    } | config
    model = Qwen3ForSequenceClassification(
        Qwen3Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            **fields,
        )
    )
    torch.nn.init.normal_(model.score.weight)  # scores of about 1, so that differences show
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
