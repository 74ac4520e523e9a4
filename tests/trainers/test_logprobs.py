"""Token log-probabilities and entropies, and their gradients, against plain log_softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainers import logprobs as module
from trainers import tensors
from trainers.logprobs import token_logprobs

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[7, 64, 1 << 22], ids=["block of 7", "block of 64", "one block"])
def block(request, monkeypatch) -> int:
    """The same numbers must come out whatever the block: less than a row, a few rows, everything."""
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param)
    return request.param


def make(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def ids_like(shape: tuple[int, ...], size: int) -> Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(3))


def oracle(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    p = log_p.exp()
    return log_p.gather(-1, ids[..., None])[..., 0], -torch.where(p > 0, p * log_p, 0).sum(-1)


def check(got: Tensor, expected: Tensor, rtol: float, atol: float | None = None) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol if atol is None else atol)


def test_by_hand():
    # p = ½, ¼, ¼ at temperature 1; at ½ the powers p², normalized: 2/3, 1/6, 1/6
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log() + 100  # a constant changes nothing
    logprobs, entropies = token_logprobs(logits, torch.tensor([1]), entropy=True)
    check(logprobs, torch.tensor([math.log(1 / 4)]), 1e-5)
    check(entropies, torch.tensor([1.5 * math.log(2)]), 1e-5)
    logprobs, entropies = token_logprobs(logits, torch.tensor([0]), temperature=0.5, entropy=True)
    check(logprobs, torch.tensor([math.log(2 / 3)]), 1e-4)
    check(entropies, torch.tensor([2 / 3 * math.log(3 / 2) + math.log(6) / 3]), 1e-4)


LEADING = [(), (5,), (2, 6), (2, 2, 3), (3, 0)]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("block")
def test_logits_match_float64(leading, temperature, dtype):
    logits = make(*leading, 19).to(dtype).requires_grad_()
    ids = ids_like(leading, 19)
    reference = logits.detach().double().requires_grad_()
    expected = oracle(reference, ids, temperature)
    got = token_logprobs(logits, ids, temperature=temperature, entropy=True)
    weights = make(2, *leading, seed=1)
    sum((w * e).sum() for w, e in zip(weights, expected, strict=True)).backward()
    sum((w.float() * g).sum() for w, g in zip(weights, got, strict=True)).backward()
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        check(g.detach(), e.detach(), 2e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    check(logits.grad, reference.grad, 1e-2 if dtype == torch.bfloat16 else 3e-6)
    check(token_logprobs(logits, ids, temperature=temperature).detach(), expected[0].detach(), 2e-6)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("block")
def test_hidden_states_and_head_match_float64(leading, dtype):
    hidden, head = make(*leading, 6, scale=1.0).to(dtype), make(23, 6, seed=2, scale=1.0).to(dtype)
    ids = ids_like(leading, 23)
    mine = [x.clone().requires_grad_() for x in (hidden, head)]
    plain = [x.double().requires_grad_() for x in (hidden, head)]
    expected = oracle(plain[0] @ plain[1].T, ids, 1.3)
    got = token_logprobs(mine[0], ids, temperature=1.3, entropy=True, head=mine[1])
    weights = make(2, *leading, seed=1)
    sum((w * e).sum() for w, e in zip(weights, expected, strict=True)).backward()
    sum((w.float() * g).sum() for w, g in zip(weights, got, strict=True)).backward()
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        check(g.detach(), e.detach(), 5e-6)
    for own, other in zip(mine, plain, strict=True):
        assert own.grad is not None
        assert own.grad.dtype == dtype
        check(own.grad, other.grad, 1e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.usefixtures("block")
def test_only_log_probabilities_or_only_entropies_have_a_gradient():
    ids = ids_like((4,), 11)
    for pick in (0, 1):
        logits, plain = (make(4, 11).requires_grad_() for _ in range(2))
        token_logprobs(logits, ids, entropy=True)[pick].sum().backward()
        oracle(plain, ids, 1.0)[pick].sum().backward()
        check(logits.grad, plain.grad, 1e-6)
    hidden, head = make(4, 3), make(11, 3)  # a frozen head (LoRA) gets none; frozen hidden states neither
    one = hidden.clone().requires_grad_()
    token_logprobs(one, ids, head=head).sum().backward()
    assert one.grad is not None
    other = head.clone().requires_grad_()
    token_logprobs(hidden, ids, head=other).sum().backward()
    plain = head.clone().requires_grad_()
    oracle(hidden @ plain.T, ids, 1.0)[0].sum().backward()
    check(other.grad, plain.grad, 1e-6)


@pytest.mark.usefixtures("block")
def test_impossible_tokens():
    logits = torch.tensor([[0.0, -INF, math.log(3), -INF]] * 2, requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.tensor([2, 1]), entropy=True)
    check(logprobs.detach(), torch.tensor([math.log(0.75), -INF]), 1e-6)
    check(entropies.detach(), torch.full((2,), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)), 1e-6)
    (logprobs[0] + entropies.sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, [1, 3]].abs().max() == 0


@pytest.mark.usefixtures("block")
def test_extreme_logits_neither_overflow_nor_lose_the_answer():
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4]])
    logprobs, entropies = token_logprobs(logits, torch.tensor([0, 1]), entropy=True)
    check(logprobs, torch.tensor([0.0, -math.log(2)]), 1e-6)
    check(entropies, torch.tensor([0.0, math.log(2)]), 1e-6)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.usefixtures("block")
def test_a_row_that_is_masked_out_later_harms_nothing(poison):
    mask, ids = torch.tensor([True, False, True]), ids_like((3,), 9)
    logits = make(3, 9).float()
    hidden, head = make(3, 4).float(), make(9, 4).float()
    clean = torch.where(mask, token_logprobs(hidden, ids, head=head), 0)
    logits[1] = hidden[1] = poison
    leaves = [x.requires_grad_() for x in (logits, hidden, head)]
    for got in (token_logprobs(logits, ids, entropy=True), token_logprobs(hidden, ids, entropy=True, head=head)):
        sum(torch.where(mask, x, 0).sum() for x in got).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    assert not logits.grad[1].any()
    assert not hidden.grad[1].any()
    check(torch.where(mask, token_logprobs(hidden, ids, head=head), 0).detach(), clean, 1e-7)


def test_strides_do_not_matter():
    logits = make(3, 5, 8).float()
    view = logits.transpose(0, 1)[1:].requires_grad_()
    ids = ids_like((4, 3), 8)
    got = token_logprobs(view, ids)
    got.sum().backward()
    assert torch.equal(got, token_logprobs(view.detach().contiguous(), ids))


def test_autocast_does_not_lower_the_precision():
    hidden, head, ids = make(6, 16).float().requires_grad_(), make(31, 16).float().requires_grad_(), ids_like((6,), 31)
    expected = torch.autograd.grad(token_logprobs(hidden, ids, head=head).sum(), (hidden, head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(token_logprobs(hidden, ids, head=head).sum(), (hidden, head))
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


x, i = torch.zeros(2, 3), torch.tensor([0, 1])
REFUSED = {
    "temperature 0": lambda: token_logprobs(x, i, temperature=0.0),
    "temperature < 0": lambda: token_logprobs(x, i, temperature=-1.0),
    "temperature NaN": lambda: token_logprobs(x, i, temperature=NAN),
    "shape of the ids": lambda: token_logprobs(x, i[:1]),
    "ids not broadcast": lambda: token_logprobs(x[None], i),
    "no vocabulary": lambda: token_logprobs(torch.tensor(1.0), i),
    "id too large": lambda: token_logprobs(x, torch.tensor([0, 3])),
    "id < 0": lambda: token_logprobs(x, torch.tensor([0, -100])),
    "float ids": lambda: token_logprobs(x, i.float()),
    "head's width": lambda: token_logprobs(x, i, head=torch.zeros(5, 4)),
    "head's dimensions": lambda: token_logprobs(x, i, head=torch.zeros(3)),
    "id beyond the head": lambda: token_logprobs(x, torch.tensor([0, 5]), head=torch.zeros(5, 3)),
    "temperature with head": lambda: token_logprobs(x, i, temperature=0.0, head=torch.zeros(5, 3)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call):
    with pytest.raises(ValueError, match=r".{10}"):
        call()


def test_arguments_are_unchanged():
    logits, hidden, head, ids = make(4, 9).float(), make(4, 3).float(), make(9, 3).float(), ids_like((4,), 9)
    arguments = (logits, hidden, head, ids)
    copies = [a.clone() for a in arguments]
    for a in arguments[:3]:
        a.requires_grad_()
    sum(z.sum() for z in token_logprobs(logits, ids, entropy=True, temperature=2.0)).backward()
    sum(z.sum() for z in token_logprobs(hidden, ids, entropy=True, head=head)).backward()
    for argument, copy in zip(arguments, copies, strict=True):
        assert torch.equal(argument, copy)
