"""KL estimates, token rewards and the KL coefficient against hand calculations and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainers.kl import AdaptiveKL, FixedKL, kl_estimate, kl_limited_fraction, token_rewards

NAN, INF = float("nan"), float("inf")


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def test_estimators_by_hand():
    logprobs, ref = t(-1, -2, -3), t(-1, -4, -2)  # d = 0, 2, −1
    assert kl_estimate(logprobs, ref, "k1").tolist() == [0.0, 2.0, -1.0]
    assert kl_estimate(logprobs, ref, "k2").tolist() == [0.0, 2.0, 0.5]
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3"), t(0, math.exp(-2) + 1, math.e - 2))


def test_k3_near_zero_does_not_cancel():
    d = np.array([1e-6, -1e-5, 1e-4, -1e-3], dtype=np.float32)
    exact = np.array([x * x / 2 - x**3 / 6 + x**4 / 24 for x in d.astype(np.float64)])  # Taylor
    np.testing.assert_allclose(kl_estimate(torch.tensor(d), torch.zeros(4), "k3").numpy(), exact, rtol=1e-4)


def test_k3_is_limited_in_both_terms_and_the_others_are_not():
    d = t(-1000, -20, 20, 1000, INF).requires_grad_()
    k3 = kl_estimate(d, torch.zeros(5), "k3")
    low, high = math.exp(20) - 21, math.exp(-20) + 19
    torch.testing.assert_close(k3.detach(), t(low, low, high, high, high))
    k3.sum().backward()
    assert d.grad is not None
    assert d.grad[[0, 3, 4]].tolist() == [0.0, 0.0, 0.0]
    assert kl_estimate(d, torch.zeros(5), "k1")[:4].tolist() == [-1000.0, -20.0, 20.0, 1000.0]
    assert kl_estimate(d, torch.zeros(5), "k2")[0].item() == 500_000.0


@pytest.mark.parametrize(
    ("estimator", "slope"), [("k1", lambda d: 1.0), ("k2", lambda d: d), ("k3", lambda d: 1 - math.exp(-d))]
)
def test_gradients(estimator, slope):
    logprobs, ref = t(-0.5, -2, -1.25).requires_grad_(), t(-1, -1, -1.25).requires_grad_()
    kl_estimate(logprobs, ref, estimator).sum().backward()
    expected = t(*[slope(d) for d in (0.5, -1.0, 0.0)])
    torch.testing.assert_close(logprobs.grad, expected)
    torch.testing.assert_close(ref.grad, -expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expectation_is_the_divergence(estimator):
    # Σ p·k over a small vocabulary: k1 and k3 are unbiased, k2 is half the second moment
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    d = np.log(p / q)
    exact = {"k1": (p * d).sum(), "k2": (p * d**2).sum() / 2, "k3": (p * d).sum()}[estimator]
    got = kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator)
    assert got.dtype == torch.float32
    np.testing.assert_allclose((p * got.numpy()).sum(), exact, rtol=1e-6)


def test_low_precision_is_computed_in_full():
    logprobs, ref = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16), torch.tensor([-1.5, -2.25], dtype=torch.bfloat16)
    expected = t(math.exp(-0.5) - 0.5, math.exp(-0.25) - 0.75)
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3"), expected)


def test_nan_gets_no_gradient():
    logprobs = t(NAN, -1, -2).requires_grad_()
    kl_estimate(logprobs, t(-1, INF, -1), "k3")[2:].sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[:2].tolist() == [0.0, 0.0]
    assert torch.isfinite(logprobs.grad).all()


def test_limited_fraction():
    logprobs = t(0, -20, -20.5, 25, NAN, 99).requires_grad_()
    mask = torch.tensor([True, True, True, True, False, False])
    got = kl_limited_fraction(logprobs, torch.zeros(6), mask)
    assert got.item() == 0.5  # ±20 itself is not changed by the limit
    assert not got.requires_grad
    assert kl_limited_fraction(logprobs, torch.zeros(6), torch.zeros(6, dtype=torch.bool)).item() == 0.0


# --- token rewards ----------------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    kl = torch.tensor([[1.0, NAN, 2.0, INF], [NAN, 4.0, -2.0, 1.0], [NAN] * 4])
    mask = torch.tensor([[True, False, True, False], [False, True, True, True], [False] * 4])
    got = token_rewards(t(10, -1, NAN), kl, mask, coef=0.5)
    assert got.tolist() == [[-0.5, 0.0, 9.0, 0.0], [0.0, -2.0, 1.0, -1.5], [0.0] * 4]


def test_token_rewards_shapes():
    one = token_rewards(torch.tensor(3.0), t(1, 1), torch.tensor([True, True]), coef=1.0)
    assert one.tolist() == [-1.0, 2.0]
    kl, mask = torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    assert token_rewards(torch.ones(2, 3), kl, mask, coef=0.0).sum(-1).tolist() == [[1.0] * 3] * 2
    assert token_rewards(torch.ones(2), torch.ones(2, 0), torch.ones(2, 0, dtype=torch.bool), coef=0.0).shape == (2, 0)


# --- the coefficient --------------------------------------------------------------------------------------------------


def test_fixed_stays():
    assert FixedKL(0.1).updated(5.0, 100) == FixedKL(0.1)
    assert FixedKL(coef=0.0).coef == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.055, 0.1 * (1 + 0.1 * 64 / 640)),
        (0.5, 0.1 * 1.02),  # e = 9, limited to 0.2
        (0.0, 0.1 * 0.98),  # e = −1, limited to −0.2
        (-1.0, 0.1 * 0.98),
        (0.05, 0.1),
    ],
)
def test_adaptive_by_hand(kl, expected):
    start = AdaptiveKL(0.1, 0.05, 640)
    after = start.updated(kl, 64)
    assert after.coef == pytest.approx(expected, rel=1e-12)
    assert (after.target, after.horizon) == (0.05, 640)
    assert start == AdaptiveKL(coef=0.1, target=0.05, horizon=640)
    assert start.updated(kl, 0).coef == 0.1


def test_adaptive_settles_at_the_target():
    # a policy whose KL is 0.01/coef: the coefficient that gives the target 0.05 is 0.2
    kl = AdaptiveKL(1.0, 0.05, 1000)
    for _ in range(400):
        kl = kl.updated(0.01 / kl.coef, 100)
    assert kl.coef == pytest.approx(0.2, rel=1e-3)


def test_immutable():
    with pytest.raises(AttributeError):
        AdaptiveKL(0.1, 1.0, 10).coef = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        FixedKL(0.1).coef = 1.0  # type: ignore[misc]


# --- what is refused --------------------------------------------------------------------------------------------------

on = torch.tensor([[True, True]])
REFUSED = {
    "estimator": lambda: kl_estimate(t(1), t(1), "k4"),
    "estimate shapes": lambda: kl_estimate(t(1, 2), t(1), "k1"),
    "fraction shapes": lambda: kl_limited_fraction(t(1, 2), t(1, 2), on),
    "rewards shape": lambda: token_rewards(t(1, 2), t(1, 2)[None], on, coef=0.1),
    "rewards not broadcast": lambda: token_rewards(torch.tensor(1.0), t(1, 2)[None], on, coef=0.1),
    "mask shape": lambda: token_rewards(t(1), t(1, 2)[None], on[0], coef=0.1),
    "NaN reward": lambda: token_rewards(t(NAN), t(1, 2)[None], on, coef=0.1),
    "coef < 0": lambda: token_rewards(t(1), t(1, 2)[None], on, coef=-0.1),
    "fixed coef < 0": lambda: FixedKL(-0.1),
    "fixed coef NaN": lambda: FixedKL(NAN),
    "adaptive coef < 0": lambda: AdaptiveKL(-0.1, 1.0, 10),
    "target 0": lambda: AdaptiveKL(0.1, 0.0, 10),
    "target < 0": lambda: AdaptiveKL(0.1, -1.0, 10),
    "horizon 0": lambda: AdaptiveKL(0.1, 1.0, 0),
    "kl NaN": lambda: AdaptiveKL(0.1, 1.0, 10).updated(NAN, 1),
    "n < 0": lambda: AdaptiveKL(0.1, 1.0, 10).updated(1.0, -1),
    "horizon too short": lambda: AdaptiveKL(0.1, 1.0, 10).updated(0.0, 51),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    with pytest.raises(ValueError, match=r".{10}"):
        call()
