"""Losses per token, what corrects them for stale or foreign samples, and how they become one number. Pure; torch only.

Everything per token is computed in float64 and returned in float32. `mask` is True where the policy chose the token.
The distillation losses are defined in jsd.py and exported here as well.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trainers.jsd import generalized_jsd, topk_jsd
from trainers.tensors import (
    as_mask,
    masked,
    require,
    require_ids,
    require_same_shape,
    without_gradient_beside_nonfinite,
)

__all__ = [
    "Aggregation",
    "ImportanceLevel",
    "aggregate",
    "generalized_jsd",
    "importance_weights",
    "policy_loss",
    "sequence_log_ratio",
    "topk_jsd",
    "value_loss",
]

Aggregation: TypeAlias = Literal["token", "sequence", "constant"]
ImportanceLevel: TypeAlias = Literal["token", "sequence"]

_LARGEST_LOG_RATIO = 20.0  # e^20 is about 5e8: beyond it the ratio is meaningless and its gradient destroys the step


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7), with two clips (DAPO, 2503.14476).

    −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high)·A), ρ = exp(logprobs − old_logprobs), the exponent limited to ±20.
    With `dual_clip` c, for A < 0: min(that, −c·A) (1912.09729, eq. 5). The gradient goes to `logprobs` only; an entry
    with a NaN or infinite argument has gradient 0.

    Shapes: all the same, any. Raises ValueError on shapes that differ, a clip < 0 and `dual_clip` ≤ 1.

    >>> old = torch.zeros(3)
    >>> policy_loss(torch.tensor([0.0, 1.0, 1.0]), old, torch.tensor([1.0, 1.0, -1.0]), dual_clip=2.0).tolist()
    [-1.0, -1.2000000476837158, 2.0]
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require(clip_low >= 0, f"clip_low is {clip_low}; must be 0 or more")
    require(clip_high >= 0, f"clip_high is {clip_high}; must be 0 or more")
    require(dual_clip is None or dual_clip > 1, f"dual_clip is {dual_clip}; must be above 1, or None for none")
    old, advantage = old_logprobs.detach().double(), advantages.detach().double()
    now = without_gradient_beside_nonfinite(logprobs, old, advantage)
    ratio = (now - old).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss.float()


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """GSPO's log-ratio (arXiv 2507.18071, eq. 7) for each token: the mean of logprobs − old_logprobs over its sequence.

    The gradient is GSPO-token's (eq. 14): slope 1 to the token's own log-probability. Where the tokens of a sequence
    share one advantage, the mean of `policy_loss(log_ratio, zeros, advantages)` over the sequence so has the value and
    the gradient of GSPO's term. `old_logprobs` are a constant; an entry with a NaN or infinite argument has gradient 0.

    Shapes: all `[...]` the same; 0 under False. A sequence must not be split over batches. Raises ValueError on shapes
    that differ.

    >>> old, mask, ids = torch.zeros(3), torch.tensor([True, True, False]), torch.tensor([4, 4, 4])
    >>> sequence_log_ratio(torch.tensor([1.0, 2.0, 9.0]), old, mask, ids).tolist()
    [1.5, 1.5, 0.0]
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, sequence_ids=sequence_ids)
    require_ids(sequence_ids, name="sequence_ids")
    mask = as_mask(mask)
    own = without_gradient_beside_nonfinite(masked(logprobs, mask), old_logprobs) - masked(old_logprobs.detach(), mask)
    mean = _sequence_means(own.detach(), mask, sequence_ids)
    return torch.where(mask, mean + (own - own.detach()), 0.0).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """The critic's clipped squared error per token: ½·max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²).

    The gradient goes to `values` only; an entry with a NaN or infinite argument has gradient 0. Shapes: all the same,
    any. Raises ValueError on shapes that differ and `clip` < 0.

    >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.5).tolist()
    [0.125]
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    require(clip >= 0, f"clip is {clip}; must be 0 or more")
    old, target = old_values.detach().double(), returns.detach().double()
    now = without_gradient_beside_nonfinite(values, old, target)
    clipped = old + (now - old).clamp(-clip, clip)
    return (torch.maximum((now - target).square(), (clipped - target).square()) / 2).float()


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    *,
    how: Aggregation,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """One number from per-token losses: this batch's share of the optimizer step's loss. Shares add up to it.

    "token": Σ / total_tokens. "sequence": Σ over sequences of each one's token mean, / total_sequences. "constant":
    Σ / (total_sequences · max_tokens) (Dr. GRPO, arXiv 2503.20783). The totals are those of the full optimizer step
    over all ranks; by default those of the tensors at hand (sequences with at least one True token). A sequence must
    not be split over batches. Without any True token: 0, with gradient 0.

    Shapes: all `[...]` the same; a padded batch repeats the row's id. Returns a float32 scalar. Raises ValueError on
    shapes that differ, an unknown `how`, "constant" without `max_tokens`, and a total that is negative, or 0 where
    there are True tokens.

    >>> x, ids = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([5, 5, 2])
    >>> mask = torch.tensor([True, True, True])
    >>> [aggregate(x, mask, ids, how=how, max_tokens=2).item() for how in ("token", "sequence", "constant")]
    [4.0, 5.0, 3.0]
    """
    require(how in ("token", "sequence", "constant"), f"how {how!r} is unknown; use token, sequence or constant")
    require(how != "constant" or max_tokens is not None, "how 'constant' divides by max_tokens; give it")
    require(max_tokens is None or max_tokens > 0, f"max_tokens is {max_tokens}; must be above 0")
    require_same_shape(per_token=per_token, mask=mask, sequence_ids=sequence_ids)
    require_ids(sequence_ids, name="sequence_ids")
    mask = as_mask(mask)
    x = masked(per_token, mask)
    if how == "token":
        return (x.sum() / _total(total_tokens, mask, mask.sum(), name="total_tokens")).float()
    number, counts = _sequences(mask, sequence_ids)
    sequences = _total(total_sequences, mask, (counts > 0).sum(), name="total_sequences")
    if how == "sequence":
        return ((x / counts.clamp(min=1)[number]).sum() / sequences).float()
    return (x.sum() / (sequences * (max_tokens or 1))).float()


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    *,
    level: ImportanceLevel = "token",
    cap: float | None = 2.0,
    floor: float | None = None,
    band: tuple[float, float] | None = None,
) -> Tensor:
    """Weights that correct for samples from another distribution than the trainer's own; per token, detached.

    w = exp(old − rollout); at level "sequence" the geometric mean of w over the sequence, for each of its tokens.
    Then min(w, cap) (truncated importance sampling) and max(·, floor). With `band` (lo, hi) instead: w inside, both
    ends included, is kept, else 0 (IcePop); neither cap nor floor applies. 0 under False.

    They multiply the policy loss only, never the KL term. Shapes: all `[...]` the same. Raises ValueError on shapes
    that differ, an unknown level, `cap` ≤ 0, `floor` < 0 or above `cap`, and a `band` that is not 0 ≤ lo ≤ hi.

    >>> old, rollout = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])
    >>> importance_weights(old, rollout, torch.tensor([True, True]), torch.tensor([0, 1])).tolist()
    [1.0, 2.0]
    """
    require(level in ("token", "sequence"), f"level {level!r} is unknown; use token or sequence")
    require(cap is None or cap > 0, f"cap is {cap}; must be above 0")
    require(floor is None or floor >= 0, f"floor is {floor}; must be 0 or more")
    require(cap is None or floor is None or floor <= cap, f"floor {floor} is above cap {cap}")
    require(band is None or 0 <= band[0] <= band[1], f"band is {band}; must be (lo, hi) with 0 ≤ lo ≤ hi")
    require_same_shape(
        old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask, sequence_ids=sequence_ids
    )
    require_ids(sequence_ids, name="sequence_ids")
    mask = as_mask(mask)
    log_w = masked(old_logprobs.detach(), mask) - masked(rollout_logprobs.detach(), mask)
    if level == "sequence":
        log_w = _sequence_means(log_w, mask, sequence_ids)
    w = log_w.exp().float()  # the band is a statement about the number returned, so its ends are met in float32
    if band is not None:
        w = torch.where((w < band[0]) | (w > band[1]), 0.0, w)
    else:
        w = w if cap is None else w.clamp(max=cap)
        w = w if floor is None else w.clamp(min=floor)
    return torch.where(mask, w, 0.0)


def _sequences(mask: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's sequence numbered 0 … S − 1, in the shape of `mask`, and the S counts of True tokens."""
    _, number = sequence_ids.unique(return_inverse=True)
    size = int(number.max()) + 1 if number.numel() else 0
    counts = torch.zeros(size, dtype=torch.int64, device=mask.device)
    return number, counts.index_add(0, number.flatten(), mask.flatten().long())


def _sequence_means(x: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """For each position the mean of `x`, which is 0 under False, over its sequence's True tokens."""
    number, counts = _sequences(mask, sequence_ids)
    sums = x.new_zeros(len(counts)).index_add(0, number.flatten(), x.flatten())
    return (sums / counts.clamp(min=1))[number]


def _total(given: float | None, mask: Tensor, at_hand: Tensor, *, name: str) -> Tensor | float:
    """The denominator: the given total, else the one at hand; 1 instead of 0, since the sum is then 0 as well."""
    if given is None:
        return at_hand.clamp(min=1)
    require(given >= 0, f"{name} is {given}; must be 0 or more")
    if given == 0:
        require(
            not bool(mask.any()), f"{name} is 0, but there are True tokens; give the total of the full optimizer step"
        )
    return given or 1.0
