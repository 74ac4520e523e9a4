"""GRPO against a float64 oracle written from SEMANTICS.md's formulas, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from trainers.algorithms.base import LossOutput, Mean, PolicyTokens, Totals
from trainers.algorithms.config import GRPOConfig
from trainers.algorithms.grpo import GRPO
from trainers.config import ImportanceConfig
from trainers.types import AnnotatedSample, Sample

Array = npt.NDArray[np.float64]
KL_COEF, MAX_TOKENS = 0.3, 9


def grpo(importance: dict[str, Any] | None = None, kl: dict[str, Any] | None = None, **options: Any) -> GRPO:
    config = GRPOConfig(type="grpo", kl=kl or {}, **options)  # type: ignore[arg-type]
    return GRPO(config, None if importance is None else ImportanceConfig(**importance))


# --- advantages -------------------------------------------------------------------------------------------------------

#  group, reward (None: could not be scored); groups are neither in order nor together
SCORED = [
    (7, 1.0),
    (2, 5.0),
    (7, 4.0),
    (2, None),
    (7, 1.5),
    (4, 2.0),
    (2, 9.0),
    (4, 2.0),
    (9, 3.0),
    (5, None),
    (9, None),
]


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


def advantage_oracle(scored: Sequence[tuple[int, float | None]], *, how: str) -> dict[str, float]:
    """The advantage of each valid sample, by its id."""
    valid = [(f"s{i}", g, r) for i, (g, r) in enumerate(scored) if r is not None]
    batch_std = np.std([r for _, _, r in valid], ddof=1)
    found = {}
    for id, group, reward in valid:
        peers = np.array([r for _, g, r in valid if g == group])
        if len(peers) < 2 or np.ptp(peers) == 0:
            found[id] = 0.0
        elif how == "leave_one_out":
            found[id] = reward - (peers.sum() - reward) / (len(peers) - 1)
        else:
            divisor = {"group": peers.std(ddof=1) + 1e-6, "batch": batch_std + 1e-6, "none": 1.0}[how]
            found[id] = (reward - peers.mean()) / divisor
    return found


HOWS = {
    "group": {},
    "batch": {"scale": "batch"},
    "none": {"scale": "none"},
    "leave_one_out": {"scale": "none", "advantage": "leave_one_out"},
}


@pytest.mark.parametrize("how", HOWS)
def test_advantages_match_the_oracle(how: str) -> None:
    expected = advantage_oracle(SCORED, how=how)
    found = grpo(**HOWS[how]).advantages(annotated(SCORED), kl_coef=KL_COEF)
    assert [s.sample.id for s in found] == list(expected)  # in order, those without a score left out
    for train in found:
        assert train.advantages.dtype == np.float32
        assert not train.advantages[~train.sample.mask].any()
        np.testing.assert_allclose(train.advantages[train.sample.mask], expected[train.sample.id], rtol=1e-6)


def test_advantages_by_hand() -> None:
    found = grpo().advantages(annotated([(0, 1.0), (0, 2.0), (0, 6.0)]), kl_coef=0)  # mean 3, std √7
    for train, deviation in zip(found, (-2, -1, 3), strict=True):
        assert train.advantages[-1] == pytest.approx(deviation / (math.sqrt(7) + 1e-6), rel=1e-6)
    found = grpo(**HOWS["leave_one_out"]).advantages(annotated([(0, 1.0), (0, 2.0), (0, 6.0)]), kl_coef=0)
    assert [float(s.advantages[-1]) for s in found] == [1 - 4.0, 2 - 3.5, 6 - 1.5]


@pytest.mark.parametrize("how", HOWS)
def test_advantages_do_not_depend_on_the_order_or_on_failed_samples(how: str) -> None:
    samples = annotated(SCORED)
    plain = {s.sample.id: s.advantages for s in grpo(**HOWS[how]).advantages(samples, kl_coef=0)}
    kept = [s for s in samples if s.sample.valid]
    for others in (samples[::-1], kept, kept[::-1]):
        for s in grpo(**HOWS[how]).advantages(others, kl_coef=0):
            np.testing.assert_array_equal(s.advantages, plain[s.sample.id])


def test_a_reference_is_needed_only_with_a_kl_term() -> None:
    assert grpo().needs == {"ref_logprobs"}
    assert grpo(kl={"coef": 0}).needs == frozenset()


# --- the loss ---------------------------------------------------------------------------------------------------------


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


def run(algorithm: GRPO, batch: Batch, totals: Totals, *, ref: bool = True) -> tuple[LossOutput, Array]:
    """The loss, and its gradient by `new`."""
    new, old, rollout, reference, advantages = (
        torch.tensor(getattr(batch, name), dtype=torch.float32)
        for name in ("new", "old", "rollout", "ref", "advantages")
    )
    new.requires_grad_()
    view = PolicyTokens(
        logprobs=new,
        entropy=torch.where(torch.tensor(batch.mask), 2.0, math.nan),
        mask=torch.tensor(batch.mask),
        sequence_ids=torch.tensor(batch.ids),
        rollout_logprobs=rollout,
        old_logprobs=old,
        ref_logprobs=reference if ref else None,
        advantages=advantages,
    )
    output = algorithm.loss(view, totals=totals, kl_coef=KL_COEF)
    output.loss.backward()
    assert new.grad is not None
    return output, new.grad.double().numpy()


@dataclass(frozen=True)
class Options:
    clip: tuple[float, float] = (0.2, 0.2)
    aggregation: str = "token"
    estimator: str = "k3"
    importance: tuple[str, float] | None = None

    def algorithm(self) -> GRPO:
        return grpo(
            None if self.importance is None else {"level": self.importance[0], "cap": self.importance[1]},
            {"estimator": self.estimator},
            clip_low=self.clip[0],
            clip_high=self.clip[1],
            aggregation=self.aggregation,
        )


def loss_oracle(batch: Batch, options: Options, *, ref: bool = True) -> tuple[float, Array]:
    """The loss over the whole optimizer step, and its gradient by each token's log-probability."""
    mask, advantages = batch.mask, batch.advantages
    ratio = np.exp(np.clip(batch.new - batch.old, -20, 20))
    inside = np.clip(ratio, 1 - options.clip[0], 1 + options.clip[1])
    surrogate = -np.minimum(ratio * advantages, inside * advantages)
    gradient = np.where(ratio * advantages <= inside * advantages, -ratio * advantages, 0)
    if options.importance is not None:
        level, cap = options.importance
        log_weight = batch.old - batch.rollout
        if level == "sequence":
            counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
            log_weight = np.broadcast_to((log_weight * mask).sum(axis=1, keepdims=True) / counts, mask.shape)
        weight = np.minimum(np.exp(log_weight), cap)
        surrogate, gradient = surrogate * weight, gradient * weight
    if ref:
        d = batch.new - batch.ref
        penalty, slope = {
            "k1": (d, np.ones_like(d)),
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


EVERY_OPTION = [
    Options(clip, aggregation, estimator, importance)
    for clip, aggregation, estimator, importance in itertools.product(
        [(0.2, 0.2), (0.1, 0.28)],
        ["token", "sequence", "constant"],
        ["k1", "k2", "k3"],
        [None, ("token", 1.1), ("sequence", 0.9)],
    )
]


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_the_loss_matches_the_oracle(options: Options) -> None:
    batch = make_batch(1)
    expected, expected_gradient = loss_oracle(batch, options)
    output, gradient = run(options.algorithm(), batch, batch.totals)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_without_a_reference_there_is_no_kl_term_and_no_kl_metric() -> None:
    batch = make_batch(2)
    expected, expected_gradient = loss_oracle(batch, Options(), ref=False)
    output, gradient = run(grpo(kl={"coef": 0}), batch, batch.totals, ref=False)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    assert set(output.metrics) == {"policy/clip_fraction", "policy/entropy"}


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("importance", [None, ("token", 2.0), ("sequence", 2.0)])
def test_the_gradient_does_not_depend_on_split_order_or_padding(
    aggregation: str, importance: tuple[str, float] | None
) -> None:
    algorithm = Options(aggregation=aggregation, importance=importance).algorithm()
    batch = make_batch(3)
    whole, gradient = run(algorithm, batch, batch.totals)
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1], [4, 2]], [[5, 4, 3, 2, 1, 0]]):
        loss, metrics = 0.0, dict[str, Mean]()
        for part in parts:
            output, found = run(algorithm, batch.rows(*part, width=11), batch.totals)
            np.testing.assert_allclose(found[:, :8], gradient[part], rtol=1e-6, atol=1e-12)
            assert not found[:, 8:].any()
            loss += output.loss.item()
            for name, mean in output.metrics.items():
                metrics[name] = metrics.get(name, Mean(0, 0)) + mean
        assert loss == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)
        assert {name: m.value for name, m in metrics.items()} == pytest.approx(
            {name: m.value for name, m in whole.metrics.items()}, rel=1e-6
        )


def test_a_micro_batch_without_a_chosen_token_adds_nothing() -> None:
    batch = make_batch(3)
    output, gradient = run(Options(importance=("token", 2.0)).algorithm(), batch.rows(1), batch.totals)
    assert output.loss.item() == 0
    assert not gradient.any()
    assert all(mean == Mean(0, 0) for mean in output.metrics.values())


# --- metrics by hand --------------------------------------------------------------------------------------------------


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


def test_metrics_by_hand() -> None:
    #                above, A > 0   above, A < 0   below, A > 0   below, A < 0   inside
    batch = small([1.4, 1.4, 0.6, 0.6, 1.1], [1, -1, 1, -1, 1], [0.5, -0.25, 0, 25, 0.25], [0.5, 3, 0.7, 0.9, 1])
    algorithm = grpo({"cap": 0.7}, clip_low=0.3, clip_high=0.3)
    metrics = run(algorithm, batch, batch.totals)[0].metrics
    assert metrics["policy/clip_fraction"] == Mean(2, 5)  # where the clip takes the gradient away
    assert metrics["policy/entropy"] == Mean(10, 5)
    assert metrics["importance/clipped_fraction"] == Mean(4, 5)  # 0.7 itself is at the cap
    assert metrics["kl/mean"].count == 5
    assert metrics["kl/mean"].value == pytest.approx(25.5 / 5, rel=1e-6)  # k1, not limited
    assert metrics["kl/limited_fraction"].value == pytest.approx(1 / 5)


def test_the_loss_by_hand() -> None:
    batch = small([1.4, 0.6], [1, -1], [math.log(2), 0], [1, 1])
    output, gradient = run(grpo(clip_low=0.3, clip_high=0.3), batch, batch.totals)
    #  −1.3 and +0.7, both clipped; k3 of d = ln 2 is ½ + ln 2 − 1
    assert output.loss.item() == pytest.approx((-1.3 + 0.7 + KL_COEF * (math.log(2) - 0.5)) / 2, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([KL_COEF * 0.5 / 2, 0, 0], rel=1e-6)


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    batch = small([1, 1, 1], [0.5, -2, 1], [0, 0, 0], [1, 1, 1])
    output, gradient = run(grpo(), batch, batch.totals)
    assert output.loss.item() == pytest.approx(0.5 / 3)
    assert gradient[0].tolist() == pytest.approx([-0.5 / 3, 2 / 3, -1 / 3, 0], rel=1e-6)
    assert output.metrics["policy/clip_fraction"] == Mean(0, 3)


def test_a_nan_of_the_policy_is_not_hidden() -> None:
    batch = small([1, math.nan], [1, 1], [0, 0], [1, 1])
    output, _ = run(grpo(), batch, batch.totals)
    assert math.isnan(output.loss.item())
    assert math.isnan(output.metrics["kl/mean"].value)
