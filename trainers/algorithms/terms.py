"""The terms that losses are made of: clipped surrogate, KL to the reference, their metrics and their aggregation.

It knows the pure functions of `trainers/` and the algorithms' config, and no algorithm. A term comes back per token
`[B, T]`, so that an algorithm adds its terms up and aggregates once; its metrics are sums with counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trainers.algorithms.base import WEIGHT_MOMENTS, LossOutput, Mean, PolicyTokens, Totals, ValueTokens
from trainers.algorithms.config import KLConfig
from trainers.config import ImportanceConfig
from trainers.kl import kl_estimate, kl_limited_fraction
from trainers.losses import Aggregation, aggregate, importance_weights, policy_loss, sequence_log_ratio

Metrics: TypeAlias = dict[str, Mean]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """PPO's clipped surrogate, weighted for the generator's distribution where `importance` is given."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    importance: ImportanceConfig | None = None

    def __call__(self, batch: PolicyTokens, totals: Totals) -> tuple[Tensor, Metrics]:
        """The term per token with gradient to the log-probabilities, and its metrics.

        Raises ValueError where the micro-batch is the complete optimizer step and the importance band leaves no token.
        """
        now, old = batch.logprobs, batch.old_logprobs
        if self.ratio == "sequence":
            now, old = sequence_log_ratio(now, old, batch.mask, batch.sequence_ids), torch.zeros_like(old)
        term = policy_loss(
            now,
            old,
            batch.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        metrics = {"policy/clip_fraction": token_mean(self._clipped(now.detach() - old, batch.advantages), batch.mask)}
        if self.importance is None:
            return term, metrics
        weights, weighing = importance(batch, self.importance)
        if batch.mask.sum() == totals.tokens:
            require_kept(weighing)
        return term * weights, metrics | weighing

    def _clipped(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """True where a clip removes the gradient: the ratio beyond the side that the advantage pushes to."""
        ratio = log_ratio.clamp(-20, 20).exp()
        above = (advantages > 0) & (ratio > 1 + self.clip_high)
        below = (advantages < 0) & (ratio < 1 - self.clip_low)
        far = (advantages < 0) & (ratio > self.dual_clip) if self.dual_clip is not None else torch.zeros_like(above)
        return above | below | far


def importance(batch: PolicyTokens, config: ImportanceConfig) -> tuple[Tensor, Metrics]:
    """Importance weights per token, and what they did.

    `importance/clipped_fraction` is the share of the tokens at the cap or the floor, or outside the band, and
    `importance/kept`, with a band only, the share inside.
    """
    weights = importance_weights(
        batch.old_logprobs,
        batch.rollout_logprobs,
        batch.mask,
        batch.sequence_ids,
        level=config.level,
        cap=config.cap,
        floor=config.floor,
        band=config.band,
    )
    metrics = {name: token_mean(weights**power, batch.mask) for power, name in enumerate(WEIGHT_MOMENTS, start=1)}
    if config.band is not None:
        metrics["importance/kept"] = token_mean(weights != 0, batch.mask)
        clipped = weights == 0
    else:
        clipped = weights >= config.cap
        clipped = clipped if config.floor is None else clipped | (weights <= config.floor)
    return weights, metrics | {"importance/clipped_fraction": token_mean(clipped, batch.mask)}


def require_kept(metrics: Mapping[str, Mean]) -> None:
    """Raises ValueError where a band left no token of those whose metrics were added up: nothing would be learnt.

    Give the sums of one complete optimizer step over all its micro-batches and ranks, before the optimizer's step.
    """
    kept = metrics.get("importance/kept")
    if kept is not None and kept.count > 0 and kept.total == 0:
        raise ValueError(
            f"train.importance_correction.band leaves none of the {kept.count:.0f} tokens of an optimizer step: the "
            "generator's and the trainer's log-probabilities differ on all of them; see rollout/logprob_gap_mean for "
            "how far, and find the cause or widen the band"
        )


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


def clipped_loss(
    batch: PolicyTokens,
    totals: Totals,
    surrogate: Surrogate,
    kl: KLConfig,
    *,
    kl_coef: float,
    how: Aggregation = "token",
) -> LossOutput:
    """The policy's loss of GRPO and PPO: the surrogate plus the KL term where it is in the loss, aggregated alike."""
    policy, metrics = surrogate(batch, totals)
    penalty, measured = kl_term(batch, kl, coef=kl_coef)
    metrics |= {"policy/entropy": token_mean(batch.entropy, batch.mask)} | measured
    return LossOutput(loss=step_share(policy + penalty, batch, totals, how=how), metrics=metrics)


def step_share(
    per_token: Tensor, batch: PolicyTokens | ValueTokens, totals: Totals, *, how: Aggregation = "token"
) -> Tensor:
    """The micro-batch's share of the complete optimizer step's loss, a scalar."""
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
