"""How far the policy is from the teacher, token by token: a teacher in the learners, or what its engine gave.

It knows torch, no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.modeling.causal_lm import aligned, forward
from trainers.algorithms.config import Distillation
from trainers.jsd import generalized_jsd, likeliest, topk_jsd
from trainers.types import TopLogprobs


class Teacher:
    """A frozen model and the divergence from it (arXiv 2306.13649, eq. 1; with `top_k` over its likeliest tokens)."""

    def __init__(self, model: Callable[..., Any], config: Distillation) -> None:
        self._model = model
        self._config = config

    def divergence(self, logits: Tensor, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Of the policy's `logits` `[B, T, V]`: float32 `[B, T]`, at the token that both were to choose; 0 where not
        `mask`. Embeddings padded to different sizes are compared over the smaller one, which holds every token."""
        with torch.no_grad():
            taught = forward(self._model, tokens, lengths)
        chosen = mask[:, 1:]
        size = min(logits.shape[-1], taught.shape[-1])
        student, teacher = logits[:, :-1][chosen][:, :size], taught[:, :-1][chosen][:, :size]
        return aligned(_scattered(self._compare(student, teacher), chosen))

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[n]` of two `[n, V]`."""
        config = self._config
        if config.top_k is None:
            return generalized_jsd(student, teacher, beta=config.beta, temperature=config.temperature)
        best, ids = likeliest(teacher, config.top_k, temperature=config.temperature)
        return topk_jsd(student, best, ids, beta=config.beta, temperature=config.temperature)


def served_divergence(logits: Tensor, top: TopLogprobs, mask: Tensor, *, beta: float) -> Tensor:
    """The same from what an engine of the teacher said of the n tokens of `mask`, at temperature 1."""
    chosen = mask[:, 1:]
    student = logits[:, :-1][chosen]
    best, ids = (torch.from_numpy(array.copy()).to(logits.device) for array in (top.logprobs, top.ids))
    return aligned(_scattered(topk_jsd(student, best, ids, beta=beta), chosen))


def _scattered(values: Tensor, places: Tensor) -> Tensor:
    """`values` `[n]` at the n True `places`, 0 elsewhere."""
    return values.new_zeros(places.shape).masked_scatter(places, values)
