"""What learners send of a model that transformers cut and renamed: its checkpoint's tensors, on every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.learner.actor import Learner
from tests.support import tiny
from tests.support.families import make_family
from tests.support.learning import Cut, Ranks, grpo, learner_spec

pytestmark = pytest.mark.integration
tiny.by_value(__name__)


class Sending(Learner):
    """Hands out what it would send."""

    def sent(self) -> tuple[list[tuple[str, torch.dtype, tuple[int, ...]]], Mapping[str, torch.Tensor]]:
        source = self._models.policy.exported_weights()
        infos = [(info.name, info.dtype, tuple(info.shape)) for info in source.infos()]
        passes = [[(name, tensor.cpu()) for name, tensor in source] for _ in range(2)]  # it can be iterated again
        assert [name for name, _ in passes[0]] == [name for name, _ in passes[1]]
        assert [(n, t.dtype, tuple(t.shape)) for n, t in passes[1]] == infos
        return infos, dict(passes[1])


@pytest.mark.parametrize("cut", [Cut(1, 1, 1000, 0), Cut(3, 2, 1000, 0)], ids=str)
def test_a_mixture_is_sent_as_its_checkpoint_is_written(ranks: Ranks, tmp_path: Path, cut: Cut) -> None:
    path = make_family("mixtral", tmp_path / "model")
    written = load_file(path / "model.safetensors")
    with ranks.learners(learner_spec(path, grpo(), cut), cut, tmp_path, cls=Sending) as group:
        answers = tiny.run(group.actors.each("send", lambda a, _: a.sent.remote(), deadline_s=60))
    for infos, sent in answers:
        assert sent.keys() == written.keys()
        assert len(infos) == len(written)
        for name, tensor in written.items():
            assert torch.equal(sent[name], tensor), name
