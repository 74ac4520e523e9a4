"""Advantages against hand calculations and a plain numpy oracle in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers.advantages import gae, group_advantages, leave_one_out_advantages, whiten

NAN, INF = float("nan"), float("inf")
BIG = 2**63 - 1  # the largest id


def group_oracle(rewards, groups, valid, scale, eps=1e-6):
    rewards, groups, valid = np.asarray(rewards, np.float64), np.asarray(groups), np.asarray(valid)
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        mates = rewards[valid & (groups == groups[i])]
        if not valid[i] or len(mates) < 2 or np.all(mates == mates[0]):
            continue
        std = {"group": lambda m=mates: m.std(ddof=1), "batch": lambda: rewards[valid].std(ddof=1), "none": None}[scale]
        out[i] = (rewards[i] - mates.mean()) / (std() + eps if std else 1.0)
    return out


def gae_oracle(rewards, values, mask, gamma, lam):
    """The textbook's loop, over the True positions only."""
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    next_value = running = 0.0
    for t in reversed([t for t in range(len(mask)) if mask[t]]):
        running = rewards[t] + gamma * next_value - values[t] + gamma * lam * running
        next_value = values[t]
        advantages[t], returns[t] = running, running + values[t]
    return advantages, returns


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


# --- group_advantages -------------------------------------------------------------------------------------------------


def test_group_scale_by_hand():
    # group 3: rewards 0, 0, 3: mean 1, variance (1 + 1 + 4)/2 = 3; group -9: rewards 2, 4: mean 3, variance 2
    got = group_advantages(t(0, 2, 0, 4, 3), torch.tensor([3, -9, 3, -9, 3]))
    s, u = math.sqrt(3) + 1e-6, math.sqrt(2) + 1e-6
    torch.testing.assert_close(got, t(-1 / s, -1 / u, -1 / s, 1 / u, 2 / s))


def test_batch_scale_counts_singletons_and_flat_groups():
    # all valid rewards: 1, 3 | 5, 5 | 6: mean 4, variance (9 + 1 + 1 + 1 + 4)/4 = 4, std 2
    got = group_advantages(t(1, 3, 5, 5, 6), torch.tensor([0, 0, 1, 1, 2]), scale="batch", eps=0.0)
    assert got.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0]


def test_invalid_samples_enter_nothing():
    rewards, groups = t(1, NAN, 3, INF, 100), torch.tensor([0, 0, 0, 1, 1])
    valid = torch.tensor([True, False, True, False, False])
    for scale, expected in (("none", 1.0), ("group", 1 / math.sqrt(2)), ("batch", 1 / math.sqrt(2))):
        got = group_advantages(rewards, groups, scale=scale, valid=valid, eps=0.0)
        torch.testing.assert_close(got, t(-expected, 0, expected, 0, 0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e30, -7.7])
def test_equal_rewards_get_exactly_zero(scale, reward):
    # the float mean of three 0.1 is not 0.1; the result must be 0 all the same
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([1] * 7 + [2, 2])
    assert group_advantages(rewards, groups, scale=scale)[:7].tolist() == [0.0] * 7
    assert leave_one_out_advantages(rewards, groups)[:7].tolist() == [0.0] * 7


def test_one_sample_and_none():
    for f in (group_advantages, leave_one_out_advantages):
        assert f(t(5.0), torch.tensor([1])).tolist() == [0.0]
        assert f(t(), torch.tensor([], dtype=torch.int64)).shape == (0,)
    assert group_advantages(t(5.0), torch.tensor([1]), scale="batch", eps=0.0).tolist() == [0.0]


samples = st.lists(
    st.tuples(st.integers(-20, 20).map(lambda n: n / 4), st.sampled_from([-BIG - 1, -1, 0, 7, BIG]), st.booleans()),
    min_size=1,
    max_size=24,
)


@settings(deadline=None, max_examples=60)
@given(samples, st.sampled_from(["group", "batch", "none"]), st.randoms())
def test_group_advantages_match_oracle_in_any_order(rows, scale, random):
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    got = group_advantages(t(*rewards), torch.tensor(groups), scale=scale, valid=torch.tensor(valid))
    np.testing.assert_allclose(got.numpy(), group_oracle(rewards, groups, valid, scale), rtol=1e-6, atol=1e-7)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = group_advantages(
        t(*rewards)[order], torch.tensor(groups)[order], scale=scale, valid=torch.tensor(valid)[order]
    )
    torch.testing.assert_close(shuffled, got[order], rtol=1e-6, atol=1e-7)


def test_low_precision_and_integers_are_computed_in_full():
    rewards = torch.tensor([0, 1, 1, 1])
    expected = t(*group_oracle(rewards, [0] * 4, [True] * 4, "group"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        got = group_advantages(rewards.to(dtype), torch.zeros(4, dtype=torch.int64))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


# --- leave_one_out ----------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # the others' means: of 1: (2 + 6)/2 = 4; of 2: 3.5; of 6: 1.5; the singleton and the invalid one get 0
    got = leave_one_out_advantages(
        t(1, 9, 2, NAN, 6), torch.tensor([5, 0, 5, 5, 5]), valid=torch.tensor([True, True, True, False, True])
    )
    assert got.tolist() == [-3.0, 0.0, -1.5, 0.0, 4.5]


@settings(deadline=None, max_examples=40)
@given(samples)
def test_leave_one_out_is_n_over_n_minus_1_of_unscaled_group_advantages(rows):
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    got = leave_one_out_advantages(t(*rewards), torch.tensor(groups), valid=torch.tensor(valid))
    sizes = np.array([sum(v for g, v in zip(groups, valid, strict=True) if g == own) for own in groups])
    expected = group_oracle(rewards, groups, valid, "none") * sizes / np.maximum(sizes - 1, 1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-7)


# --- gae --------------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # δ = (0 + .9·2 − 1, 0 + .9·3 − 2, 1 − 3) = (.8, .7, −2); A = (.8 + .45·A₁, .7 + .45·(−2), −2), A₁ = −.2
    advantages, returns = gae(t(0, 0, 1), t(1, 2, 3), torch.tensor([True] * 3), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, t(0.71, -0.2, -2.0))
    torch.testing.assert_close(returns, t(1.71, 1.8, 1.0))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 70),
    st.sampled_from([(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.0, 0.9), (0.9, 0.0), (0.5, 0.5)]),
)
def test_gae_matches_the_loop(seed, length, discounts):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 3, length))
    mask = rng.random((3, length)) < rng.random()
    poisoned = (torch.tensor(np.where(mask, x, rng.choice([NAN, INF, 7.0]))) for x in (rewards, values))
    advantages, returns = gae(*poisoned, torch.tensor(mask), gamma=discounts[0], lam=discounts[1])
    for row in range(3):
        expected = gae_oracle(rewards[row], values[row], mask[row], *discounts)
        np.testing.assert_allclose(advantages[row].numpy(), expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[row].numpy(), expected[1], rtol=1e-5, atol=1e-6)


def test_gae_steps_over_masked_positions_without_decay():
    dense = gae(t(0, 0, 1), t(1, 2, 3), torch.ones(3, dtype=torch.bool), gamma=0.9, lam=0.5)
    mask = torch.tensor([False, True, False, False, True, True, False])
    spread = gae(t(NAN, 0, 5, 5, 0, 1, 5), t(INF, 1, 5, 5, 2, 3, 5), mask, gamma=0.9, lam=0.5)
    for got, expected in zip(spread, dense, strict=True):
        assert torch.equal(got[mask], expected)
        assert not got[~mask].any()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 1, 4)])
def test_gae_shapes(shape):
    x = torch.zeros(shape)
    advantages, returns = gae(x, x, torch.zeros(shape, dtype=torch.bool))
    assert advantages.shape == returns.shape == shape
    assert not advantages.any()


# --- whiten -----------------------------------------------------------------------------------------------------------


def test_whiten_by_hand():
    # over 1, 2, 6: mean 3, population variance (4 + 1 + 9)/3
    x, mask, s = t(1, 2, NAN, 6), torch.tensor([True, True, False, True]), math.sqrt(14 / 3)
    torch.testing.assert_close(whiten(x, mask), t(-2 / s, -1 / s, 0, 3 / s))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), t(3 - 2 / s, 3 - 1 / s, 0, 3 + 3 / s))


def test_whiten_is_that_of_the_whole_not_of_the_parts():
    x, mask = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)), torch.ones(4, 9, dtype=torch.bool)
    packed = whiten(x.flatten(), mask.flatten())
    torch.testing.assert_close(whiten(x, mask).flatten(), packed)
    np.testing.assert_allclose(packed.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(packed.double().square().mean(), 1, rtol=1e-5)


def test_whiten_without_spread_or_without_tokens():
    assert whiten(t(2, 2), torch.tensor([True, True]), eps=0.0).tolist() == [0.0, 0.0]
    assert whiten(t(2, 2), torch.tensor([True, True]), shift_mean=False).tolist() == [2.0, 2.0]
    assert whiten(t(NAN, INF), torch.tensor([False, False]), shift_mean=False).tolist() == [0.0, 0.0]


def test_whiten_gradient_under_false_is_zero():
    x = t(1, NAN, 3, INF).requires_grad_()
    (whiten(x, torch.tensor([True, False, True, False])) * t(1, 2, 3, 4)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[[1, 3]].tolist() == [0.0, 0.0]


# --- what is refused --------------------------------------------------------------------------------------------------

ids, on = torch.tensor([0, 0]), torch.tensor([True, True])
REFUSED = {
    "unknown scale": lambda: group_advantages(t(1, 2), ids, scale="std"),
    "negative eps": lambda: group_advantages(t(1, 2), ids, eps=-1.0),
    "group shapes": lambda: group_advantages(t(1, 2), torch.tensor([0])),
    "valid shape": lambda: group_advantages(t(1, 2), ids, valid=torch.tensor([True])),
    "float ids": lambda: group_advantages(t(1, 2), t(0, 0)),
    "float valid": lambda: group_advantages(t(1, 2), ids, valid=t(0, 1)),
    "NaN reward": lambda: group_advantages(t(1, NAN), ids),
    "NaN reward, loo": lambda: leave_one_out_advantages(t(1, NAN), ids, valid=on),
    "infinite reward": lambda: group_advantages(t(1, INF), ids),
    "loo shapes": lambda: leave_one_out_advantages(t(1, 2), torch.tensor([[0, 0]])),
    "gae shapes": lambda: gae(t(1, 2), t(1), on),
    "gae mask shape": lambda: gae(t(1, 2), t(1, 2), on[None]),
    "gae NaN reward": lambda: gae(t(1, NAN), t(1, 2), on),
    "gamma": lambda: gae(t(1, 2), t(1, 2), on, gamma=1.1),
    "lam": lambda: gae(t(1, 2), t(1, 2), on, lam=-0.1),
    "whiten shapes": lambda: whiten(t(1, 2), torch.tensor([True])),
    "whiten eps": lambda: whiten(t(1, 2), on, eps=-1.0),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    with pytest.raises(ValueError, match=r".{10}"):
        call()


def test_arguments_are_unchanged():
    rewards, groups, valid = t(1, NAN, 4), torch.tensor([1, 1, 1]), torch.tensor([True, False, True])
    before = [x.clone() for x in (rewards, groups, valid)]
    group_advantages(rewards, groups, valid=valid)
    leave_one_out_advantages(rewards, groups, valid=valid)
    gae(rewards, rewards, valid)
    whiten(rewards, valid)
    for x, copy in zip((rewards, groups, valid), before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
