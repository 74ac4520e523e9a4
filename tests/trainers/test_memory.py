"""What is as wide as the vocabulary is never held whole in float32, forward or backward: every tensor is looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers import logprobs, tensors
from trainers.jsd import likeliest
from trainers.logprobs import token_logprobs
from trainers.losses import generalized_jsd, topk_jsd

LIMIT, TOKENS, VOCABULARY, WIDTH = 4096, 256, 1000, 16


class LargestFloat32(TorchDispatchMode):
    """Records the largest tensor of float32 or wider that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", LIMIT)
    monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", LIMIT)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def is_bounded(seen: LargestFloat32) -> bool:
    return TOKENS <= seen.numel <= LIMIT  # the results are float32, so less would mean that nothing was seen


LEADING = pytest.mark.parametrize("leading", [(256,), (4, 64), (1, 256)])


def test_the_measure_sees_what_plain_torch_makes():
    logits = bf16(TOKENS, VOCABULARY).requires_grad_()
    with LargestFloat32() as seen:
        logits.float().log_softmax(dim=-1)[:, 0].sum().backward()
    assert seen.numel == TOKENS * VOCABULARY


@LEADING
def test_log_probabilities_from_logits(leading):
    # the last position predicts nothing and is cut off, as a learner does: a view that cannot be flattened
    logits = bf16(*leading[:-1], leading[-1] + 1, VOCABULARY).requires_grad_()
    with LargestFloat32() as seen:
        ids = torch.zeros(leading, dtype=torch.int64)
        got = token_logprobs(logits[..., :-1, :], ids, entropy=True, temperature=0.9)
        sum(x.sum() for x in got).backward()
    assert is_bounded(seen)


@LEADING
def test_the_likeliest_tokens(leading):
    logits = bf16(*leading, VOCABULARY)
    with LargestFloat32() as seen:
        likeliest(logits, 8)
    assert is_bounded(seen)


@LEADING
def test_log_probabilities_from_hidden_states(leading):
    hidden, head = bf16(*leading, WIDTH).requires_grad_(), bf16(VOCABULARY, WIDTH, seed=1).requires_grad_()
    with LargestFloat32() as seen:
        got = token_logprobs(hidden, torch.zeros(leading, dtype=torch.int64), entropy=True, head=head)
        sum(x.sum() for x in got).backward()
    assert is_bounded(seen)


@LEADING
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences(leading, beta):
    student, teacher = bf16(*leading, VOCABULARY).requires_grad_(), bf16(*leading, VOCABULARY, seed=1)
    teacher_logprobs, ids = teacher.float().log_softmax(-1).topk(8, dim=-1)
    with LargestFloat32() as seen:
        generalized_jsd(student, teacher, beta=beta, temperature=0.9).sum().backward()
        topk_jsd(student, teacher_logprobs, ids, beta=beta, temperature=0.9).sum().backward()
    assert is_bounded(seen)


PEAK = """
import sys, torch
from pathlib import Path
from trainers.logprobs import token_logprobs
from trainers.losses import generalized_jsd

def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key + ":")) / 1024

def some(seed):
    return torch.empty(4096, 32768, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(seed))

def work(student, teacher):
    if sys.argv[1] == "jsd":
        generalized_jsd(student, teacher, beta=0.5).sum().backward()
    else:
        token_logprobs(student, torch.arange(len(student)), entropy=True)[0].sum().backward()

student, teacher = some(0), some(1)
work(student[:8].clone().requires_grad_(), teacher[:8])  # what is loaded with the first use
student.requires_grad_()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
work(student, teacher)
print(status("VmHWM") - before - 256)  # MiB, beside the gradient's
"""


@pytest.mark.integration  # log-softmax over 4096 × 32768: ten seconds
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of the peak")
@pytest.mark.parametrize("what", ["jsd", "logprobs"])
def test_at_32k_vocabulary_and_4k_tokens_the_process_needs_less_than_one_such_tensor_more(what: str) -> None:
    """Logits and their gradient are 256 MiB each in bfloat16; a [T, V] of float32 is 512 MiB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK, what], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
