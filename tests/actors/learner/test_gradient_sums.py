"""Gradients summed beside the engine: every rank reduces the same names, whatever it saw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytestmark = pytest.mark.integration  # imports DeepSpeed


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_weight_without_gradient_is_reduced_too(process_group: None) -> None:
    """Another rank may have had a gradient of it (an expert): it would wait in a collective that this one skips."""
    from actors.learner.deepspeed_engine import GradientSums

    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    sums = GradientSums([("expert.0", unused), ("expert.1", used)], world_size=1)
    (used * torch.tensor([3.0, 4.0])).sum().backward()
    (used * 10).sum().backward()
    taken = sums.take()
    assert list(taken) == ["expert.0", "expert.1"]
    assert taken["expert.0"].dtype == torch.float32
    assert taken["expert.0"].tolist() == [[0.0] * 3] * 2
    assert taken["expert.1"].tolist() == [13.0, 14.0]
    assert sums.take()["expert.1"].tolist() == [0.0, 0.0]
