"""The options of GRPO and PPO that are variants of their own: GSPO, dual clip, length, KL in the reward, importance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.batches import Array, Batch, Options, annotated, loss_oracle, make_batch, run, small, weight_oracle
from trainers.algorithms.base import Mean
from trainers.algorithms.config import GRPOConfig, PPOConfig
from trainers.algorithms.grpo import GRPO
from trainers.algorithms.ppo import PPO
from trainers.algorithms.terms import require_kept
from trainers.config import ImportanceConfig
from trainers.types import AnnotatedSample

NO_KL = {"coef": 0}
IN_REWARD = {"placement": "reward", "estimator": "k1"}


def grpo(importance: dict[str, Any] | None = None, **options: Any) -> GRPO:
    config = GRPOConfig(type="grpo", **{"kl": NO_KL, **options})
    return GRPO(config, None if importance is None else ImportanceConfig(**importance))


# --- the sequence's ratio (GSPO) --------------------------------------------------------------------------------------


def gspo_oracle(batch: Batch, *, low: float, high: float, per: str) -> tuple[float, Array]:
    """Equation 5 of the paper in float64, every sequence's term by autograd; weighted by length for `per="token"`."""
    new = torch.tensor(batch.new, requires_grad=True)
    old, terms, weights = torch.tensor(batch.old), [], []
    for row, mask in enumerate(torch.tensor(batch.mask)):
        if not mask.any():
            continue
        ratio = (new[row][mask] - old[row][mask]).mean().exp()
        advantage = float(batch.advantages[row, 0])
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
        weights.append(float(mask.sum()) if per == "token" else 1.0)
    loss = torch.stack(terms) @ torch.tensor(weights, dtype=torch.float64) / sum(weights)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.numpy()


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (3e-4, 4e-4), (0.9, 5.0)])
def test_value_and_gradient_are_gspos(per: str, low: float, high: float) -> None:
    batch = make_batch(7, rows=12)
    expected, expected_gradient = gspo_oracle(batch, low=low, high=high, per=per)
    algorithm = grpo(ratio="sequence", aggregation=per, clip_low=low, clip_high=high)
    output, gradient = run(algorithm, batch, batch.totals, ref=False)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_the_sequences_ratio_is_what_is_clipped() -> None:
    #  geometric mean of 2 and ½ is 1, of 2 and 1 is √2
    same, above = small([2, 0.5], [1, 1], [0, 0], [1, 1]), small([2, 1], [1, 1], [0, 0], [1, 1])
    output, gradient = run(grpo(ratio="sequence"), same, same.totals)
    assert output.loss.item() == pytest.approx(-1)
    assert gradient[0].tolist() == pytest.approx([-0.5, -0.5, 0])
    assert output.metrics["policy/clip_fraction"] == Mean(0, 2)
    output, gradient = run(grpo(ratio="sequence"), above, above.totals)
    assert output.loss.item() == pytest.approx(-1.2)
    assert not gradient.any()
    assert output.metrics["policy/clip_fraction"] == Mean(2, 2)


def test_the_sequences_ratio_does_not_depend_on_split_order_or_padding() -> None:
    batch, algorithm = make_batch(3), grpo(ratio="sequence", clip_low=0.5, clip_high=1.0)
    whole, gradient = run(algorithm, batch, batch.totals)
    loss = 0.0
    for part in ([5, 0, 3], [1], [4, 2]):
        output, found = run(algorithm, batch.rows(*part, width=11), batch.totals)
        np.testing.assert_allclose(found[:, :8], gradient[part], rtol=1e-6, atol=1e-12)
        assert not found[:, 8:].any()
        loss += output.loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)


def test_a_nan_of_one_token_is_not_hidden_by_the_sequences_mean() -> None:
    batch = small([1, math.nan], [1, 1], [0, 0], [1, 1])
    assert math.isnan(run(grpo(ratio="sequence"), batch, batch.totals)[0].loss.item())


# --- dual clip --------------------------------------------------------------------------------------------------------


def test_dual_clip_matches_the_oracle() -> None:
    batch = make_batch(8)
    batch = replace(batch, advantages=np.random.default_rng(9).normal(size=batch.mask.shape))
    for limit in (1.05, 1.5, 3.0):
        expected, expected_gradient = loss_oracle(batch, Options(dual_clip=limit), ref=False)
        for algorithm in (
            grpo(dual_clip=limit),
            PPO(PPOConfig.model_validate({"type": "ppo", "kl": NO_KL, "dual_clip": limit})),
        ):
            output, gradient = run(algorithm, batch, batch.totals, ref=False)
            assert output.loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
            np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
            dead = expected_gradient[batch.mask] == 0
            assert output.metrics["policy/clip_fraction"] == Mean(dead.sum(), dead.size)


def test_dual_clip_by_hand() -> None:
    batch = small([5, 5, 2], [-1, 1, -1], [0, 0, 0], [1, 1, 1])
    output, gradient = run(grpo(dual_clip=3), batch, batch.totals)
    assert output.loss.item() == pytest.approx((3 - 1.2 + 2) / 3)  # 5 falls to 3 where A < 0
    assert gradient[0].tolist() == pytest.approx([0, 0, 2 / 3, 0])
    assert output.metrics["policy/clip_fraction"] == Mean(2, 3)


# --- overlong ---------------------------------------------------------------------------------------------------------


def test_the_overlong_pay_before_the_group_is_compared() -> None:
    options = {"overlong": {"max_tokens": 2, "buffer_tokens": 2, "penalty": 0.5}, "scale": "none"}
    samples = annotated([(0, 1.0), (0, 2.0), (0, None)])
    short = samples[0].sample  # one of its two tokens is left to the policy
    samples[0] = AnnotatedSample(sample=replace(short, mask=np.array([False, True])))
    found = grpo(**options).advantages(samples, kl_coef=0)
    #  1 − 0.25 and 2 − 0.5: mean 1.125
    assert [float(s.advantages[-1]) for s in found] == [-0.375, 0.375]
    assert [s.sample.reward for s in found] == [1.0, 2.0]  # what is shown stays


# --- KL in the reward -------------------------------------------------------------------------------------------------


def with_kl(sample: AnnotatedSample, k1: list[float]) -> AnnotatedSample:
    old = np.full(len(k1), -3, dtype=np.float32)
    return AnnotatedSample(sample=sample.sample, old_logprobs=old, ref_logprobs=old - np.array(k1, dtype=np.float32))


@pytest.mark.parametrize("options", [{"scale": "none"}, {"scale": "none", "advantage": "leave_one_out"}, {}])
def test_kl_in_the_reward_by_hand(options: dict[str, Any]) -> None:
    algorithm = grpo(kl=IN_REWARD, **options)
    assert algorithm.needs == {"ref_logprobs", "old_logprobs"}
    first, second, failed = annotated([(0, 1.0), (0, 2.0), (0, None)])
    samples = [
        with_kl(first, [0.5, 1.5]),
        with_kl(second, [math.nan, 4, 6]),  # the prompt's is never read
        with_kl(failed, [math.nan] * 4),
    ]
    found = algorithm.advantages(samples, kl_coef=0.5)
    #  1 − 0.5·2 = 0 and 2 − 0.5·10 = −3: the better rewarded is the worse
    expected = {"none": 1.5, "group": 1.5 / (3 / math.sqrt(2) + 1e-6)}[algorithm.config.scale]
    expected *= 2 if algorithm.config.advantage == "leave_one_out" else 1
    assert [float(s.advantages[-1]) for s in found] == pytest.approx([expected, -expected], rel=1e-6)
    assert [s.sample.reward for s in found] == [1.0, 2.0]


def test_kl_in_the_reward_is_not_in_the_loss_but_measured() -> None:
    batch = make_batch(4)
    without, plain = run(grpo(), batch, batch.totals, ref=False)
    output, gradient = run(grpo(kl=IN_REWARD), batch, batch.totals)
    assert output.loss.item() == without.loss.item()
    np.testing.assert_array_equal(gradient, plain)
    assert output.metrics["kl/mean"].value == pytest.approx((batch.new - batch.ref)[batch.mask].mean(), rel=1e-5)
    assert "kl/limited_fraction" not in output.metrics  # k3's


# --- importance: floor and band ---------------------------------------------------------------------------------------

LIMITS: list[dict[str, Any]] = [{"floor": 0.8}, {"band": (0.7, 1.4)}, {"band": (0.0, 1.0)}]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_floor_and_band_match_the_oracle(limits: dict[str, Any], level: str) -> None:
    batch = make_batch(6, rows=12)
    options = Options(importance=(level, 1.3), **limits)
    expected, expected_gradient = loss_oracle(batch, options)
    algorithm = grpo({"level": level, "cap": 1.3, **limits}, kl={})
    output, gradient = run(algorithm, batch, batch.totals)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    weight = weight_oracle(batch, options)[batch.mask]
    if "band" in limits:
        assert output.metrics["importance/kept"] == Mean((weight > 0).sum(), weight.size)
        at_limit = weight == 0
    else:
        assert "importance/kept" not in output.metrics
        at_limit = (weight == 1.3) | (weight == 0.8)
    assert 0 < at_limit.sum() < at_limit.size
    assert output.metrics["importance/clipped_fraction"] == Mean(at_limit.sum(), at_limit.size)
    assert output.metrics["importance/weight"].value == pytest.approx(weight.mean(), rel=1e-6)
    assert output.metrics["importance/weight_squared"].value == pytest.approx((weight**2).mean(), rel=1e-6)


def test_a_band_that_leaves_nothing_is_an_error() -> None:
    batch = small([1, 1], [1, -1], [0, 0], [4.0, 0.1])
    with pytest.raises(ValueError, match=r"importance_correction.band leaves none of the 2 tokens"):
        run(grpo({"band": (0.5, 2.0)}), batch, batch.totals)
    one_left = small([1, 1], [1, -1], [0, 0], [4.0, 1.0])
    output, gradient = run(grpo({"band": (0.5, 2.0)}), one_left, one_left.totals)
    assert output.metrics["importance/kept"] == Mean(1, 2)
    assert gradient[0].tolist() == [0, 0.5, 0]


def test_a_micro_batch_of_a_step_may_be_left_with_nothing_but_the_step_may_not() -> None:
    batch = small([1, 1], [1, -1], [0, 0], [4.0, 0.1])
    step = replace(batch.totals, tokens=4)
    output, gradient = run(grpo({"band": (0.5, 2.0)}), batch, step)
    assert output.loss.item() == 0
    assert not gradient.any()
    with pytest.raises(ValueError, match="none of the 2 tokens"):
        require_kept(output.metrics)
    require_kept({"importance/kept": output.metrics["importance/kept"] + Mean(1, 2)})  # the other half kept one
    require_kept({})
    require_kept({"importance/kept": Mean(0, 0)})  # no token, nothing removed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 1.0, "floor": 1.5}, "floor 1.5 is above the cap 1"),
        ({"floor": -0.1}, "greater than or equal to 0"),
        ({"band": (0.5, 2.0), "floor": 0.1}, "leave out one of the two"),
        ({"band": (2.0, 0.5)}, "must include 1"),
        ({"band": (1.5, 2.0)}, "must include 1"),
        ({"band": (-1.0, 2.0)}, "must include 1"),
        ({"band": (math.nan, 2.0)}, "must include 1"),
    ],
)
def test_importance_limits_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportanceConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": {"placement": "reward"}}, "set algorithm.kl.estimator: k1"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"overlong": {"max_tokens": 8, "buffer_tokens": 9}}, "set it to max_tokens \\(8\\) or less"),
        ({"overlong": {"buffer_tokens": 9}}, "max_tokens"),
        ({"overlong": {"max_tokens": 8, "buffer_tokens": 0}}, "greater than or equal to 1"),
        ({"ratio": "group"}, "token"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(type="grpo", **options)
