"""PPO against float64 oracles written from SEMANTICS.md's formulas, and against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.batches import KL_COEF, Array, Options, loss_oracle, make_batch, run
from trainers.algorithms.base import VALUE_MOMENTS, LossOutput, Mean, Totals, ValueTokens
from trainers.algorithms.config import PPOConfig
from trainers.algorithms.ppo import PPO, explained_variance
from trainers.config import ImportanceConfig
from trainers.types import AnnotatedSample, Sample

IN_LOSS = {"placement": "loss", "estimator": "k3"}


def ppo(importance: dict[str, Any] | None = None, **options: Any) -> PPO:
    config = PPOConfig(type="ppo", **options)
    return PPO(config, None if importance is None else ImportanceConfig(**importance))


def test_needs() -> None:
    assert ppo().needs == {"values", "ref_logprobs", "old_logprobs"}
    assert ppo(kl=IN_LOSS).needs == {"values", "ref_logprobs"}
    assert ppo(kl={"coef": 0}).needs == {"values"}


# --- advantages -------------------------------------------------------------------------------------------------------


def sample(
    mask: Sequence[int], reward: float | None, *, values: Sequence[float], k1: Sequence[float], id: str = "s"
) -> AnnotatedSample:
    """A sample whose old log-probabilities are −2 and whose reference is k1 below them."""
    array = lambda x: np.array(x, dtype=np.float32)  # noqa: E731
    return AnnotatedSample(
        sample=Sample(
            id=id,
            group=0,
            tokens=np.zeros(len(mask), dtype=np.int32),
            mask=np.array(mask, dtype=np.bool_),
            rollout_logprobs=array([0.0] * len(mask)),
            reward=math.nan if reward is None else reward,
            valid=reward is not None,
            policy_version=0,
        ),
        old_logprobs=array([-2.0] * len(mask)),
        ref_logprobs=array([-2.0 - d for d in k1]),
        values=array(values),
    )


def random_samples(seed: int) -> list[AnnotatedSample]:
    """Eight samples of 4 to 11 tokens with holes in their masks; the fourth has no score, the sixth no token."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(8):
        length = int(rng.integers(4, 12))
        mask = (np.arange(length) >= 2) & (rng.random(length) < 0.8) if i != 5 else np.zeros(length, dtype=np.bool_)
        values, k1 = rng.normal(size=(2, length))
        values[~mask] = math.nan  # never read
        reward = None if i == 3 else float(rng.normal())
        found.append(sample(mask.astype(int).tolist(), reward, values=values.tolist(), k1=k1.tolist(), id=f"s{i}"))
    return found


def gae_oracle(annotated: AnnotatedSample, *, coef: float, gamma: float, lam: float) -> tuple[Array, Array]:
    """Advantages before whitening and returns at the True positions, from the last to the first."""
    at = np.flatnonzero(annotated.sample.mask)
    assert annotated.old_logprobs is not None
    assert annotated.ref_logprobs is not None
    assert annotated.values is not None
    k1 = annotated.old_logprobs[at].astype(np.float64) - annotated.ref_logprobs[at]
    values = annotated.values[at].astype(np.float64)
    advantages = np.zeros(len(at))
    value, advantage = 0.0, 0.0
    for t in reversed(range(len(at))):
        reward = -coef * k1[t] + (annotated.sample.reward if t == len(at) - 1 else 0.0)
        advantage = reward + gamma * value - values[t] + gamma * lam * advantage
        advantages[t], value = advantage, values[t]
    return advantages, advantages + values


@pytest.mark.parametrize(("kl", "coef"), [({}, KL_COEF), (IN_LOSS, 0.0), ({"coef": 0}, 0.0)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_advantages_match_the_oracle(kl: dict[str, Any], coef: float, gamma: float, lam: float) -> None:
    samples = random_samples(1)
    kept = [s for s in samples if s.sample.valid]
    raw = [gae_oracle(s, coef=coef, gamma=gamma, lam=lam) for s in kept]
    every = np.concatenate([advantages for advantages, _ in raw])
    kl_coef = 0.0 if kl.get("coef") == 0 else KL_COEF
    found = ppo(kl=kl, gamma=gamma, lam=lam).advantages(samples, kl_coef=kl_coef)
    assert [s.sample.id for s in found] == [s.sample.id for s in kept]
    for train, (advantages, returns) in zip(found, raw, strict=True):
        mask = train.sample.mask
        assert train.returns is not None
        assert (train.advantages.dtype, train.returns.dtype) == (np.float32, np.float32)
        whitened = (advantages - every.mean()) / np.sqrt(every.var() + 1e-8)
        np.testing.assert_allclose(train.advantages[mask], whitened, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(train.returns[mask], returns, rtol=1e-5, atol=1e-6)
        assert not train.advantages[~mask].any()
        assert not train.returns[~mask].any()


def test_advantages_by_hand() -> None:
    #  rewards −0.5·2 and −0.5·4 + 3; δ₂ = 1 − 0.5, δ₁ = −1 + 0.5 − 1; A₁ = δ₁ + ½·δ₂ = −1.25
    one = sample([0, 1, 1], 3.0, values=[9, 1.0, 0.5], k1=[9, 2, 4])
    failed = sample([0, 1], None, values=[5, 5], k1=[5, 5])
    (found,) = ppo(lam=0.5).advantages([one, failed], kl_coef=0.5)
    assert found.returns is not None
    assert found.returns.tolist() == [0, -0.25, 1.0]
    assert found.advantages.tolist() == pytest.approx([0, -1, 1], rel=1e-6)  # −1.25 and 0.5: mean −0.375, std 0.875


def test_advantages_do_not_depend_on_the_order_or_on_failed_samples() -> None:
    samples = random_samples(2)
    plain = {s.sample.id: s for s in ppo().advantages(samples, kl_coef=KL_COEF)}
    kept = [s for s in samples if s.sample.valid]
    for others in (samples[::-1], kept, kept[::-1]):
        for s in ppo().advantages(others, kl_coef=KL_COEF):
            np.testing.assert_allclose(s.advantages, plain[s.sample.id].advantages, rtol=1e-6)
            np.testing.assert_array_equal(s.returns, plain[s.sample.id].returns)  # type: ignore[arg-type]


def test_without_a_valid_sample_nothing_is_trained_on() -> None:
    assert ppo().advantages([sample([0, 1], None, values=[0, 0], k1=[0, 0])], kl_coef=0.1) == []


# --- the policy's loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [None, ("token", 1.1), ("sequence", 0.9)])
@pytest.mark.parametrize("estimator", [None, "k2", "k3"])
def test_the_loss_matches_the_oracle(importance: tuple[str, float] | None, estimator: str | None) -> None:
    batch = make_batch(5)
    batch = replace(batch, advantages=np.random.default_rng(6).normal(size=batch.mask.shape))
    weights = None if importance is None else {"level": importance[0], "cap": importance[1]}
    kl = {} if estimator is None else {"placement": "loss", "estimator": estimator}
    algorithm = ppo(weights, kl=kl, clip_low=0.1, clip_high=0.28)
    options = Options(clip=(0.1, 0.28), estimator=estimator or "k3", importance=importance)
    expected, expected_gradient = loss_oracle(batch, options, ref=estimator is not None)
    output, gradient = run(algorithm, batch, batch.totals)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    kl_mean = (batch.new - batch.ref)[batch.mask].mean()  # measured in both placements
    assert output.metrics["kl/mean"].value == pytest.approx(kl_mean, rel=1e-5)
    assert ("kl/limited_fraction" in output.metrics) == (estimator == "k3")
    ratio = np.exp(batch.new - batch.old)
    clipped = np.where(batch.advantages > 0, ratio > 1.28, ratio < 0.9)[batch.mask]
    assert output.metrics["policy/clip_fraction"] == Mean(clipped.sum(), clipped.size)
    assert output.metrics["policy/entropy"].value == 2.0


def test_the_gradient_does_not_depend_on_split_order_or_padding() -> None:
    batch = make_batch(3)
    whole, gradient = run(ppo(kl=IN_LOSS), batch, batch.totals)
    loss = 0.0
    for part in ([5, 0, 3], [1], [4, 2]):
        output, found = run(ppo(kl=IN_LOSS), batch.rows(*part, width=11), batch.totals)
        np.testing.assert_allclose(found[:, :8], gradient[part], rtol=1e-6, atol=1e-12)
        assert not found[:, 8:].any()
        loss += output.loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)


# --- the critic's loss ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Critic:
    values: Array
    old: Array
    returns: Array
    mask: npt.NDArray[np.bool_]

    def rows(self, *chosen: int) -> Critic:
        """Some rows, wider by padding that holds rubbish."""
        wide = [np.pad(a[list(chosen)], ((0, 0), (0, 3)), constant_values=math.nan) for a in self._numbers()]
        return Critic(*wide, np.pad(self.mask[list(chosen)], ((0, 0), (0, 3))))

    def _numbers(self) -> tuple[Array, Array, Array]:
        return self.values, self.old, self.returns

    @property
    def totals(self) -> Totals:
        return Totals(tokens=int(self.mask.sum()), sequences=len(self.mask), max_tokens=1)

    def run(self, algorithm: PPO, totals: Totals) -> tuple[LossOutput, Array]:
        values, old, returns = (torch.tensor(a, dtype=torch.float32) for a in self._numbers())
        values.requires_grad_()
        view = ValueTokens(
            values=values,
            old_values=old,
            returns=returns,
            mask=torch.tensor(self.mask),
            sequence_ids=torch.arange(len(self.mask))[:, None].expand(self.mask.shape),
        )
        output = algorithm.value_loss(view, totals=totals)
        output.loss.backward()
        assert values.grad is not None
        return output, values.grad.double().numpy()


def make_critic(seed: int) -> Critic:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(3, 6, 8)).astype(np.float32).astype(np.float64)
    mask = rng.random((6, 8)) < 0.7
    mask[2] = False
    return Critic(*numbers, mask)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_the_value_loss_matches_the_oracle(clip: float | None) -> None:
    critic = make_critic(1)
    error = critic.values - critic.returns
    per_token, slope = error**2 / 2, error
    if clip is not None:
        moved = critic.values - critic.old
        clipped = critic.old + np.clip(moved, -clip, clip) - critic.returns
        slope = np.where(error**2 >= clipped**2, error, np.where(np.abs(moved) <= clip, clipped, 0))
        per_token = np.maximum(error**2, clipped**2) / 2
    tokens = critic.mask.sum()
    output, gradient = critic.run(ppo(value_clip=clip), critic.totals)
    assert output.loss.item() == pytest.approx(per_token[critic.mask].mean(), rel=1e-6)
    np.testing.assert_allclose(gradient, np.where(critic.mask, slope / tokens, 0), rtol=1e-5, atol=1e-9)
    assert output.metrics["value/loss"].value == pytest.approx(per_token[critic.mask].mean(), rel=1e-6)
    assert output.metrics["value/loss"].count == tokens


def test_the_value_loss_by_hand() -> None:
    critic = Critic(*(np.array([row]) for row in ([1.0, 0.1], [0.0, 0.0], [1.0, 1.0])), np.array([[True, True]]))
    #  V = 1 moved by 1, clipped to 0.2: ½·0.8²; V = 0.1 moved within the clip: ½·0.9²
    output, gradient = critic.run(ppo(), critic.totals)
    assert output.loss.item() == pytest.approx((0.32 + 0.405) / 2, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0, -0.45], rel=1e-6)
    output, gradient = critic.run(ppo(value_clip=None), critic.totals)
    assert output.loss.item() == pytest.approx(0.405 / 2, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0, -0.45], rel=1e-6)


def test_the_critics_gradient_and_moments_do_not_depend_on_split_order_or_padding() -> None:
    critic = make_critic(2)
    whole, gradient = critic.run(ppo(), critic.totals)
    loss, metrics = 0.0, dict[str, Mean]()
    for part in ([5, 0, 3], [2], [4, 1]):
        output, found = critic.rows(*part).run(ppo(), critic.totals)
        np.testing.assert_allclose(found[:, :8], gradient[part], rtol=1e-6, atol=1e-12)
        assert not found[:, 8:].any()
        loss += output.loss.item()
        for name, mean in output.metrics.items():
            metrics[name] = metrics.get(name, Mean(0, 0)) + mean
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    returns, old = critic.returns[critic.mask], critic.old[critic.mask]
    expected = 1 - np.var(returns - old) / np.var(returns)
    assert explained_variance(metrics) == pytest.approx(expected, rel=1e-9)
    assert explained_variance(whole.metrics) == pytest.approx(expected, rel=1e-9)


def test_explained_variance_by_hand() -> None:
    def of(returns: list[float], old: list[float]) -> float | None:
        critic = Critic(*(np.array([row]) for row in (old, old, returns)), np.array([[True] * len(old)]))
        return explained_variance(critic.run(ppo(), critic.totals)[0].metrics)

    assert of([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    assert of([1, 2, 3], [6, 7, 8]) == pytest.approx(1)  # a constant error is no variance
    assert of([1, 2, 3], [2, 2, 2]) == pytest.approx(0)
    assert of([1, 2, 3], [3, 2, 1]) == pytest.approx(-3)  # errors −2, 0, 2: 8/3 over 2/3
    assert of([2, 2, 2], [0, 0.5, 1]) is None  # returns that are all the same explain nothing
    assert of([0.7] * 333, [0, 0.5, 1] * 111) is None  # nor does the rounding of their moments
    assert explained_variance({}) is None
    assert explained_variance(dict.fromkeys(VALUE_MOMENTS, Mean(0, 0))) is None
