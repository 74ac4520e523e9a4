"""How far the policy is from the reference, and the coefficient of the KL term. Pure; torch only.

All divergences are in nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trainers.tensors import (
    as_mask,
    masked,
    require,
    require_same_shape,
    without_gradient_beside_nonfinite,
)

Estimator: TypeAlias = Literal["k1", "k2", "k3"]

K3_LIMIT = 20.0  # e^20 is about 5e8: beyond it k3 is meaningless and would dominate the loss
_LARGEST_ERROR = 0.2  # of one update of AdaptiveKL, relative (1909.08593 §2.2)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimates of KL(policy ‖ reference) from samples of the policy (Schulman 2020, "Approximating KL").

    With d = logprobs − ref_logprobs: k1 = d; k2 = d²/2; k3 = e^(−d) + d − 1. For k3 alone d is limited to ±20, in
    both terms, so that its gradient is 0 beyond. Shapes: both the same, any. Raises ValueError on shapes that differ
    and an unknown estimator. An entry with a NaN or infinite argument has gradient 0.

    >>> d = torch.tensor([0.0, 2.0])
    >>> [kl_estimate(d, torch.zeros(2), k).tolist() for k in ("k1", "k2")]
    [[0.0, 2.0], [0.0, 2.0]]
    """
    require(estimator in ("k1", "k2", "k3"), f"KL estimator {estimator!r} is unknown; use k1, k2 or k3")
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    policy = without_gradient_beside_nonfinite(logprobs, ref_logprobs)
    reference = without_gradient_beside_nonfinite(ref_logprobs, logprobs)
    d = policy - reference
    if estimator == "k1":
        return d.float()
    if estimator == "k2":
        return (d.square() / 2).float()
    d = d.clamp(-K3_LIMIT, K3_LIMIT)
    return (torch.expm1(-d) + d).float()


def kl_limited_fraction(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The fraction of the True tokens whose d the limit of k3 changed, a scalar without gradient; 0 without any.

    >>> kl_limited_fraction(torch.tensor([0.0, -20.5]), torch.zeros(2), torch.tensor([True, True])).item()
    0.5
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    mask = as_mask(mask)
    limited = (masked(logprobs.detach(), mask) - masked(ref_logprobs.detach(), mask)).abs() > K3_LIMIT
    return (limited.sum().double() / mask.sum().clamp(min=1)).float()


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """Per-token rewards of PPO: −coef·kl_t at every True token, plus the sequence's reward at its last one.

    Shapes: `rewards` `[N]`, `kl` (k1) and `mask` `[N, T]`, or any leading shape in place of N. 0 where masked; the
    reward of a sequence without a True token is not read. Raises ValueError on shapes that differ, `coef` < 0 and a
    reward that is not finite.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[2.0, 4.0, 9.0]]), mask, coef=0.25).tolist()
    [[-0.5, 0.0, 0.0]]
    """
    require_same_shape(kl=kl, mask=mask)
    require(
        kl.dim() >= 1 and rewards.shape == kl.shape[:-1],
        f"rewards {tuple(rewards.shape)} and kl {tuple(kl.shape)}; give one reward for each sequence of kl",
    )
    require(0 <= coef < math.inf, f"coef is {coef}; must be 0 or more")
    mask = as_mask(mask)
    rewards = masked(rewards, mask.any(dim=-1))
    require(bool(torch.isfinite(rewards).all()), "rewards of sequences with True tokens are NaN or infinite")
    position = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    position = torch.where(mask, position, 0)  # from 1 under True
    last = mask & (position == position.cummax(dim=-1).values[..., -1:])
    return (-coef * masked(kl, mask) + torch.where(last, rewards.unsqueeze(-1), 0.0)).float()


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A KL coefficient that stays.

    >>> FixedKL(0.05).updated(kl=3.0, n=512).coef
    0.05
    """

    coef: float

    def __post_init__(self) -> None:
        _require_coef(self.coef)

    def updated(self, kl: float, n: int) -> FixedKL:
        """Itself, whatever was measured."""
        del kl, n
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A KL coefficient that follows a target (arXiv 1909.08593, §2.2). Immutable: the three numbers are its state.

    `target` is in nats per token and > 0; `horizon` is the number of samples over which a full error of 1 would
    change `coef` by its own size, > 0.

    >>> AdaptiveKL(coef=0.1, target=0.05, horizon=1000).updated(kl=0.055, n=100).coef
    0.101
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _require_coef(self.coef)
        require(0 < self.target < math.inf, f"KL target is {self.target}; must be above 0 (nats per token)")
        require(0 < self.horizon < math.inf, f"KL horizon is {self.horizon}; must be above 0 (samples)")

    def updated(self, kl: float, n: int) -> AdaptiveKL:
        """The next one, after `n` samples whose mean k1 was `kl` nats per token.

        coef · (1 + e·n/horizon) with e = clip(kl/target − 1, −0.2, 0.2). Raises ValueError on a NaN `kl`, `n` < 0,
        and where the factor would be negative (`n` above five horizons, `kl` below the target).
        """
        require(not math.isnan(kl), "the measured KL is NaN; the coefficient cannot follow it")
        require(n >= 0, f"n is {n}; a number of samples is 0 or more")
        error = min(max(float(kl) / self.target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
        factor = 1 + error * n / self.horizon
        require(
            factor >= 0,
            f"a KL horizon of {self.horizon} samples is too short for {n} samples an update: the coefficient would "
            f"turn negative; raise it to at least {n * _LARGEST_ERROR:g}",
        )
        return replace(self, coef=self.coef * factor)


def _require_coef(coef: float) -> None:
    require(0 <= coef < math.inf, f"KL coef is {coef}; must be 0 or more")
