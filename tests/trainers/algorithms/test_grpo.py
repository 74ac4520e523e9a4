"""GRPO against a float64 oracle written from SEMANTICS.md's formulas, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.batches import KL_COEF, Options, annotated, loss_oracle, make_batch, run, small
from trainers.algorithms.base import Mean
from trainers.algorithms.config import GRPOConfig
from trainers.algorithms.grpo import GRPO
from trainers.config import ImportanceConfig


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


def algorithm_of(options: Options) -> GRPO:
    return grpo(
        None if options.importance is None else {"level": options.importance[0], "cap": options.importance[1]},
        {"estimator": options.estimator},
        clip_low=options.clip[0],
        clip_high=options.clip[1],
        aggregation=options.aggregation,
    )


EVERY_OPTION = [
    Options(clip, aggregation, estimator, importance)
    for clip, aggregation, estimator, importance in itertools.product(
        [(0.2, 0.2), (0.1, 0.28)],
        ["token", "sequence", "constant"],
        ["k2", "k3"],
        [None, ("token", 1.1), ("sequence", 0.9)],
    )
]


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_the_loss_matches_the_oracle(options: Options) -> None:
    batch = make_batch(1)
    expected, expected_gradient = loss_oracle(batch, options)
    output, gradient = run(algorithm_of(options), batch, batch.totals)
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
    algorithm = algorithm_of(Options(aggregation=aggregation, importance=importance))
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
    output, gradient = run(algorithm_of(Options(importance=("token", 2.0))), batch.rows(1), batch.totals)
    assert output.loss.item() == 0
    assert not gradient.any()
    assert all(mean == Mean(0, 0) for mean in output.metrics.values())


# --- metrics by hand --------------------------------------------------------------------------------------------------


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
