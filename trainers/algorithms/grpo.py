"""GRPO: group relative policy optimization (arXiv 2402.03300) with its variants as options.

For each prompt a group of completions is sampled; a completion's advantage is its reward against the group's mean,
the same for all of its tokens; the loss is PPO's clipped surrogate plus `kl_coef` times the KL estimate to the
reference. Chosen details: unbiased standard deviation, groups with equal rewards get advantage 0 but stay in the
token count (their KL term acts), aggregation over all tokens of the optimizer step (DAPO, 2503.14476).
RLOO (2402.14740) is `advantage: leave_one_out, scale: none`; Dr. GRPO (2503.20783) is `scale: none,
aggregation: constant`; GSPO (2507.18071) is `ratio: sequence, aggregation: sequence` with narrow clips; DAPO's soft
punishment of length is `overlong`, its replacement of groups that teach nothing `dynamic_sampling` (the driver's). With
the KL term in the reward, a completion's reward is reduced by `kl_coef` times the sum of k1 over its tokens, of the
policy that the update starts from, before the group is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainers.advantages import group_advantages, leave_one_out_advantages
from trainers.algorithms.base import LossOutput, Need, PolicyTokens, Totals
from trainers.algorithms.config import GRPOConfig
from trainers.algorithms.terms import Surrogate, clipped_loss
from trainers.config import ImportanceConfig
from trainers.rewards import overlong_penalty
from trainers.types import AnnotatedSample, TrainSample


@dataclass(frozen=True, slots=True)
class GRPO:
    """See the module's docstring; implements `Algorithm`."""

    config: GRPOConfig
    importance: ImportanceConfig | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """The reference with a KL term, and for one in the reward the policy's own log-probabilities."""
        if self.config.kl.coef == 0:
            return frozenset()
        return frozenset({"ref_logprobs", "old_logprobs"} if self._kl_in_reward else {"ref_logprobs"})

    def advantages(self, samples: Sequence[AnnotatedSample], *, kl_coef: float) -> list[TrainSample]:
        """Advantages of equation 1 of the paper, one number for a completion, over its tokens."""
        rewards = torch.tensor([self._reward(s, kl_coef) for s in samples], dtype=torch.float64)
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
        surrogate = Surrogate(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            importance=self.importance,
        )
        return clipped_loss(batch, totals, surrogate, config.kl, kl_coef=kl_coef, how=config.aggregation)

    @property
    def _kl_in_reward(self) -> bool:
        return self.config.kl.coef > 0 and self.config.kl.placement == "reward"

    def _reward(self, annotated: AnnotatedSample, kl_coef: float) -> float:
        """What the group's rewards are compared by: the reward, less the sequence's KL and what its length costs."""
        sample, reward = annotated.sample, annotated.sample.reward
        if self._kl_in_reward and sample.valid:
            old, reference = annotated.old_logprobs, annotated.ref_logprobs
            assert old is not None, "a KL term in the reward needs the policy's own log-probabilities"
            assert reference is not None, "a KL term in the reward needs the reference's log-probabilities"
            reward -= kl_coef * float((old[sample.mask].astype(np.float64) - reference[sample.mask]).sum())
        overlong = self.config.overlong
        if overlong is None:
            return reward
        return reward + overlong_penalty(
            int(sample.mask.sum()),
            max_tokens=overlong.max_tokens,
            buffer_tokens=overlong.buffer_tokens,
            penalty=overlong.penalty,
        )
