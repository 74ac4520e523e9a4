"""GKD: generalized knowledge distillation (arXiv 2306.13649).

The loss is the generalized Jensen–Shannon divergence between the policy and a teacher at every token of the
completions, averaged over the tokens of the optimizer step. With probability `lmbda`, drawn once for a step, the
policy writes them; else the teacher does, or they are the data's own responses. Rewards are only monitored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import numpy as np

from trainers.algorithms.base import LossOutput, Need, PolicyTokens, Totals
from trainers.algorithms.config import GKDConfig
from trainers.algorithms.terms import kl_term, step_share, token_mean
from trainers.config import ImportanceConfig
from trainers.errors import Problem, UserError
from trainers.types import AnnotatedSample, TrainSample


@dataclass(frozen=True, slots=True)
class GKD:
    """See the module's docstring; implements `Algorithm`. Raises UserError where importance weights are wanted."""

    config: GKDConfig
    importance: InitVar[ImportanceConfig | None] = None

    def __post_init__(self, importance: ImportanceConfig | None) -> None:
        if importance is not None:
            reason = "importance weights correct a policy gradient, and gkd has none; set it to null"
            raise UserError([Problem("train.importance_correction", reason)])

    @property
    def needs(self) -> frozenset[Need]:
        """The divergence from the teacher, and the reference where there is a KL term."""
        return frozenset({"divergence", "ref_logprobs"}) if self.config.kl.coef > 0 else frozenset({"divergence"})

    def advantages(self, samples: Sequence[AnnotatedSample], *, kl_coef: float) -> list[TrainSample]:
        """Every valid sample; its advantages are 0, for nothing is learnt from rewards."""
        del kl_coef  # the KL term is in the loss
        return [
            TrainSample(annotated=s, advantages=np.zeros(len(s.sample.tokens), dtype=np.float32))
            for s in samples
            if s.sample.valid
        ]

    def loss(self, batch: PolicyTokens, *, totals: Totals, kl_coef: float) -> LossOutput:
        """The mean divergence of the completions' tokens, plus the KL term where there is a reference.

        Where the policy did not write the completions, `kl/mean` is the mean log-ratio on the tokens that it was
        given, no estimate of the divergence from the reference.
        """
        assert batch.divergence is not None, "gkd needs the divergence from the teacher"
        penalty, measured = kl_term(batch, self.config.kl, coef=kl_coef)
        metrics = {
            "distill/jsd": token_mean(batch.divergence, batch.mask),
            "policy/entropy": token_mean(batch.entropy, batch.mask),
        }
        return LossOutput(loss=step_share(batch.divergence + penalty, batch, totals), metrics=metrics | measured)
