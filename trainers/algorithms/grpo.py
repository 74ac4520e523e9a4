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

from trainers.advantages import group_advantages, leave_one_out_advantages
from trainers.algorithms.base import LossOutput, Need, PolicyTokens, Totals
from trainers.algorithms.config import GRPOConfig
from trainers.algorithms.terms import Surrogate, kl_term, step_share, token_mean
from trainers.config import ImportanceConfig
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
        config = self.config
        surrogate = Surrogate(clip_low=config.clip_low, clip_high=config.clip_high, importance=self.importance)
        policy, metrics = surrogate(batch)
        penalty, measured = kl_term(batch, config.kl, coef=kl_coef)
        metrics |= {"policy/entropy": token_mean(batch.entropy, batch.mask)} | measured
        return LossOutput(loss=step_share(policy + penalty, batch, totals, how=config.aggregation), metrics=metrics)
