"""The models of one learner rank (policy, reference, critic, teacher), and what they say of a micro-batch.

Which of them there are, the algorithm's needs decide. It knows DeepSpeed only through `deepspeed_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.learner.critic import forward_values, load_critic
from actors.learner.deepspeed_engine import FrozenEngine, TrainingEngine, shard_while_loading
from actors.learner.distillation import Teacher, served_divergence
from actors.learner.trained_policy import make_trainee
from actors.messages import LearnerSpec
from actors.modeling.causal_lm import chosen_logprobs, forward, load_model, load_policy, recompute_activations
from trainers.algorithms.base import Need, PolicyTokens, ValueTokens
from trainers.packing import MicroBatch
from trainers.types import Float32Array


class LearnerModels:
    """Loaded when made; every rank makes its own at once."""

    def __init__(self, spec: LearnerSpec, needs: frozenset[Need]) -> None:
        self._temperature = spec.temperature
        self._reference: FrozenEngine | None = None
        self._teacher: Teacher | None = None
        self._frozen: list[FrozenEngine] = []
        self.critic: TrainingEngine | None = None
        sharding = None
        if spec.policy.train_type == "full":
            sharding = shard_while_loading(spec.learners, dtype=spec.policy.dtype)
        self.policy = make_trainee(
            load_policy(
                spec.policy,
                total_steps=spec.total_optimizer_steps,
                gradient_checkpointing=spec.learners.gradient_checkpointing,
                adapter=spec.adapter,
            ),
            spec,
        )
        if "ref_logprobs" in needs and spec.policy.train_type == "full":
            self._reference = FrozenEngine(load_model(spec.policy), learner=spec.learners, dtype=spec.policy.dtype)
        self._distillation = spec.algorithm.capabilities.teacher
        if self._distillation is not None and not self._distillation.served:
            model = load_model(spec.policy.model_copy(update={"model": self._distillation.model}))
            frozen = FrozenEngine(model, learner=spec.learners, dtype=spec.policy.dtype)
            self._teacher = Teacher(frozen, self._distillation)
            self._frozen.append(frozen)
        if self._reference is not None:
            self._frozen.append(self._reference)
        del sharding  # had to live until the last causal language model was loaded
        if "values" in needs:
            self.critic = _load_critic(spec)
        self._warm_up()

    @property
    def trained(self) -> list[TrainingEngine]:
        """The engines with an optimizer."""
        return [self.policy.engine] if self.critic is None else [self.policy.engine, self.critic]

    def offload(self) -> None:
        """Everything to host memory but the policy's weights, which are sent and compared with the generators'."""
        self.policy.engine.offload()
        if self.critic is not None:
            self.critic.offload(weights=True)
        for frozen in self._frozen:
            frozen.offload()

    def reload(self) -> None:
        """Undo `offload`."""
        for engine in self.trained:
            engine.reload()
        for frozen in self._frozen:
            frozen.reload()

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Float32Array:
        """`[B, T]` log-probabilities of the tokens by the policy as it is."""
        return self._logprobs(self.policy.engine, batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: MicroBatch) -> Float32Array:
        """`[B, T]` log-probabilities of the tokens by the policy as the run began."""
        with self.policy.as_reference():
            return self._logprobs(self._reference or self.policy.engine, batch)

    @torch.no_grad()
    def values(self, batch: MicroBatch) -> Float32Array:
        """`[B, T]` values by the critic as it is."""
        assert self.critic is not None, "this run has no critic"
        return forward_values(self.critic, *self._sequences(batch)).cpu().numpy()

    def policy_tokens(self, batch: MicroBatch) -> PolicyTokens:
        """The policy's forward pass, for the algorithm's loss."""
        tokens, lengths = self._sequences(batch)
        logits = forward(self.policy.engine, tokens, lengths)
        logprobs, entropy = chosen_logprobs(logits, tokens, lengths, temperature=self._temperature)
        mask = self._on_device(batch.mask)
        assert batch.advantages is not None
        return PolicyTokens(
            logprobs=logprobs,
            entropy=entropy,
            mask=mask,
            sequence_ids=_rows(mask),
            rollout_logprobs=self._on_device(batch.rollout_logprobs),
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else self._on_device(batch.old_logprobs),
            ref_logprobs=None if batch.ref_logprobs is None else self._on_device(batch.ref_logprobs),
            advantages=self._on_device(batch.advantages),
            divergence=self._divergence(batch, logits, mask),
        )

    def _divergence(self, batch: MicroBatch, logits: Tensor, mask: Tensor) -> Tensor | None:
        """From the teacher, at each token, of the policy's `logits` `[B, T, V]`."""
        if self._teacher is not None:
            return self._teacher.divergence(logits, *self._sequences(batch), mask)
        if self._distillation is None:
            return None
        assert batch.teacher_top_logprobs is not None, "the teacher's engine was not asked"
        return served_divergence(logits, batch.teacher_top_logprobs, mask, beta=self._distillation.beta)

    def value_tokens(self, batch: MicroBatch) -> ValueTokens:
        """The critic's forward pass, for its loss."""
        assert self.critic is not None
        assert batch.old_values is not None
        assert batch.returns is not None
        mask = self._on_device(batch.mask)
        return ValueTokens(
            values=forward_values(self.critic, *self._sequences(batch)),
            old_values=self._on_device(batch.old_values),
            returns=self._on_device(batch.returns),
            mask=mask,
            sequence_ids=_rows(mask),
        )

    @torch.no_grad()
    def _warm_up(self) -> None:
        """One forward pass: before it, ZeRO-3 may gather storage that was never filled."""
        token = torch.zeros(1, 2, dtype=torch.long, device=self.policy.engine.device)
        for engine in self.trained:
            engine(input_ids=token)

    def _logprobs(self, model: Callable[..., Any], batch: MicroBatch) -> Float32Array:
        tokens, lengths = self._sequences(batch)
        logits = forward(model, tokens, lengths)
        return chosen_logprobs(logits, tokens, lengths, temperature=self._temperature)[0].cpu().numpy()

    def _sequences(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._on_device(batch.tokens).long(), self._on_device(batch.lengths)

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.policy.engine.device)  # Ray's arrays are read-only


def _load_critic(spec: LearnerSpec) -> TrainingEngine:
    critic = spec.algorithm.capabilities.critic
    assert critic is not None, "the algorithm needs values, but its config has no critic"
    model = load_critic(
        critic.model or spec.policy.model,
        critic,
        spec.policy.lora,
        dtype=spec.policy.dtype,
        adapter=None if critic.model else spec.adapter,
    )
    if spec.learners.gradient_checkpointing:
        recompute_activations(model)
    return TrainingEngine(
        model,
        learner=spec.learners,
        train=spec.train.model_copy(update={"learning_rate": critic.learning_rate}),
        dtype=spec.policy.dtype,
        total_steps=spec.critic_optimizer_steps,
    )


def _rows(mask: Tensor) -> Tensor:
    """The row's number at each of its tokens."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask).contiguous()
