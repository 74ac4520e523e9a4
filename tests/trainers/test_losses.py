"""Policy and value loss, aggregation and importance weights against hand calculations and a numpy oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers.losses import aggregate, importance_weights, policy_loss, sequence_log_ratio, value_loss

NAN, INF = float("nan"), float("inf")
HOWS = ("token", "sequence", "constant")


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# --- policy_loss ------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    #       inside      above, A > 0    above, A < 0    below, A > 0    below, A < 0
    ratios, advantages = t(1.1, 1.5, 1.5, 0.5, 0.5), t(2, 2, -2, 2, -2)
    logprobs = ratios.log().requires_grad_()
    loss = policy_loss(logprobs, torch.zeros(5), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss.detach(), t(-2.2, -2.6, 3.0, -1.0, 1.6))
    loss.sum().backward()  # −ρA where the clip is not what is chosen
    torch.testing.assert_close(grad_of(logprobs), t(-2.2, 0, 3.0, -1.0, 0))


def test_dual_clip_by_hand():
    logprobs = t(math.log(5), math.log(2), math.log(5)).requires_grad_()
    loss = policy_loss(logprobs, torch.zeros(3), t(-1, -1, 1), dual_clip=3.0)
    torch.testing.assert_close(loss.detach(), t(3, 2, -1.2))
    loss.sum().backward()
    torch.testing.assert_close(grad_of(logprobs), t(0, 2, 0))


def test_on_policy_gradient_is_minus_the_advantage():
    logprobs, advantages = t(-1, -2, -3).requires_grad_(), t(0.5, -2, 0)
    loss = policy_loss(logprobs, logprobs, advantages)  # `old` is a constant even if it is not detached
    torch.testing.assert_close(loss.detach(), -advantages)
    loss.sum().backward()
    torch.testing.assert_close(grad_of(logprobs), -advantages)


def test_the_exponent_is_limited():
    logprobs = t(-1, 1000, -1000).requires_grad_()
    loss = policy_loss(logprobs, t(-101, 0, 0), t(-1, -1, -1), clip_low=1e9, clip_high=1e9)
    torch.testing.assert_close(loss.detach(), t(math.exp(20), math.exp(20), math.exp(-20)))
    loss.sum().backward()
    assert grad_of(logprobs).tolist() == [0.0, 0.0, 0.0]


def test_policy_loss_matches_float64():
    rng = np.random.default_rng(0)
    new, old, a = rng.normal(size=(3, 200))
    rho = np.exp(new - old)
    plain = -np.minimum(rho * a, np.clip(rho, 0.9, 1.4) * a)
    dual = np.where(a < 0, np.minimum(plain, -1.5 * a), plain)
    for dual_clip, expected in ((None, plain), (1.5, dual)):
        got = policy_loss(*map(torch.tensor, (new, old, a)), clip_low=0.1, clip_high=0.4, dual_clip=dual_clip)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


# --- value_loss -------------------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    # inside the clip; clipped error larger (V_old + .2 − R); clipped error smaller, so the plain one counts
    values = t(1.1, 2, 2).requires_grad_()
    loss = value_loss(values, t(1, 1, 1), t(2, 2, 1), clip=0.2)
    torch.testing.assert_close(loss.detach(), t(0.405, 0.32, 0.5))
    loss.sum().backward()
    torch.testing.assert_close(grad_of(values), t(-0.9, 0, 1))


def test_value_loss_matches_float64():
    v, old, r = np.random.default_rng(1).normal(size=(3, 200))
    expected = np.maximum((v - r) ** 2, (old + np.clip(v - old, -0.3, 0.3) - r) ** 2) / 2
    np.testing.assert_allclose(value_loss(*map(torch.tensor, (v, old, r)), clip=0.3).numpy(), expected, rtol=1e-6)


# --- aggregate --------------------------------------------------------------------------------------------------------


def aggregate_oracle(x, mask, ids, how, max_tokens):
    x, mask, ids = (np.asarray(a) for a in (x, mask, ids))
    sequences = [x[mask & (ids == i)] for i in np.unique(ids[mask])]
    if not sequences:
        return 0.0
    return {
        "token": x[mask].sum() / mask.sum(),
        "sequence": float(np.mean([s.mean() for s in sequences])),
        "constant": x[mask].sum() / (len(sequences) * max_tokens),
    }[how]


def test_aggregate_by_hand():
    x = t(1, 2, NAN, 6, 5, NAN)
    mask = torch.tensor([True, True, False, True, True, False])
    ids = torch.tensor([-4, -4, -4, 2**63 - 1, -4, 11])  # −4 holds 1, 2, 5; the largest holds 6; 11 has no True token
    got = [aggregate(x, mask, ids, how=how, max_tokens=10).item() for how in HOWS]
    assert got == pytest.approx([14 / 4, (8 / 3 + 6) / 2, 14 / 20])
    totals = {"total_tokens": 28, "total_sequences": 4, "max_tokens": 10}
    got = [aggregate(x, mask, ids, how=how, **totals).item() for how in HOWS]
    assert got == pytest.approx([14 / 28, (8 / 3 + 6) / 4, 14 / 40])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(HOWS))
def test_aggregate_matches_oracle_in_any_order(seed, size, how):
    rng = np.random.default_rng(seed)
    x, mask, ids = rng.normal(size=size), rng.random(size) < 0.6, rng.choice([-(2**63), -1, 0, 5, 2**63 - 1], size)
    order = rng.permutation(size)
    for at in (np.arange(size), order):
        got = aggregate(*(torch.tensor(a[at]) for a in (x, mask, ids)), how=how, max_tokens=7)
        assert got.dtype == torch.float32
        assert got.shape == ()
        np.testing.assert_allclose(got.item(), aggregate_oracle(x, mask, ids, how, 7), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", HOWS)
def test_gradient_is_that_of_the_formula_and_zero_under_false(how):
    x = t(1, NAN, 3, 4, INF).requires_grad_()
    mask, ids = torch.tensor([True, False, True, True, False]), torch.tensor([0, 0, 0, 1, 1])
    aggregate(x, mask, ids, how=how, max_tokens=5).backward()
    share = {"token": [1 / 3] * 3, "sequence": [1 / 4, 1 / 4, 1 / 2], "constant": [1 / 10] * 3}[how]
    torch.testing.assert_close(grad_of(x), t(share[0], 0, share[1], share[2], 0))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("totals", [{}, {"total_tokens": 0, "total_sequences": 0}, {"total_tokens": 9}])
def test_nothing_to_learn_from_is_zero_with_gradient_zero(how, totals):
    for x in (t(NAN, 2).requires_grad_(), torch.zeros(0, requires_grad=True)):
        mask, ids = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
        loss = aggregate(x, mask, ids, how=how, max_tokens=3, **totals)
        loss.backward()
        assert loss.item() == 0.0
        assert grad_of(x).tolist() == [0.0] * len(x)


@pytest.mark.parametrize("how", HOWS)
def test_padding_packing_and_micro_batches_leave_loss_and_gradient_alone(how):
    """Four sequences of a tiny policy: padded whole, packed, packed in another order, and in micro-batches."""
    generator = torch.Generator().manual_seed(5)
    lengths, width = [3, 1, 6, 4], 6
    features = [torch.randn(n, 8, generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    masks[0][0] = masks[2][3] = True
    advantages, old = torch.randn(4, generator=generator), torch.full((), -1.0)
    totals = {"total_tokens": int(sum(m.sum() for m in masks)), "total_sequences": 4, "max_tokens": 9}

    def share(x: Tensor, a: Tensor, mask: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        logprobs = (x @ weight).tanh() - 1
        return aggregate(policy_loss(logprobs, old.expand_as(logprobs), a), mask, ids, how=how, **totals)

    def run(batches: list[list[int]], *, padded: bool) -> Tensor:
        weight = torch.full((8,), 0.1, requires_grad=True)
        for batch in batches:
            if padded:
                x = torch.randn(len(batch), width, 8, generator=generator)  # garbage in the padding
                mask = torch.zeros(len(batch), width, dtype=torch.bool)
                for row, i in enumerate(batch):
                    x[row, : lengths[i]], mask[row, : lengths[i]] = features[i], masks[i]
                ids = torch.tensor(batch)[:, None].expand(-1, width)
                a = advantages[batch][:, None].expand(-1, width)
            else:
                x, mask = torch.cat([features[i] for i in batch]), torch.cat([masks[i] for i in batch])
                ids = torch.cat([torch.full((lengths[i],), 100 - i) for i in batch])
                a = torch.cat([advantages[i].expand(lengths[i]) for i in batch])
            share(x, a, mask, ids, weight).backward()
        return grad_of(weight)

    expected = run([[0, 1, 2, 3]], padded=False)
    for batches in ([[0, 1, 2, 3]], [[3, 1, 2, 0]], [[2], [0, 3], [1]]):
        for padded in (True, False):
            torch.testing.assert_close(run(batches, padded=padded), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_masked_out_reaches_no_gradient_through_the_losses(poison):
    mask, ids = torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.int64)
    for loss in (policy_loss, value_loss):
        x = t(0.1, poison, 1, 1).requires_grad_()
        aggregate(loss(x, t(0, 1, poison, 1), t(1, 1, 1, poison)), mask, ids, how="token").backward()
        assert grad_of(x)[0].item() != 0
        assert grad_of(x)[1:].tolist() == [0.0, 0.0, 0.0]


def test_nan_under_true_is_not_hidden():
    mask, ids = torch.tensor([True, True]), torch.tensor([0, 0])
    assert math.isnan(aggregate(policy_loss(t(NAN, 1), t(1, 1), t(1, 1)), mask, ids, how="token").item())
    assert math.isnan(importance_weights(t(NAN, 1), t(1, 1), mask, ids, band=(0.5, 2.0))[0].item())


# --- importance_weights -----------------------------------------------------------------------------------------------

OLD = t(math.log(0.25), math.log(4), NAN, 0.0, math.log(0.5), 700.0)
MASK = torch.tensor([True, True, False, True, True, True])
IDS = torch.tensor([9, -9, 9, 9, 9, 3])  # w: sequence 9: 1/4, 1, 1/2 (geometric mean 1/2); −9: 4; 3: beyond float32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.25, 2, 0, 1, 0.5, 2]),
        ({"cap": None}, [0.25, 4, 0, 1, 0.5, INF]),
        ({"cap": 3.0, "floor": 0.4}, [0.4, 3, 0, 1, 0.5, 3]),
        ({"band": (0.5, 4.0)}, [0, 4, 0, 1, 0.5, 0]),
        ({"band": (0.5, 4.0), "cap": 1.0, "floor": 0.75}, [0, 4, 0, 1, 0.5, 0]),
        ({"level": "sequence"}, [0.5, 2, 0, 0.5, 0.5, 2]),
        ({"level": "sequence", "floor": 0.75}, [0.75, 2, 0, 0.75, 0.75, 2]),
        ({"level": "sequence", "band": (0.5, 1.0)}, [0.5, 0, 0, 0.5, 0.5, 0]),
        ({"level": "sequence", "band": (0.6, 4.0)}, [0, 4, 0, 0, 0, 0]),
    ],
)
def test_importance_weights_by_hand(options, expected):
    old = OLD.clone().requires_grad_()
    got = importance_weights(old, torch.where(MASK, 0.0, INF), MASK, IDS, **options)
    torch.testing.assert_close(got, t(*expected))
    assert got.dtype == torch.float32
    assert not got.requires_grad


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_of_the_band_are_inside(ratio, dtype):
    # where log and exp round-trip at all in float32, as for 2 and ½, an end must not be lost in a wider type
    x = torch.tensor([ratio], dtype=dtype).log()
    w = np.exp(x.double().numpy()).astype(np.float32).item()
    for band in ((w, w), (w, 10.0), (0.0, w)):
        got = importance_weights(x, torch.zeros_like(x), torch.tensor([True]), torch.tensor([0]), band=band)
        assert got.item() == w


def test_sequence_level_in_any_order_and_shape():
    got = importance_weights(OLD, torch.zeros(6), MASK, IDS, level="sequence")
    order = torch.tensor([4, 2, 5, 0, 1, 3])
    for shape in ((6,), (2, 3)):
        x, zero, mask, ids = (a[order].reshape(shape) for a in (OLD, torch.zeros(6), MASK, IDS))
        torch.testing.assert_close(importance_weights(x, zero, mask, ids, level="sequence").flatten(), got[order])
    empty = torch.zeros(0)
    assert importance_weights(empty, empty, empty.bool(), empty.long(), level="sequence").shape == (0,)


# --- sequence_log_ratio -----------------------------------------------------------------------------------------------


def test_sequence_log_ratio_by_hand():
    new, old = t(1, 5, NAN, 2, 0), t(0, 2, 7, 4, NAN)
    mask, ids = torch.tensor([True, True, False, True, False]), torch.tensor([9, 3, 9, 9, 3])
    new.requires_grad_()
    ratio = sequence_log_ratio(new, old, mask, ids)
    torch.testing.assert_close(ratio.detach(), t(-0.5, 3, 0, -0.5, 0))  # (1 − 2)/2 and 3
    (ratio * t(10, 20, 30, 40, 50)).sum().backward()
    torch.testing.assert_close(grad_of(new), t(10, 20, 0, 40, 0))  # slope 1 to each token's own


def test_sequence_log_ratio_shows_nan_under_true():
    new = t(0, NAN, 0).requires_grad_()
    ratio = sequence_log_ratio(new, torch.zeros(3), torch.tensor([True, True, True]), torch.tensor([0, 0, 1]))
    assert ratio.isnan().tolist() == [True, True, False]


# --- what is refused --------------------------------------------------------------------------------------------------

x2, on, ids2 = t(1, 2), torch.tensor([True, True]), torch.tensor([0, 1])
REFUSED = {
    "policy shapes": lambda: policy_loss(x2, x2, t(1)),
    "policy not broadcast": lambda: policy_loss(x2, x2, torch.tensor(1.0)),
    "clip_low": lambda: policy_loss(x2, x2, x2, clip_low=-0.1),
    "clip_high": lambda: policy_loss(x2, x2, x2, clip_high=-0.1),
    "dual_clip": lambda: policy_loss(x2, x2, x2, dual_clip=1.0),
    "value shapes": lambda: value_loss(x2, x2, x2[None]),
    "value clip": lambda: value_loss(x2, x2, x2, clip=-1.0),
    "how": lambda: aggregate(x2, on, ids2, how="mean"),
    "constant without max_tokens": lambda: aggregate(x2, on, ids2, how="constant"),
    "max_tokens 0": lambda: aggregate(x2, on, ids2, how="constant", max_tokens=0),
    "aggregate mask shape": lambda: aggregate(x2[None], on, ids2[None], how="token"),
    "aggregate ids shape": lambda: aggregate(x2[None], on[None], ids2, how="token"),
    "float ids": lambda: aggregate(x2, on, x2, how="token"),
    "float mask": lambda: aggregate(x2, x2, ids2, how="token"),
    "total 0": lambda: aggregate(x2, on, ids2, how="token", total_tokens=0),
    "total < 0": lambda: aggregate(x2, on, ids2, how="sequence", total_sequences=-1),
    "level": lambda: importance_weights(x2, x2, on, ids2, level="batch"),
    "weights shapes": lambda: importance_weights(x2, t(1), on, ids2),
    "cap": lambda: importance_weights(x2, x2, on, ids2, cap=0.0),
    "floor": lambda: importance_weights(x2, x2, on, ids2, floor=-0.1),
    "floor above cap": lambda: importance_weights(x2, x2, on, ids2, floor=3.0),
    "log-ratio shapes": lambda: sequence_log_ratio(x2, t(1), on, ids2),
    "log-ratio float ids": lambda: sequence_log_ratio(x2, x2, on, x2),
    "band upside down": lambda: importance_weights(x2, x2, on, ids2, band=(2.0, 1.0)),
    "band NaN": lambda: importance_weights(x2, x2, on, ids2, band=(NAN, 1.0)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    with pytest.raises(ValueError, match=r".{10}"):
        call()


def test_arguments_are_unchanged():
    arguments = [OLD.clone(), torch.zeros(6), MASK.clone(), IDS.clone()]
    copies = [a.clone() for a in arguments]
    old, zero, mask, ids = arguments
    for how in HOWS:
        aggregate(old, mask, ids, how=how, max_tokens=2)
    importance_weights(old, zero, mask, ids, level="sequence", floor=0.1)
    policy_loss(old, zero, old, dual_clip=2.0)
    value_loss(old, zero, old)
    for argument, copy in zip(arguments, copies, strict=True):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)
