"""What an algorithm is: advantages from scored samples, and a loss for a micro-batch. Pure; one file each.

The learner runs the policy and hands over per-token log-probabilities; the algorithm never sees a model. Metrics
are sums with counts, so that they add up exactly over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from trainers.types import AnnotatedSample, TrainSample

if TYPE_CHECKING:
    from torch import Tensor  # seconds to import, and the driver's messages need no more than `Mean`

Need: TypeAlias = Literal["old_logprobs", "ref_logprobs", "values", "divergence"]
"""The first three are computed before the update, the last one (from the teacher) in its forward passes."""


WEIGHT_MOMENTS = ("importance/weight", "importance/weight_squared")
"""Metrics from which the effective sample size is made; not shown themselves."""

VALUE_MOMENTS = ("value/return", "value/return_squared", "value/error", "value/error_squared")
"""Metrics from which `ppo.explained_variance` is made; not shown themselves. The error is return − old value."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric as a sum and what it is divided by, both additive over micro-batches and ranks.

    >>> (Mean(3.0, 2.0) + Mean(1.0, 2.0)).value
    1.0
    """

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; 0 where nothing was counted."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """A micro-batch as the loss sees it; every tensor is `[B, T]`, on the learner's device."""

    logprobs: Tensor  # float32, of the policy now, with gradient
    entropy: Tensor  # float32 nats, without gradient
    mask: Tensor  # bool
    sequence_ids: Tensor  # int64
    rollout_logprobs: Tensor
    old_logprobs: Tensor  # the trainer's own; `logprobs` detached where the update is exactly on-policy
    ref_logprobs: Tensor | None
    advantages: Tensor
    divergence: Tensor | None = None  # float32, of the policy now from the teacher, with gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTokens:
    """A micro-batch as the critic's loss sees it; every tensor is `[B, T]`, on the learner's device."""

    values: Tensor  # float32, of the critic now, with gradient: of the state in which the token was chosen
    old_values: Tensor  # before the update
    returns: Tensor
    mask: Tensor  # bool
    sequence_ids: Tensor  # int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Denominators of the complete optimizer step over all ranks."""

    tokens: int
    sequences: int
    max_tokens: int  # longest completion that sampling allows, for constant aggregation


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the optimizer step's loss (shares add up to it), and its metrics."""

    loss: Tensor
    metrics: Mapping[str, Mean]


class Algorithm(Protocol):
    """One online algorithm. `needs` states which extra forward passes the learner makes before the update."""

    @property
    def needs(self) -> frozenset[Need]:
        """Quantities that `advantages` or `loss` read besides what every sample has."""
        ...

    def advantages(self, samples: Sequence[AnnotatedSample], *, kl_coef: float) -> list[TrainSample]:
        """The samples that are trained on, each with its advantages; samples without a valid score are left out."""
        ...

    def loss(self, batch: PolicyTokens, *, totals: Totals, kl_coef: float) -> LossOutput:
        """The micro-batch's share of the loss of the complete optimizer step."""
        ...


class ActorCritic(Algorithm, Protocol):
    """An algorithm that needs `values`: it trains a critic beside the policy."""

    def value_loss(self, batch: ValueTokens, *, totals: Totals) -> LossOutput:
        """The micro-batch's share of the critic's loss of the complete optimizer step."""
        ...
