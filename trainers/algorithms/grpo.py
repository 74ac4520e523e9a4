"""GRPO: group relative policy optimisation (arXiv 2402.03300) with its variants as options.

For each prompt a group of completions is sampled; a completion's advantage is its reward against the group's mean,
the same for all of its tokens; the loss is PPO's clipped surrogate plus `kl_coef` times the KL estimate to the
reference. Chosen details: unbiased standard deviation, groups with equal rewards get advantage 0 but stay in the
token count (their KL term acts), aggregation over all tokens of the optimizer step (DAPO, 2503.14476).
RLOO (2402.14740) is `advantage: leave_one_out, scale: none`; Dr. GRPO (2503.20783) is `scale: none,
aggregation: constant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainers.advantages import group_advantages, leave_one_out_advantages
from trainers.algorithms.base import WEIGHT_MOMENTS, LossOutput, Mean, Need, PolicyTokens, Totals
from trainers.algorithms.config import GRPOConfig
from trainers.config import ImportanceConfig
from trainers.kl import kl_estimate, kl_limited_fraction
from trainers.losses import aggregate, importance_weights, policy_loss
from trainers.types import AnnotatedSample, TrainSample


@dataclass(frozen=True, slots=True)
class GRPO:
    """See the module's docstring; implements `Algorithm`."""

    config: GRPOConfig
    importance: ImportanceConfig | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """The reference's log-probabilities, unless there is no KL term."""
        return frozenset({"ref_logprobs"}) if self.config.kl.coef > 0 else frozenset()

    def advantages(self, samples: Sequence[AnnotatedSample], *, kl_coef: float) -> list[TrainSample]:
        """Advantages of equation 1 of the paper, one number for a completion, over its tokens."""
        del kl_coef  # the KL term is in the loss
        rewards = torch.tensor([s.sample.reward for s in samples], dtype=torch.float64)
        groups = torch.tensor([s.sample.group for s in samples], dtype=torch.int64)
        valid = torch.tensor([s.sample.valid for s in samples], dtype=torch.bool)
        if self.config.advantage == "leave_one_out":
            values = leave_one_out_advantages(rewards, groups, valid=valid)
        else:
            values = group_advantages(rewards, groups, scale=self.config.scale, valid=valid)
        return [
            TrainSample(annotated=s, advantages=np.where(s.sample.mask, np.float32(a), np.float32(0)))
            for s, a in zip(samples, values.tolist(), strict=True)
            if s.sample.valid
        ]

    def loss(self, batch: PolicyTokens, *, totals: Totals, kl_coef: float) -> LossOutput:
        """Clipped surrogate (importance weighted where configured) plus the KL term, aggregated alike."""
        config, mask = self.config, batch.mask
        surrogate = policy_loss(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        metrics = {
            "policy/clip_fraction": _mean(self._clipped(batch), mask),
            "policy/entropy": _mean(batch.entropy, mask),
        }
        if self.importance is not None:
            weights = importance_weights(
                batch.old_logprobs,
                batch.rollout_logprobs,
                mask,
                batch.sequence_ids,
                level=self.importance.level,
                cap=self.importance.cap,
            )
            surrogate = surrogate * weights
            metrics["importance/clipped_fraction"] = _mean(weights >= self.importance.cap, mask)
            metrics |= {name: _mean(weights**power, mask) for power, name in enumerate(WEIGHT_MOMENTS, start=1)}
        loss = self._aggregate(surrogate, batch, totals)
        if batch.ref_logprobs is not None:
            penalty = kl_estimate(batch.logprobs, batch.ref_logprobs, config.kl.estimator)
            loss = loss + kl_coef * self._aggregate(penalty, batch, totals)
            with torch.no_grad():
                metrics["kl/mean"] = _mean(kl_estimate(batch.logprobs, batch.ref_logprobs, "k1"), mask)
                limited = kl_limited_fraction(batch.logprobs, batch.ref_logprobs, mask)
            tokens = float(mask.sum())
            metrics["kl/limited_fraction"] = Mean(float(limited) * tokens, tokens)
        return LossOutput(loss=loss, metrics=metrics)

    def _aggregate(self, per_token: Tensor, batch: PolicyTokens, totals: Totals) -> Tensor:
        return aggregate(
            per_token,
            batch.mask,
            batch.sequence_ids,
            how=self.config.aggregation,
            total_tokens=totals.tokens,
            total_sequences=totals.sequences,
            max_tokens=totals.max_tokens,
        )

    def _clipped(self, batch: PolicyTokens) -> Tensor:
        """True where the clip removes the gradient: the ratio beyond the side that the advantage pushes to."""
        ratio = (batch.logprobs.detach() - batch.old_logprobs).clamp(-20, 20).exp()
        above = (batch.advantages > 0) & (ratio > 1 + self.config.clip_high)
        below = (batch.advantages < 0) & (ratio < 1 - self.config.clip_low)
        return above | below


def _mean(values: Tensor, mask: Tensor) -> Mean:
    chosen = values.detach()[mask]
    return Mean(float(chosen.double().sum()), float(chosen.numel()))
