"""The blocks in which vocabulary-wide arrays are walked."""

from __future__ import annotations

import pytest
import torch

from trainers import tensors
from trainers.tensors import blocks


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 1000), (1000, 1), (0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("width", [1, 3, 10, 40, 100])
def test_blocks_cover_everything_once_and_stay_bounded(shape, width, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 40)
    seen = torch.zeros(shape, dtype=torch.int64)
    x = torch.zeros(*shape, width)
    for at in blocks(seen.shape, width):
        assert x[at].numel() <= max(40, width)
        seen[at] += 1
    assert (seen == 1).all()


def test_few_positions_that_fit_are_one_block():
    assert len(list(blocks(torch.Size([2, 3, 4]), 1000))) == 1
