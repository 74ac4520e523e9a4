"""PPO: proximal policy optimization with a critic (arXiv 1707.06347; for language models 1909.08593).

A completion's reward comes at its last token; the KL to the reference is subtracted token by token from the reward
(k1, of the policy that wrote) or added to the loss. Generalised advantage estimation over the completion's tokens
against the critic's values gives advantages and returns; the advantages, not the returns, are whitened over all
tokens of the step. Policy and critic have clipped losses, both means over the optimizer step's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainers.advantages import gae, whiten
from trainers.algorithms.base import VALUE_MOMENTS, LossOutput, Mean, Need, PolicyTokens, Totals, ValueTokens
from trainers.algorithms.config import PPOConfig
from trainers.algorithms.terms import Surrogate, clipped_loss, step_share, token_mean
from trainers.config import ImportanceConfig
from trainers.kl import kl_estimate, token_rewards
from trainers.losses import value_loss
from trainers.types import AnnotatedSample, Float32Array, TrainSample

_ROUNDING = 1e-12  # of a variance taken from moments, relative to the mean square: what is below is rounding


@dataclass(frozen=True, slots=True)
class PPO:
    """See the module's docstring; implements `ActorCritic`."""

    config: PPOConfig
    importance: ImportanceConfig | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """The values; the reference with a KL term, and for one in the reward the policy's own log-probabilities."""
        kl = self.config.kl
        if kl.coef == 0:
            return frozenset({"values"})
        if kl.placement == "loss":
            return frozenset({"values", "ref_logprobs"})
        return frozenset({"values", "ref_logprobs", "old_logprobs"})

    def advantages(self, samples: Sequence[AnnotatedSample], *, kl_coef: float) -> list[TrainSample]:
        """Whitened advantages and the returns of the valid samples; the step's samples must come in one call."""
        kept = [s for s in samples if s.sample.valid]
        if not kept:
            return []
        estimates = [self._estimate(s, kl_coef) for s in kept]
        mask = torch.cat([_tensor(s.sample.mask) for s in kept])
        whitened = whiten(torch.cat([advantages for advantages, _ in estimates]), mask)
        parts = whitened.split([len(s.sample.tokens) for s in kept])
        return [
            TrainSample(annotated=s, advantages=part.numpy().copy(), returns=returns.numpy())
            for s, part, (_, returns) in zip(kept, parts, estimates, strict=True)
        ]

    def loss(self, batch: PolicyTokens, *, totals: Totals, kl_coef: float) -> LossOutput:
        """Clipped surrogate (importance weighted where configured), plus the KL term where it is in the loss."""
        config = self.config
        surrogate = Surrogate(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            importance=self.importance,
        )
        return clipped_loss(batch, totals, surrogate, config.kl, kl_coef=kl_coef)

    def value_loss(self, batch: ValueTokens, *, totals: Totals) -> LossOutput:
        """The critic's clipped squared error, and the moments from which `explained_variance` is made."""
        clip = np.inf if self.config.value_clip is None else self.config.value_clip
        per_token = value_loss(batch.values, batch.old_values, batch.returns, clip=clip)
        returns = batch.returns.double()
        moments = (returns, returns**2, returns - batch.old_values, (returns - batch.old_values) ** 2)
        metrics = {"value/loss": token_mean(per_token, batch.mask)}
        metrics |= {name: token_mean(moment, batch.mask) for name, moment in zip(VALUE_MOMENTS, moments, strict=True)}
        return LossOutput(loss=step_share(per_token, batch, totals), metrics=metrics)

    def _estimate(self, annotated: AnnotatedSample, kl_coef: float) -> tuple[Tensor, Tensor]:
        """Advantages before whitening, and returns."""
        sample, kl = annotated.sample, self.config.kl
        mask = _tensor(sample.mask)
        k1 = torch.zeros(mask.shape)
        if kl.coef > 0 and kl.placement == "reward":
            k1 = kl_estimate(_given(annotated.old_logprobs), _given(annotated.ref_logprobs), "k1")
        rewards = token_rewards(torch.tensor(sample.reward, dtype=torch.float64), k1, mask, coef=kl_coef)
        return gae(rewards, _given(annotated.values), mask, gamma=self.config.gamma, lam=self.config.lam)


def explained_variance(metrics: Mapping[str, Mean]) -> float | None:
    """1 − Var(returns − old values) / Var(returns) over all tokens whose moments were added up (population variance).

    The values are those before the update, from which the returns were made: 1 means that the critic foresaw every
    return, 0 that a constant would have done as well. None where a moment is missing or the returns do not vary.

    >>> moments = dict(zip(VALUE_MOMENTS, [Mean(4, 2), Mean(10, 2), Mean(2, 2), Mean(2, 2)], strict=True))
    >>> explained_variance(moments)  # returns 1 and 3, values 0 and 2
    1.0
    """
    found = [metrics[name].value for name in VALUE_MOMENTS if name in metrics]
    if len(found) < len(VALUE_MOMENTS):
        return None
    mean, square, error, error_square = found
    variance = square - mean**2
    return 1 - (error_square - error**2) / variance if variance > _ROUNDING * square else None


def _given(array: Float32Array | None) -> Tensor:
    assert array is not None, "a quantity that this algorithm needs was not annotated"
    return _tensor(array)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # Ray's arrays are read-only
