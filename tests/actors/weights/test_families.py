"""Each family of architectures through a real engine: as loaded from its folder, and after syncs of other weights.

The oracle is transformers, as the learner loads and runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import PolicyConfig
from actors.messages import GenerateRequest
from actors.modeling.causal_lm import chosen_logprobs, forward, load_model
from actors.modeling.checkpoint_names import CheckpointNames
from actors.weights.transfer import pack_chunk, tensor_digest
from tests.support import tiny
from tests.support.engine_host import Engine, EngineHost
from tests.support.families import FAMILIES, make_family
from trainers.types import Completion

pytestmark = pytest.mark.integration
tiny.by_value(__name__)

LARGEST_GAP = 1e-4  # nats, in float32
# In the suite: plain, capped scores, a window that counts otherwise, experts with renamed and with padded weights, and
# one that all tokens share. The rest in `make test-all`.
SHORT = ("llama", "gemma2", "cohere2", "mixtral", "qwen3_moe", "qwen2_moe")
UNSERVED = {  # their names are tested in tests/actors/modeling/test_checkpoint_names.py; why: docs/models.md
    "gpt_oss", "deepseek_v2", "deepseek_v3", "gpt_neox", "gptj", "opt", "falcon",
}  # fmt: skip
CASES = [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.extended) for name in FAMILIES if name not in UNSERVED
]


def write(host: EngineHost, requests: Sequence[GenerateRequest]) -> list[list[Completion]]:
    return [tiny.results(futures) for futures in [host.engine.draw(request) for request in requests]]


def sync(host: EngineHost, chunks: Sequence[dict[str, Any]], version: int) -> list[dict[str, str]]:
    engine, host.changed = host.engine, True
    engine.pause().result(timeout=60)
    engine.start_update().result(timeout=60)
    for chunk in chunks:
        engine.load_weights(chunk).result(timeout=60)
    engine.finish_update().result(timeout=60)
    received: list[dict[str, str]] = engine.loaded_digests().result(timeout=60)
    engine.resume(version).result(timeout=60)
    return received


def some_requests() -> list[GenerateRequest]:
    """Of several lengths; the longer ones go beyond a window of 16 tokens."""
    return [
        tiny.group_request(f"r{i}", tiny.prompt_tokens(i, length=length), (i, i + 10), max_tokens=8)
        for i, length in enumerate((3, 12, 30))
    ]


@torch.no_grad()
def gap(model: Any, requests: Sequence[GenerateRequest], groups: Sequence[Sequence[Completion]]) -> float:
    """Largest difference from the learner's log-probabilities."""
    worst = 0.0
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            tokens = torch.from_numpy(tiny.written(request, completion)).long()[None]
            lengths = torch.tensor([tokens.shape[1]])
            expected, _ = chosen_logprobs(forward(model, tokens, lengths), tokens, lengths, temperature=1.0)
            own = expected[0, len(request.prompt) :].numpy()
            worst = max(worst, float(np.abs(own - completion.logprobs).max()))
    return worst


def load(path: Path) -> Any:
    return load_model(PolicyConfig(model=str(path), dtype="float32"))


def weights_on_the_wire(model: Any) -> list[tuple[str, torch.Tensor]]:
    form, parameters = CheckpointNames(model), dict(model.named_parameters())
    return [
        pair
        for names in form.together(parameters)
        for pair in form.convert({name: parameters[name].detach() for name in names}).items()
    ]


@pytest.mark.parametrize("family", CASES)
def test_generator_and_learner_agree_before_and_after_syncs(engine: Engine, tmp_path: Path, family: str) -> None:
    """Two syncs, for what the first one leaves behind."""
    paths = [make_family(family, tmp_path / str(seed), seed=seed) for seed in range(2)]
    engine.use(tiny.engine_spec(paths[0]))
    requests, models = some_requests(), [load(path) for path in paths]
    written = engine(write, requests)
    assert gap(models[0], requests, written) < LARGEST_GAP
    assert gap(models[1], requests, written) > 0.5  # what the next lines would see
    for version, model in ((1, models[1]), (2, models[0])):
        named = weights_on_the_wire(model)
        chunks = [pack_chunk(named[i : i + 5]) for i in range(0, len(named), 5)]
        assert engine(sync, chunks, version) == [{name: tensor_digest(tensor) for name, tensor in named}]
        assert gap(model, requests, engine(write, requests)) < LARGEST_GAP
