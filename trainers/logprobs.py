"""Log-probabilities (and entropies) of chosen tokens from logits or hidden states. Pure; torch only.

The one place where logits become log-probabilities, in the trainer's hot path on CPU and GPU. Both ways walk in
bounded blocks and recompute the softmax in the backward pass, so that neither log-probabilities nor (with `head=`)
logits are ever held completely in float32: logits block by block of tokens, hidden states block by block of vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainers.tensors import BLOCK_ELEMENTS, blocks, compute_dtype, log_softmax, require, require_ids


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = ...,
    entropy: Literal[False] = ...,
    head: Tensor | None = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., entropy: Literal[True], head: Tensor | None = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., entropy: bool, head: Tensor | None = ...
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    head: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-softmax of logits / temperature at the tokens; with `entropy` also that distribution's entropy (nats).

    `logits` are `[..., T, V]`, or, with the output weight `head` `[V, H]`, the hidden states `[..., T, H]`;
    `token_ids` `[..., T]`. Nothing is shifted: row t must be the one that predicts token t. Returns float32
    `[..., T]` (twice with `entropy`). Differentiable once, entropy included: gradients come in the dtype of logits,
    hidden states and head. A row whose result is masked out later gets gradient 0, whatever its values.

    Raises ValueError on shapes that do not fit, ids outside the vocabulary and `temperature` ≤ 0.

    >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> logprobs, entropies = token_logprobs(logits, torch.tensor([0]), entropy=True)
    >>> round(logprobs.item(), 4), round(entropies.item(), 4)  # ln ½, 1½·ln 2
    (-0.6931, 1.0397)
    """
    require(0 < temperature < math.inf, f"temperature is {temperature}; must be above 0")
    given = "logits" if head is None else "hidden states"
    require(
        logits.dim() >= 1 and token_ids.shape == logits.shape[:-1],
        f"{given} {tuple(logits.shape)} and token_ids {tuple(token_ids.shape)}; give one id for each row",
    )
    if head is None:
        require_ids(token_ids, name="token_ids", size=logits.shape[-1])
        logprobs, entropies = _FromLogits.apply(logits, token_ids.long(), temperature, entropy)
    else:
        require(
            head.dim() == 2 and head.shape[-1] == logits.shape[-1],
            f"hidden states {tuple(logits.shape)} and head {tuple(head.shape)}; give [..., T, H] and [V, H]",
        )
        require_ids(token_ids, name="token_ids", size=head.shape[0])
        hidden = logits.reshape(-1, logits.shape[-1])
        logprobs, entropies = _FromHidden.apply(hidden, head, token_ids.reshape(-1).long(), temperature, entropy)
    logprobs = logprobs.float().reshape(token_ids.shape)
    return (logprobs, entropies.float().reshape(token_ids.shape)) if entropy else logprobs


class _FromLogits(torch.autograd.Function):
    """Keeps the logits as they came, the ids and the entropies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(ids.shape, dtype=compute_dtype(logits), device=logits.device)
        entropies = torch.zeros_like(logprobs)
        for at in blocks(ids.shape, logits.shape[-1]):
            log_p = log_softmax(logits[at], temperature, logprobs.dtype)
            logprobs[at] = log_p.gather(-1, ids[at].unsqueeze(-1)).squeeze(-1)
            if entropy:
                entropies[at] = -_p_log_p(log_p.exp(), log_p).sum(dim=-1)
        ctx.save_for_backward(logits, ids, entropies)
        ctx.options = temperature, entropy
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor, by_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, entropies = ctx.saved_tensors
        temperature, entropy = ctx.options
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        dead = (by_logprob == 0) & (by_entropy == 0)
        by_logprob, by_entropy = by_logprob / temperature, by_entropy / temperature
        for at in blocks(ids.shape, logits.shape[-1]):
            log_p = log_softmax(logits[at], temperature, entropies.dtype)
            block = _slope(log_p, entropies[at], by_logprob[at], by_entropy[at], entropy=entropy)
            block.scatter_add_(-1, ids[at].unsqueeze(-1), by_logprob[at].unsqueeze(-1))
            grad[at] = block.masked_fill_(dead[at].unsqueeze(-1), 0.0)
        return grad, None, None, None


class _FromHidden(torch.autograd.Function):
    """Logits of all tokens for a block of the vocabulary at a time, so that each row of the head is read once.

    Keeps hidden states and head as they came, the ids, the log-sum-exp and the entropies.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        x = hidden.to(compute_dtype(hidden, head))
        chosen, entropies = x.new_zeros(ids.shape), x.new_zeros(ids.shape)
        log_sum = torch.full_like(chosen, -math.inf)
        for at in _vocabulary_blocks(x, head):
            z = _logits(x, head[at].to(x.dtype), temperature)
            log_sum_here = z.logsumexp(dim=-1)
            log_sum_new = torch.logaddexp(log_sum, log_sum_here)
            if entropy:  # of a mixture of disjoint parts: their shares' entropy plus their own, by share
                before, here = (log_sum - log_sum_new).exp(), (log_sum_here - log_sum_new).exp()
                own = torch.special.entr(z.softmax(dim=-1)).sum(dim=-1)
                entropies = before * entropies + here * own + torch.special.entr(before) + torch.special.entr(here)
            log_sum = log_sum_new
            place, inside = _places(ids, at, z.shape[-1])
            chosen = torch.where(inside, z.gather(-1, place.unsqueeze(-1)).squeeze(-1), chosen)
        ctx.save_for_backward(hidden, head, ids, log_sum, entropies)
        ctx.options = temperature, entropy
        return (chosen - log_sum).clamp(max=0), entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_logprob: Tensor, by_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head, ids, log_sum, entropies = ctx.saved_tensors
        temperature, entropy = ctx.options
        live = (by_logprob != 0) | (by_entropy != 0)  # the prompt's tokens and the masked ones cost nothing here
        x, ids, log_sum, entropies = hidden[live].to(log_sum.dtype), ids[live], log_sum[live], entropies[live]
        by_logprob, by_entropy = by_logprob[live] / temperature, by_entropy[live] / temperature
        grad_x = torch.zeros_like(x)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for at in _vocabulary_blocks(x, head):
            weight = head[at].to(x.dtype)
            log_p = _logits(x, weight, temperature) - log_sum.unsqueeze(-1)
            place, inside = _places(ids, at, log_p.shape[-1])
            block = _slope(log_p, entropies, by_logprob, by_entropy, entropy=entropy)
            block.scatter_add_(-1, place.unsqueeze(-1), torch.where(inside, by_logprob, 0.0).unsqueeze(-1))
            with torch.autocast(x.device.type, enabled=False):
                grad_x += block @ weight
                if grad_head is not None:
                    grad_head[at] = block.T @ x
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[live] = grad_x.to(hidden.dtype)
        return grad_hidden, grad_head, None, None, None


def _p_log_p(p: Tensor, log_p: Tensor) -> Tensor:
    """p·log p with 0·log 0 = 0."""
    return (p * log_p).masked_fill_(p == 0, 0.0)


def _slope(log_p: Tensor, entropies: Tensor, by_logprob: Tensor, by_entropy: Tensor, *, entropy: bool) -> Tensor:
    """The gradient by the scaled logits, but for `by_logprob` at the tokens themselves.

    ∂ log p_t/∂z_j = [j = t] − p_j and ∂H/∂z_j = −p_j·(log p_j + H). A new tensor.
    """
    p = log_p.exp()
    if not entropy:
        return p.mul_(-by_logprob.unsqueeze(-1))
    terms = _p_log_p(p, log_p).mul_(-by_entropy.unsqueeze(-1))
    return terms.sub_(p.mul_((by_logprob + by_entropy * entropies).unsqueeze(-1)))


def _vocabulary_blocks(x: Tensor, head: Tensor) -> list[slice]:
    """Slices of the head's rows such that neither their logits nor they themselves pass BLOCK_ELEMENTS."""
    width = max(1, BLOCK_ELEMENTS // max(*x.shape, 1))
    return [slice(start, start + width) for start in range(0, head.shape[0], width)]


def _logits(x: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """In the dtype of `x`: under autocast, too, a product of float32 stays one."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ weight.T).div_(temperature)


def _places(ids: Tensor, at: slice, width: int) -> tuple[Tensor, Tensor]:
    """The ids counted from the block's start, forced into it, and whether they were in it."""
    place = ids - at.start
    return place.clamp(0, width - 1), (place >= 0) & (place < width)
