"""What the algorithms' tests share: samples with scores, and padded batches whose padding holds rubbish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from trainers.algorithms.base import Algorithm, LossOutput, PolicyTokens, Totals
from trainers.types import AnnotatedSample, Sample

Array = npt.NDArray[np.float64]
KL_COEF, MAX_TOKENS = 0.3, 9


def annotated(scored: Sequence[tuple[int, float | None]]) -> list[AnnotatedSample]:
    """Sample i has i % 3 + 2 tokens, the last two of them the policy's."""
    return [
        AnnotatedSample(
            sample=Sample(
                id=f"s{i}",
                group=group,
                tokens=np.zeros(i % 3 + 2, dtype=np.int32),
                mask=np.arange(i % 3 + 2) >= i % 3,
                rollout_logprobs=np.zeros(i % 3 + 2, dtype=np.float32),
                reward=math.nan if reward is None else reward,
                valid=reward is not None,
                policy_version=0,
            )
        )
        for i, (group, reward) in enumerate(scored)
    ]


@dataclass(frozen=True)
class Batch:
    """Padded rows, all `[B, T]`; `ids` names each row's sequence."""

    new: Array
    old: Array
    rollout: Array
    ref: Array
    advantages: Array
    mask: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]

    def rows(self, *chosen: int, width: int | None = None) -> Batch:
        """Some rows, wider by padding that holds rubbish."""
        out = []
        for field in fields(self):
            array = getattr(self, field.name)[list(chosen)]
            if width is not None:
                fill = {"mask": False, "ids": array[:, :1]}.get(field.name, math.nan)
                padding = np.empty((len(chosen), width - array.shape[1]), dtype=array.dtype)
                padding[:] = fill
                array = np.concatenate([array, padding], axis=1)
            out.append(array)
        return Batch(*out)

    @property
    def totals(self) -> Totals:
        return Totals(tokens=int(self.mask.sum()), sequences=int(self.mask.any(axis=1).sum()), max_tokens=MAX_TOKENS)


def make_batch(seed: int, rows: int = 6, width: int = 8) -> Batch:
    """Ratios from about 0.4 to 2.5, so that both clips act; float32 numbers, so that only arithmetic differs."""
    rng = np.random.default_rng(seed)
    new = -rng.gamma(2.0, size=(rows, width))
    lengths, prompts = rng.integers(5, width + 1, size=(rows, 1)), rng.integers(1, 4, size=(rows, 1))
    positions = np.arange(width)[None, :]
    mask = (positions >= prompts) & (positions < lengths)
    mask[1] = False  # an empty completion
    arrays = (
        new,
        new + rng.normal(0, 0.4, new.shape),
        new + rng.normal(0, 0.6, new.shape),
        new + rng.normal(0, 0.8, new.shape),
        np.broadcast_to(rng.normal(size=(rows, 1)), new.shape),
    )
    ids = np.broadcast_to(rng.permutation(rows)[:, None], new.shape)
    return Batch(*(a.astype(np.float32).astype(np.float64) for a in arrays), mask, ids)


def policy_tokens(batch: Batch, *, ref: bool = True, divergence: bool = False) -> PolicyTokens:
    """The batch as a loss sees it; a divergence, where wanted, is −new."""
    new, old, rollout, reference, advantages = (
        torch.tensor(getattr(batch, name), dtype=torch.float32)
        for name in ("new", "old", "rollout", "ref", "advantages")
    )
    return PolicyTokens(
        logprobs=new.requires_grad_(),
        entropy=torch.where(torch.tensor(batch.mask), 2.0, math.nan),
        mask=torch.tensor(batch.mask),
        sequence_ids=torch.tensor(batch.ids),
        rollout_logprobs=rollout,
        old_logprobs=old,
        ref_logprobs=reference if ref else None,
        advantages=advantages,
        divergence=-new if divergence else None,
    )


def run(
    algorithm: Algorithm, batch: Batch, totals: Totals, *, ref: bool = True, divergence: bool = False
) -> tuple[LossOutput, Array]:
    """The loss, and its gradient by `new`."""
    view = policy_tokens(batch, ref=ref, divergence=divergence)
    output = algorithm.loss(view, totals=totals, kl_coef=KL_COEF)
    output.loss.backward()
    assert view.logprobs.grad is not None
    return output, view.logprobs.grad.double().numpy()


@dataclass(frozen=True)
class Options:
    clip: tuple[float, float] = (0.2, 0.2)
    aggregation: str = "token"
    estimator: str = "k3"
    importance: tuple[str, float] | None = None  # level and cap
    floor: float | None = None
    band: tuple[float, float] | None = None
    dual_clip: float | None = None


def row_means(x: Array, mask: npt.NDArray[np.bool_]) -> Array:
    """Each row's mean over its True tokens, for each of its positions; rows without any get 0."""
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return np.broadcast_to(np.where(mask, x, 0).sum(axis=1, keepdims=True) / counts, mask.shape)


def weight_oracle(batch: Batch, options: Options) -> Array:
    assert options.importance is not None
    level, cap = options.importance
    log_weight = batch.old - batch.rollout
    weight = np.exp(row_means(log_weight, batch.mask) if level == "sequence" else log_weight)
    if options.band is not None:
        return np.where((weight >= options.band[0]) & (weight <= options.band[1]), weight, 0)
    return np.maximum(np.minimum(weight, cap), options.floor or 0)


def loss_oracle(batch: Batch, options: Options, *, ref: bool = True) -> tuple[float, Array]:
    """The loss over the whole optimizer step, and its gradient by each token's log-probability."""
    mask, advantages = batch.mask, batch.advantages
    ratio = np.exp(np.clip(batch.new - batch.old, -20, 20))
    inside = np.clip(ratio, 1 - options.clip[0], 1 + options.clip[1])
    surrogate = -np.minimum(ratio * advantages, inside * advantages)
    gradient = np.where(ratio * advantages <= inside * advantages, -ratio * advantages, 0)
    if options.dual_clip is not None:
        far = (advantages < 0) & (surrogate > -options.dual_clip * advantages)
        surrogate = np.where(far, -options.dual_clip * advantages, surrogate)
        gradient = np.where(far, 0, gradient)
    if options.importance is not None:
        weight = weight_oracle(batch, options)
        surrogate, gradient = surrogate * weight, gradient * weight
    if ref:
        d = batch.new - batch.ref
        penalty, slope = {
            "k2": (d**2 / 2, d),
            "k3": (np.exp(-d) + d - 1, 1 - np.exp(-d)),
        }[options.estimator]
        surrogate, gradient = surrogate + KL_COEF * penalty, gradient + KL_COEF * slope
    tokens, sequences = mask.sum(), mask.any(axis=1).sum()
    share = {
        "token": np.full(mask.shape, 1 / tokens),
        "sequence": 1 / np.maximum(mask.sum(axis=1, keepdims=True), 1) / sequences * np.ones(mask.shape),
        "constant": np.full(mask.shape, 1 / (sequences * MAX_TOKENS)),
    }[options.aggregation]
    share = np.where(mask, share, 0)
    return float((share * surrogate).sum()), share * gradient


def small(ratios: list[float], advantages: list[float], d: list[float], weights: list[float]) -> Batch:
    """One sequence; the last position is not the policy's and holds rubbish."""
    rubbish = math.nan
    row = np.array([[*np.log(ratios), rubbish]])
    return Batch(
        new=row,
        old=np.array([[0.0] * len(ratios) + [rubbish]]),
        rollout=np.array([[*(-np.log(weights)), rubbish]]),
        ref=row - np.array([[*d, rubbish]]),
        advantages=np.array([[*advantages, rubbish]]),
        mask=np.array([[True] * len(ratios) + [False]]),
        ids=np.zeros((1, len(ratios) + 1), dtype=np.int64),
    )
