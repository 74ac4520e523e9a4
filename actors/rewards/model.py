"""Rewards that a model gives: sequence classification with one label, many chats in one forward pass.

It knows torch and transformers, whose import takes seconds: only the replica's process does it. A chat's score does
not depend on what it was batched with: chats are padded to a multiple of `BUCKET` tokens and batched only with those of
the same padded length (on the CPU the same to the last bit, so that a resumed run sees the same rewards).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from actors.modeling.causal_lm import use_exact_attention
from actors.rewards.config import ModelReward
from actors.rewards.score import Answer
from trainers.adapter_folder import is_adapter, read_adapter, tokenizer_source
from trainers.errors import Problem, UserError
from trainers.types import Prompt

BUCKET = 32

Encoded: TypeAlias = "list[int] | Answer"  # a chat's tokens, or why it has no score


class RewardModel:
    """The model and its tokenizer; `score` is called from the thread that made it, whose torch threads it sets.

    Raises:
        UserError: no such model, not one label, no safetensors, weights missing in the checkpoint.
    """

    def __init__(self, config: ModelReward) -> None:
        self._config = config
        torch.set_num_threads(config.threads or (1 if config.gpus else max((os.cpu_count() or 2) // 2, 1)))
        self._device = torch.device("cuda" if config.gpus else "cpu")
        self._tokenizer, self._model = _load(config)
        self._model.to(self._device).eval()
        self._positions: int = getattr(
            self._model.config.get_text_config(), "max_position_embeddings", config.max_tokens
        )
        self._longest = min(config.max_tokens, self._positions)

    def encode(self, prompt: Prompt, completion: str) -> Encoded:
        """The complete chat by the model's own template; without one, prompt and completion as one text."""
        if self._tokenizer.chat_template:
            chat = [*prompt.messages, {"role": "assistant", "content": completion}]
            try:
                text = self._tokenizer.apply_chat_template(chat, tokenize=False)
            except Exception as error:  # noqa: BLE001 — the boundary to the model's template, a program; reported
                return self._refused(prompt, f"has a chat template that refuses this chat: {error}")
            tokens = self._tokenizer(text, add_special_tokens=False).input_ids
        elif len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user":
            tokens = self._tokenizer(prompt.messages[0]["content"] + completion).input_ids
        else:
            roles = ", ".join(message["role"] for message in prompt.messages)
            return self._refused(prompt, f"has no chat template, so it cannot judge a chat with the turns {roles}")
        if not tokens:
            return self._refused(prompt, "has no token for this chat")
        if len(tokens) > self._longest:
            return self._refused(prompt, f"judges at most {self._longest} tokens, and this chat has {len(tokens)}")
        return list(tokens)

    def score(self, chats: Sequence[Sequence[int]]) -> list[float]:
        """One score for each chat; micro-batches of one padded length within the token budget."""
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for index, chat in enumerate(chats):
            by_length[min(-(-len(chat) // BUCKET) * BUCKET, self._positions)].append(index)
        scores = [0.0] * len(chats)
        for length, indices in sorted(by_length.items()):
            size = max(self._config.max_batch_tokens // length, 1)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                for index, score in zip(batch, self._forward([chats[i] for i in batch], length), strict=True):
                    scores[index] = score
        return scores

    def _forward(self, chats: Sequence[Sequence[int]], length: int) -> list[float]:
        """Padded on the right. Decoders score the last token that is not `pad_token_id`: where the checkpoint names
        none, the last token of all, so padding gets an id that no chat here ends with."""
        text_config = self._model.config.get_text_config()
        pad = named = text_config.pad_token_id
        if named is None or named < 0:
            ends = {chat[-1] for chat in chats}
            pad = next(token for token in range(len(ends) + 1) if token not in ends)
        tokens = torch.full((len(chats), length), pad, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, chat in enumerate(chats):
            tokens[row, : len(chat)] = torch.tensor(chat)
            mask[row, : len(chat)] = 1
        text_config.pad_token_id = pad
        try:
            with torch.inference_mode():
                output = self._model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device))
        finally:
            text_config.pad_token_id = named
        logits: Tensor = output.logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _refused(self, prompt: Prompt, why: str) -> Answer:
        return Answer(None, f"{prompt.source}:{prompt.line}: the reward model {self._config.model} {why}")


def _load(config: ModelReward) -> tuple[Any, Any]:
    """Tokenizer and model; nothing of the checkpoint is run as code, and no weight is made up.

    An adapter is merged into its base, whose head it brings along.
    """
    where, name, dtype = "rewards", config.model, getattr(torch, config.dtype)
    adapter = read_adapter(name, where=where) if is_adapter(name) else None
    base, options = name, {}
    if adapter is not None:
        base, options = adapter.base, {"num_labels": adapter.labels}
    try:
        read = AutoConfig.from_pretrained(base, trust_remote_code=False, **options)
        if read.num_labels != 1:
            message = f"{name}: has {read.num_labels} labels; a reward model has exactly one"
            raise UserError([Problem(where, message)])
        use_exact_attention(read)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(name), trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base,
            config=read,
            dtype=dtype if adapter is None else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError([Problem(where, f"{name}: cannot be loaded as a reward model: {error}")]) from error
    missing = set(info["missing_keys"])
    if adapter is not None:
        from actors.modeling.merge import merged  # importing PEFT takes a second, and most rewards are complete models

        missing -= {tensor.removeprefix("base_model.model.") for tensor in adapter.tensors}
        model = merged(model, adapter, where=where).to(dtype)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        listed = ", ".join(sorted(missing)[:3]) + more
        raise UserError([Problem(where, f"{name}: the checkpoint lacks {listed}; it is not a trained reward model")])
    return tokenizer, model
