"""Divergences between a student's and a teacher's next-token distributions (GKD, arXiv 2306.13649). Pure; torch only.

Both walk over `[..., V]` in bounded blocks, forward and backward, and recompute in the backward pass what they did
not keep, so that beside the logits given and their gradient nothing of that size is ever held in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainers.tensors import blocks, compute_dtype, log_softmax, require, require_ids, require_same_shape

_LEAST_TAIL = 1e-7  # of the teacher beside its top K: a rounding error must not make it 0, nor the divergence infinite


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """The generalized Jensen–Shannon divergence per position, in nats (arXiv 2306.13649, eq. 1).

    T and S are the softmaxes of teacher and student logits / temperature, M = β·T + (1 − β)·S; the result is
    β·KL(T‖M) + (1 − β)·KL(S‖M); β = 0 means KL(T‖S), β = 1 means KL(S‖T). 0·log 0 = 0; an infinite divergence is
    +inf, and its gradient is 0.

    Shapes: both `[..., V]`, result `[...]` float32. The gradient goes to the student in its dtype; the teacher is a
    constant. Raises ValueError on shapes that differ, `beta` outside [0, 1] and `temperature` ≤ 0.

    >>> student, teacher = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(generalized_jsd(student, teacher, beta=0.0).item(), 4)  # ½·ln 2 + ½·ln ⅔
    0.1438
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    _require_options(student_logits, beta, temperature)
    result: Tensor = _GeneralizedJSD.apply(student_logits, teacher_logits.detach(), beta, temperature)
    return result.float()


def topk_jsd(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
) -> Tensor:
    """`generalized_jsd` over K + 1 outcomes: the teacher's K tokens, and one tail with the rest of each one's mass.

    `teacher_logprobs` are those at `temperature`, which divides the student's logits only. For K < V the teacher's
    tail holds at least 1e-7; for K = V there is no tail.

    Shapes: `[..., V]`, and twice `[..., K]` with the same leading shape; the ids of a position are distinct. Result
    `[...]` float32, gradient to the student only. Raises ValueError on shapes that do not fit, ids outside the
    vocabulary, `beta` outside [0, 1] and `temperature` ≤ 0.

    >>> student = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    >>> round(topk_jsd(student, torch.tensor([0.25]).log(), torch.tensor([0]), beta=0.0).item(), 4)  # ¼·ln ½ + ¾·ln 3⁄2
    0.1308
    """
    require_same_shape(teacher_logprobs=teacher_logprobs, teacher_ids=teacher_ids)
    _require_options(student_logits, beta, temperature)
    vocabulary = student_logits.shape[-1]
    require(
        teacher_ids.dim() >= 1
        and teacher_ids.shape[:-1] == student_logits.shape[:-1]
        and 1 <= teacher_ids.shape[-1] <= vocabulary,
        f"student_logits {tuple(student_logits.shape)} and teacher_ids {tuple(teacher_ids.shape)}; give [..., V] and "
        "[..., K] with the same leading shape and 1 ≤ K ≤ V",
    )
    require_ids(teacher_ids, name="teacher_ids", size=vocabulary)
    dtype = compute_dtype(student_logits, teacher_logprobs)
    teacher = teacher_logprobs.detach().double()
    if teacher_ids.shape[-1] < vocabulary:
        tail = (1 - teacher.exp().sum(dim=-1, keepdim=True)).clamp(min=_LEAST_TAIL)
        teacher = torch.cat([teacher, tail.log()], dim=-1)
    result: Tensor = _TopKJSD.apply(student_logits, teacher.to(dtype), teacher_ids.long(), beta, temperature)
    return result.float()


@torch.no_grad()
def likeliest(logits: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest tokens (at most V) at `temperature`, the highest first, and their ids.

    Shapes: `[..., V]` to float32 and int64 `[..., min(k, V)]`. Raises ValueError on `k` < 1 or `temperature` ≤ 0.

    >>> logprobs, ids = likeliest(torch.tensor([0.25, 0.5, 0.25]).log(), 1)
    >>> round(logprobs.exp().item(), 4), ids.item()
    (0.5, 1)
    """
    _require_options(logits, 0.0, temperature)
    require(k >= 1, f"k is {k}; must be 1 or more")
    leading, vocabulary = logits.shape[:-1], logits.shape[-1]
    kept = (*leading, min(k, vocabulary))
    logprobs = torch.empty(kept, dtype=torch.float32, device=logits.device)
    ids = torch.empty(kept, dtype=torch.int64, device=logits.device)
    for at in blocks(leading, vocabulary):
        block = log_softmax(logits[at], temperature, compute_dtype(logits))
        best, ids[at] = block.topk(kept[-1], dim=-1)
        logprobs[at] = best.float()
    return logprobs, ids


def _require_options(logits: Tensor, beta: float, temperature: float) -> None:
    require(logits.dim() >= 1 and logits.shape[-1] >= 1, f"logits {tuple(logits.shape)}; give [..., V]")
    require(0 <= beta <= 1, f"beta is {beta}; must be in [0, 1]")
    require(0 < temperature < math.inf, f"temperature is {temperature}; must be above 0")


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p·(log p − log q) with 0·log 0 = 0, and +inf where q is 0 but p is not, even where p underflows."""
    terms = log_p.exp() * (log_p - log_q)
    absent = log_p == -math.inf
    return terms.masked_fill_((log_q == -math.inf) & ~absent, math.inf).masked_fill_(absent, 0.0)


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """log(β·T + (1 − β)·S) for 0 < β < 1."""
    return torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """The divergence over the last dimension of two log-distributions; never below 0, whatever the rounding."""
    if beta == 0:
        terms = _kl_terms(log_t, log_s)
    elif beta == 1:
        terms = _kl_terms(log_s, log_t)
    else:
        log_m = _log_mixture(log_s, log_t, beta)
        terms = beta * _kl_terms(log_t, log_m) + (1 - beta) * _kl_terms(log_s, log_m)
    return terms.sum(dim=-1).clamp(min=0)


def _slope(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """The divergence's derivative by each log S, up to a multiple of S (which a softmax's gradient cancels)."""
    if beta == 0:
        return -log_t.exp()
    if beta == 1:
        return _kl_terms(log_s, log_t)
    return (1 - beta) * _kl_terms(log_s, _log_mixture(log_s, log_t, beta))


class _GeneralizedJSD(torch.autograd.Function):
    """Keeps both logits as they came, and the result (to know the infinite rows)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
        dtype = compute_dtype(student, teacher)
        leading, vocabulary = student.shape[:-1], student.shape[-1]
        result = torch.empty(leading, dtype=dtype, device=student.device)
        for at in blocks(leading, vocabulary):
            log_s, log_t = (log_softmax(x[at], temperature, dtype) for x in (student, teacher))
            result[at] = _divergence(log_s, log_t, beta)
        ctx.save_for_backward(student, teacher, result)
        ctx.options = beta, temperature, dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, result = ctx.saved_tensors
        beta, temperature, dtype = ctx.options
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for at in blocks(student.shape[:-1], student.shape[-1]):
            log_s, log_t = (log_softmax(x[at], temperature, dtype) for x in (student, teacher))
            slope = _slope(log_s, log_t, beta)
            block = slope - log_s.exp_() * slope.sum(dim=-1, keepdim=True)
            grad[at] = _finish(block, upstream[at] / temperature, result[at])
        return grad, None, None, None


class _TopKJSD(torch.autograd.Function):
    """The student's logits become log-probabilities of the K + 1 outcomes, block by block."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, log_t: Tensor, ids: Tensor, beta: float, temperature: float) -> Tensor:
        leading, vocabulary = student.shape[:-1], student.shape[-1]
        result = torch.empty(leading, dtype=log_t.dtype, device=student.device)
        for at in blocks(leading, vocabulary):
            log_p = log_softmax(student[at], temperature, log_t.dtype)
            result[at] = _divergence(_outcomes(log_p, ids[at], log_t.shape[-1])[0], log_t[at], beta)
        ctx.save_for_backward(student, log_t, ids, result)
        ctx.options = beta, temperature
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, log_t, ids, result = ctx.saved_tensors
        beta, temperature = ctx.options
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for at in blocks(student.shape[:-1], student.shape[-1]):
            log_p = log_softmax(student[at], temperature, log_t.dtype)
            log_s, rest = _outcomes(log_p, ids[at], log_t.shape[-1])
            slope = _slope(log_s, log_t[at], beta)
            block = -log_p.exp_() * slope.sum(dim=-1, keepdim=True)
            k = ids.shape[-1]
            if rest is not None:  # the tail's slope, shared out by each token's part of the tail's mass
                part = (rest - log_s[..., k:]).exp_().masked_fill_(rest == -math.inf, 0.0)
                block += part * slope[..., k:]
            block.scatter_add_(-1, ids[at], slope[..., :k])
            grad[at] = _finish(block, upstream[at] / temperature, result[at])
        return grad, None, None, None, None


def _outcomes(log_p: Tensor, ids: Tensor, outcomes: int) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the ids and, where it is an outcome, of the tail; and `log_p` with −inf at the ids.

    The tail is summed, not taken as 1 − Σ, which would leave nothing of a tail below float32's rounding.
    """
    top = log_p.gather(-1, ids)
    if outcomes == ids.shape[-1]:
        return top, None
    rest = log_p.scatter(-1, ids, -math.inf)
    return torch.cat([top, rest.logsumexp(dim=-1, keepdim=True)], dim=-1), rest


def _finish(block: Tensor, upstream: Tensor, result: Tensor) -> Tensor:
    """The block's gradient times what comes from above; 0 in rows that are infinite or masked out above."""
    dead = (upstream == 0) | torch.isinf(result)
    return (block * upstream.unsqueeze(-1)).masked_fill_(dead.unsqueeze(-1), 0.0)
