"""Advantages: how much better a sample, or one of its tokens, did than expected. Pure functions on tensors.

It knows torch only. Rewards are statistics of a few hundred numbers, so everything is computed in float64 and
returned in float32, on the device of its arguments.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.tensors import as_mask, masked, require, require_ids, require_same_shape

Scale: TypeAlias = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor, groups: Tensor, *, scale: Scale = "group", valid: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Rewards against their group's mean, divided by a standard deviation (GRPO, arXiv 2402.03300, §4.1.2).

    A_i = (r_i − mean_g) / (std + eps), the mean and the unbiased std (n − 1) over the valid samples. `scale`
    selects the std: of the "group", of the full "batch" (raw rewards of all valid samples), or "none" for no division
    (Dr. GRPO, 2503.20783). 0 for invalid samples and in groups with fewer than two valid samples or equal rewards.

    Shapes: all `[N]`; `groups` are any integers in any order; `valid` defaults to all. Raises ValueError on shapes
    that differ, an unknown `scale`, `eps` < 0 and a valid sample's reward that is not finite.

    >>> rewards, groups = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([7, 7, -2, -2])
    >>> group_advantages(rewards, groups, scale="none").tolist()
    [-1.0, 1.0, 0.0, 0.0]
    >>> [round(a, 4) for a in group_advantages(rewards, groups).tolist()]
    [-0.7071, 0.7071, 0.0, 0.0]
    """
    require(scale in ("group", "batch", "none"), f"scale {scale!r} is unknown; use group, batch or none")
    require(eps >= 0, f"eps is {eps}; must be 0 or more")
    kept, r, group, count = _by_group(rewards, groups, valid)
    deviation = torch.where(_flat(r, group, count), 0.0, r - (_sums(r, group, count) / count)[group])
    if scale == "none":
        return _spread(kept, deviation)
    if scale == "group":
        std = (_sums(deviation.square(), group, count) / (count - 1).clamp(min=1)).sqrt()[group]
    else:
        std = r.std() if len(r) > 1 else torch.zeros_like(r)
    return _spread(kept, torch.where(deviation == 0, 0.0, deviation / (std + eps)))


def leave_one_out_advantages(rewards: Tensor, groups: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Rewards against the mean of the group's other valid samples (RLOO, arXiv 2402.14740).

    Shapes and errors as in `group_advantages`; 0 for invalid samples and in groups with fewer than two valid ones.

    >>> leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4, 4, 4])).tolist()
    [-3.0, -1.5, 4.5]
    """
    kept, r, group, count = _by_group(rewards, groups, valid)
    others = (_sums(r, group, count)[group] - r) / (count[group] - 1).clamp(min=1)
    return _spread(kept, torch.where(_flat(r, group, count), 0.0, r - others))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the True positions (arXiv 1506.02438, eq. 16) and the returns.

    A_t = δ_t + γλ·A_next, δ_t = r_t + γ·V_next − V_t, where next is the next True position: masked positions (tool
    output, padding) are stepped over without decay, and after the last one V = A = 0. Returns = A + V.

    Shapes: all `[..., T]`, time last; 0 where masked. Raises ValueError on shapes that differ, `gamma` or `lam`
    outside [0, 1] and a reward under True that is not finite.

    >>> mask = torch.tensor([True, False, True])
    >>> advantages, returns = gae(torch.tensor([0.0, 9.0, 1.0]), torch.tensor([0.5, 9.0, 0.25]), mask, lam=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([0.125, 0.0, 0.75], [0.625, 0.0, 1.0])
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    require(rewards.dim() >= 1, "rewards are a single number; give [..., T]")
    require(0 <= gamma <= 1, f"gamma is {gamma}; must be in [0, 1]")
    require(0 <= lam <= 1, f"lam is {lam}; must be in [0, 1]")
    mask = as_mask(mask)
    r, v = masked(rewards, mask), masked(values, mask)
    _require_finite(r)

    # The True positions are moved to the front, so that "next" is the next column; past them all is 0.
    order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    front = v.gather(-1, order)
    advantages = r.gather(-1, order) + gamma * pad(front[..., 1:], (0, 1)) - front
    # Σ_k (γλ)^k·δ_{t+k} by doubling: after each round a column holds the sum of twice as many terms.
    reach, decay = 1, gamma * lam
    while reach < mask.shape[-1] and decay > 0:
        advantages = advantages + decay * pad(advantages[..., reach:], (0, reach))
        reach, decay = 2 * reach, decay * decay
    advantages = torch.zeros_like(advantages).scatter(-1, order, advantages)
    return advantages.float(), (advantages + v).float()


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(var + eps) over the True positions, population variance; 0 where masked.

    `shift_mean=False` adds the mean back afterwards. The statistics are those of the tensors given: give the full
    optimizer step's, never one rank's or one micro-batch's. Shapes: both `[...]`. Raises ValueError on shapes that
    differ and `eps` < 0.

    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    require_same_shape(x=x, mask=mask)
    require(eps >= 0, f"eps is {eps}; must be 0 or more")
    mask = as_mask(mask)
    count = mask.sum().clamp(min=1)
    mean = masked(x, mask).sum() / count
    deviation = torch.where(mask, masked(x, mask) - mean, 0.0)
    variance = deviation.square().sum() / count + eps
    result = deviation / torch.where(variance > 0, variance, 1.0).sqrt()
    return (result if shift_mean else torch.where(mask, result + mean, 0.0)).float()


def _by_group(rewards: Tensor, groups: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which samples are valid; their M rewards (float64), the number 0 … G − 1 of their group; each group's size."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else as_mask(valid, name="valid")
    require_same_shape(rewards=rewards, groups=groups, valid=valid)
    require_ids(groups, name="groups")
    r = rewards[valid].double()
    _require_finite(r)
    _, group, count = groups[valid].unique(return_inverse=True, return_counts=True)
    return valid, r, group, count


def _require_finite(rewards: Tensor) -> None:
    bad = int((~torch.isfinite(rewards)).sum())
    require(bad == 0, f"{bad} rewards of valid samples are NaN or infinite; mark what could not be scored as invalid")


def _sums(x: Tensor, group: Tensor, count: Tensor) -> Tensor:
    return x.new_zeros(len(count)).index_add(0, group, x)


def _flat(r: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Whether all rewards of the sample's group are the same number: exact, where a deviation of rounding is not."""
    lowest = r.new_zeros(len(count)).scatter_reduce(0, group, r, "amin", include_self=False)
    highest = r.new_zeros(len(count)).scatter_reduce(0, group, r, "amax", include_self=False)
    return (lowest == highest)[group]


def _spread(kept: Tensor, advantages: Tensor) -> Tensor:
    """The valid samples' advantages at their places, 0 for the others; float32."""
    result = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
    result[kept] = advantages.float()
    return result
