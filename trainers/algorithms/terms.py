"""The terms that losses are made of: clipped surrogate, KL to the reference, their metrics and their aggregation.

It knows the pure functions of `trainers/` and the algorithms' config, and no algorithm. A term comes back per token
`[B, T]`, so that an algorithm adds its terms up and aggregates once; its metrics are sums with counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from trainers.algorithms.base import WEIGHT_MOMENTS, Mean, PolicyTokens, Totals, ValueTokens
from trainers.algorithms.config import KLConfig
from trainers.config import ImportanceConfig
from trainers.kl import kl_estimate, kl_limited_fraction
from trainers.losses import Aggregation, aggregate, importance_weights, policy_loss

Metrics: TypeAlias = dict[str, Mean]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """PPO's clipped surrogate, weighted for the generator's distribution where `importance` is given."""

    clip_low: float
    clip_high: float
    importance: ImportanceConfig | None = None

    def __call__(self, batch: PolicyTokens) -> tuple[Tensor, Metrics]:
        """The term per token with gradient to the log-probabilities, and its metrics."""
        term = policy_loss(
            batch.logprobs, batch.old_logprobs, batch.advantages, clip_low=self.clip_low, clip_high=self.clip_high
        )
        metrics = {"policy/clip_fraction": token_mean(self._clipped(batch), batch.mask)}
        if self.importance is None:
            return term, metrics
        weights = importance_weights(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.mask,
            batch.sequence_ids,
            level=self.importance.level,
            cap=self.importance.cap,
        )
        metrics["importance/clipped_fraction"] = token_mean(weights >= self.importance.cap, batch.mask)
        metrics |= {name: token_mean(weights**power, batch.mask) for power, name in enumerate(WEIGHT_MOMENTS, start=1)}
        return term * weights, metrics

    def _clipped(self, batch: PolicyTokens) -> Tensor:
        """True where the clip removes the gradient: the ratio beyond the side that the advantage pushes to."""
        ratio = (batch.logprobs.detach() - batch.old_logprobs).clamp(-20, 20).exp()
        above = (batch.advantages > 0) & (ratio > 1 + self.clip_high)
        below = (batch.advantages < 0) & (ratio < 1 - self.clip_low)
        return above | below


def kl_term(batch: PolicyTokens, kl: KLConfig, *, coef: float) -> tuple[Tensor | float, Metrics]:
    """`coef` times the KL estimate per token where it belongs to the loss, else 0; and what was measured of the KL.

    `kl/mean` is k1 of the policy now, in nats per token, whatever the estimator and the placement. Without a
    reference there is neither term nor metric.
    """
    if batch.ref_logprobs is None:
        return 0.0, {}
    measured = kl_estimate(batch.logprobs.detach(), batch.ref_logprobs, "k1")
    metrics = {"kl/mean": token_mean(measured, batch.mask)}
    if kl.placement == "reward":
        return 0.0, metrics
    if kl.estimator == "k3":
        limited = kl_limited_fraction(batch.logprobs, batch.ref_logprobs, batch.mask)
        tokens = float(batch.mask.sum())
        metrics["kl/limited_fraction"] = Mean(float(limited) * tokens, tokens)
    return coef * kl_estimate(batch.logprobs, batch.ref_logprobs, kl.estimator), metrics


def step_share(
    per_token: Tensor, batch: PolicyTokens | ValueTokens, totals: Totals, *, how: Aggregation = "token"
) -> Tensor:
    """The micro-batch's share of the whole optimizer step's loss, a scalar."""
    return aggregate(
        per_token,
        batch.mask,
        batch.sequence_ids,
        how=how,
        total_tokens=totals.tokens,
        total_sequences=totals.sequences,
        max_tokens=totals.max_tokens,
    )


def token_mean(values: Tensor, mask: Tensor) -> Mean:
    """The sum over the True tokens, in float64, and their number."""
    chosen = values.detach()[mask]
    return Mean(float(chosen.double().sum()), float(chosen.numel()))
