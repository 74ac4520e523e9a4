"""The generalised Jensen–Shannon divergence, exact and over the teacher's top K, against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers import tensors
from trainers.jsd import likeliest
from trainers.losses import aggregate, generalized_jsd, topk_jsd

NAN, INF = float("nan"), float("inf")
BETAS = (0.0, 0.3, 1.0)


@pytest.fixture(params=[7, 64, 1 << 22], ids=["block of 7", "block of 64", "one block"])
def block(request, monkeypatch) -> int:
    """The same numbers must come out whatever the block: less than a row, a few rows, everything."""
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", request.param)
    return request.param


def make(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, q).sum(-1)


def formula(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """The definition, on probabilities."""
    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def topk_formula(student: Tensor, teacher_logprobs: Tensor, ids: Tensor, beta: float, temperature: float) -> Tensor:
    s, t = (student.double() / temperature).softmax(-1), teacher_logprobs.double().exp()
    top = s.gather(-1, ids)
    if ids.shape[-1] == s.shape[-1]:
        return formula(top, t, beta)
    s_tail, t_tail = (1 - x.sum(-1, keepdim=True) for x in (top, t))
    return formula(torch.cat([top, s_tail], -1), torch.cat([t, t_tail.clamp(min=1e-7)], -1), beta)


def check(got: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol)


def log(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).log()


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),  # KL(T‖S)
        (1.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),  # KL(S‖T)
        # M = (3/8, 5/8): ½·[½·ln(4/3) + ½·ln(4/5)] + ½·[¼·ln(2/3) + ¾·ln(6/5)]
        (
            0.5,
            0.25 * math.log(4 / 3) + 0.25 * math.log(4 / 5) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
        ),
    ],
)
def test_by_hand(beta, expected):
    student, teacher = log(0.25, 0.75), log(0.5, 0.5)  # S = (¼, ¾), T = (½, ½)
    assert generalized_jsd(student, teacher, beta=beta).item() == pytest.approx(expected, rel=1e-5)
    # with the logits halved, temperature ½ gives the same
    halved = generalized_jsd(student / 2, teacher / 2, beta=beta, temperature=0.5)
    assert halved.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("leading", [(), (5,), (2, 2, 3), (0,)])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("block")
def test_matches_the_formula_in_float64(leading, beta, dtype):
    student, teacher = make(*leading, 13).to(dtype).requires_grad_(), make(*leading, 13, seed=1).to(dtype)
    plain, weights = student.detach().double().requires_grad_(), make(*leading, seed=2)
    expected = formula((plain / 1.5).softmax(-1), (teacher.double() / 1.5).softmax(-1), beta)
    got = generalized_jsd(student, teacher, beta=beta, temperature=1.5)
    assert got.dtype == torch.float32
    check(got.detach(), expected.detach(), 2e-6)
    (expected * weights).sum().backward()
    (got * weights.float()).sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    check(student.grad, plain.grad, 1e-2 if dtype == torch.bfloat16 else 2e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.one_of(st.floats(1e-3, 0.999), st.sampled_from([0.0, 1.0])),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_bounds_and_symmetry(seed, beta, scale):
    s, t = make(4, 9, seed=seed, scale=scale).float(), make(4, 9, seed=seed + 1, scale=scale).float()
    divergence = generalized_jsd(s, t, beta=beta)
    assert (divergence >= 0).all()
    if 0 < beta < 1:  # never more than the entropy of choosing between the two
        assert (divergence <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-5).all()
    check(generalized_jsd(t, s, beta=1 - beta), divergence, 1e-5 * max(1.0, scale))
    assert generalized_jsd(s, s, beta=beta).abs().max() < 1e-6


@pytest.mark.usefixtures("block")
def test_zero_probabilities_and_infinite_divergences():
    both = torch.tensor([[0.0, 0.0, -INF]], requires_grad=True)  # S = (½, ½, 0)
    same, wider = torch.tensor([[0.0, 0.0, -INF]]), torch.zeros(1, 3)
    narrower = torch.tensor([[0.0, -INF, -INF]])
    log3, log2 = math.log(3), math.log(2)
    for teacher, by_beta in (
        (same, {0.0: 0.0, 0.5: 0.0, 1.0: 0.0}),
        (wider, {0.0: INF, 1.0: log3 - log2}),
        (narrower, {0.0: log2, 1.0: INF, 0.5: 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * log2}),
    ):
        for beta, expected in by_beta.items():
            both.grad = None
            got = generalized_jsd(both, teacher, beta=beta)
            got.sum().backward()
            assert both.grad is not None
            assert torch.isfinite(both.grad).all()
            if math.isinf(expected):
                assert got.item() == INF
                assert not both.grad.any()
            else:
                assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.usefixtures("block")
def test_infinite_even_where_the_probability_underflows():
    student, teacher = torch.tensor([0.0, -INF, -1.0]), torch.tensor([0.0, -500.0, -1.0])  # e^−500 is 0 in float32
    assert generalized_jsd(student, teacher, beta=0.0).item() == INF
    assert generalized_jsd(teacher, student, beta=1.0).item() == INF
    assert math.isfinite(generalized_jsd(student, teacher, beta=0.5).item())


def test_far_apart_is_finite_in_log_space():
    # T puts everything where S has e^−2000: the probability underflows, the divergence does not
    student, teacher = torch.tensor([0.0, 2000.0]), torch.tensor([2000.0, 0.0])
    for beta, expected in ((0.0, 2000.0), (1.0, 2000.0), (0.5, math.log(2))):
        assert generalized_jsd(student, teacher, beta=beta).item() == pytest.approx(expected, rel=1e-6)
        if beta:
            continue
        leaf = student.clone().requires_grad_()
        generalized_jsd(leaf, teacher, beta=beta).backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [-1.0, 1.0]  # S − T


# --- top K ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),  # T = (¼, ¾), S = (½, ½)
        (1.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    ],
)
def test_topk_by_hand(beta, expected):
    student, teacher = log(0.25, 0.125, 0.5, 0.125), log(0.25)
    got = topk_jsd(student, teacher, torch.tensor([2]), beta=beta)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    # the temperature divides the student's logits only
    assert topk_jsd(student * 2, teacher, torch.tensor([2]), beta=beta, temperature=2.0).item() == got.item()


@pytest.mark.parametrize("leading", [(), (2, 6)])
@pytest.mark.parametrize("k", [1, 4, 13])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("block")
def test_topk_matches_the_formula_in_float64(leading, k, beta, dtype):
    teacher_logprobs, ids = make(*leading, 13, seed=1).log_softmax(-1).topk(k, dim=-1)
    student = make(*leading, 13).to(dtype).requires_grad_()
    plain, weights = student.detach().double().requires_grad_(), make(*leading, seed=2)
    expected = topk_formula(plain, teacher_logprobs.float(), ids, beta, 0.8)
    got = topk_jsd(student, teacher_logprobs.float(), ids, beta=beta, temperature=0.8)
    assert got.dtype == torch.float32
    check(got.detach(), expected.detach(), 3e-6)
    (expected * weights).sum().backward()
    (got * weights.float()).sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    check(student.grad, plain.grad, 1e-2 if dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_all_of_the_vocabulary_is_the_exact_divergence(beta):
    student, teacher = make(6, 13).float(), make(6, 13, seed=1).float()
    logprobs, ids = (teacher / 0.7).log_softmax(-1).topk(13, dim=-1)
    exact = generalized_jsd(student, teacher, beta=beta, temperature=0.7)
    check(topk_jsd(student, logprobs, ids, beta=beta, temperature=0.7), exact, 2e-6)


def test_the_teachers_tail_is_at_least_1e_7():
    student = log(0.5, 0.25, 0.25)
    got = topk_jsd(student, torch.tensor([0.0]), torch.tensor([0]), beta=1.0)  # the teacher is certain
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-7)
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_the_students_tail_is_exact_far_below_the_rounding_of_1():
    student = torch.tensor([100.0, 0.0, 0.0]).requires_grad_()  # the tail holds 2·e^−100
    got = topk_jsd(student, log(0.5), torch.tensor([0]), beta=0.0)
    assert got.item() == pytest.approx(-math.log(2) + 0.5 * (100 - math.log(2)), rel=1e-6)
    got.backward()
    assert student.grad is not None
    check(student.grad, torch.tensor([0.5, -0.25, -0.25]), 1e-6)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_the_likeliest_tokens_and_their_log_probabilities(leading, k, temperature, block):
    logits = make(*leading, 5, seed=3)
    expected = (logits / temperature).softmax(-1).log().sort(-1, descending=True)
    logprobs, ids = likeliest(logits, k, temperature=temperature)
    assert torch.equal(ids, expected.indices[..., :k])
    torch.testing.assert_close(logprobs.double(), expected.values[..., :k], rtol=0, atol=1e-6)


def test_topk_zero_probabilities_and_infinite_divergences():
    ids = torch.tensor([0, 1])
    for student, teacher, beta, expected in (
        (torch.tensor([0.0, -INF, 0.0]), log(0.5, 0.25), 0.0, INF),
        (torch.tensor([0.0, 0.0, -INF]), log(0.5, 0.25), 0.0, INF),  # no tail in the student
        (torch.tensor([0.0, 0.0, 0.0]), log(0.5, 0.0), 1.0, INF),
        (torch.tensor([0.0, -INF, 0.0]), log(0.5, 0.0), 0.0, 0.0),
        (torch.tensor([0.0, 0.0, -INF]), log(0.5, 0.5), 1.0, 0.0),
    ):
        leaf = student.clone().requires_grad_()
        got = topk_jsd(leaf, teacher, ids, beta=beta)
        got.backward()
        assert got.item() == pytest.approx(expected, abs=3e-6)
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.usefixtures("block")
def test_what_is_masked_out_has_gradient_zero(poison, beta):
    mask, ids = torch.tensor([True, False, True, False]), torch.zeros(4, dtype=torch.int64)
    student, teacher = make(4, 6).float(), make(4, 6, seed=1).float()
    logprobs, top = teacher.log_softmax(-1).topk(2, dim=-1)
    student[1] = teacher[3] = logprobs[3] = poison
    student.requires_grad_()
    for divergence in (
        generalized_jsd(student, teacher, beta=beta),
        topk_jsd(student, logprobs, top, beta=beta),
    ):
        student.grad = None
        loss = aggregate(divergence, mask, ids, how="token")
        loss.backward()
        assert math.isfinite(loss.item())
        assert student.grad is not None
        assert student.grad[[0, 2]].all()
        assert not student.grad[[1, 3]].any()


def test_the_teacher_is_a_constant_and_nothing_is_changed():
    student, teacher = make(3, 6).float().requires_grad_(), make(3, 6, seed=1).float().requires_grad_()
    logprobs, ids = teacher.log_softmax(-1).topk(3, dim=-1)
    copies = [x.detach().clone() for x in (student, teacher, logprobs, ids)]
    (generalized_jsd(student, teacher, beta=0.3) + topk_jsd(student, logprobs, ids, beta=0.3)).sum().backward()
    assert teacher.grad is None
    for x, copy in zip((student, teacher, logprobs, ids), copies, strict=True):
        assert torch.equal(x, copy)


x, k, i = torch.zeros(2, 4), torch.full((2, 3), -2.0), torch.tensor([[0, 1, 2]] * 2)
REFUSED = {
    "shapes": lambda: generalized_jsd(x, x[:1], beta=0.5),
    "no vocabulary": lambda: generalized_jsd(torch.tensor(1.0), torch.tensor(1.0), beta=0.5),
    "beta > 1": lambda: generalized_jsd(x, x, beta=1.1),
    "beta < 0": lambda: generalized_jsd(x, x, beta=-0.1),
    "beta NaN": lambda: generalized_jsd(x, x, beta=NAN),
    "temperature 0": lambda: generalized_jsd(x, x, beta=0.5, temperature=0.0),
    "topk beta": lambda: topk_jsd(x, k, i, beta=2.0),
    "topk temperature": lambda: topk_jsd(x, k, i, beta=0.5, temperature=-1.0),
    "topk shapes": lambda: topk_jsd(x, k, i[:, :2], beta=0.5),
    "topk leading shape": lambda: topk_jsd(x, k[:1], i[:1], beta=0.5),
    "K > V": lambda: topk_jsd(x[:, :2], k, i, beta=0.5),
    "K = 0": lambda: topk_jsd(x, k[:, :0], i[:, :0], beta=0.5),
    "id outside": lambda: topk_jsd(x, k, i + 2, beta=0.5),
    "id < 0": lambda: topk_jsd(x, k, i - 1, beta=0.5),
    "float ids": lambda: topk_jsd(x, k, i.float(), beta=0.5),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    with pytest.raises(ValueError, match=r".{10}"):
        call()
