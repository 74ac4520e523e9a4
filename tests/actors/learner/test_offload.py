"""Leaving the device to a generator and taking it back changes nothing, for every ZeRO stage and off-load setting.

On the CPU host and device are one, and the storages are emptied and filled all the same: a view that were forgotten
would be one of freed memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config import LearnerConfig
from actors.learner.deepspeed_ops import use_built_ops
from actors.learner.host_copies import HostCopies, tensors_of
from cluster.config.checks import cross_checks
from cluster.config.run import parse_config
from tests.support import tiny
from tests.support.forked_ranks import ForkedGroup, ForkServer
from trainers.config import TrainConfig

DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
CASES = list(itertools.product(DTYPES, (0, 1, 2, 3), ("none", "optimizer", "all")))
TOKENS = torch.arange(24).view(2, 12) % 17
STEPS = 2


def refused(dtype: str, stage: int, offload: str) -> bool:
    """What the config refuses, with its reason."""
    tree: dict[str, Any] = {
        "policy": {"model": "toy", "dtype": dtype},
        "data": {"prompts": "prompts.jsonl"},
        "rewards": [{"type": "function", "path": "share.py:share"}],
        "algorithm": {"type": "grpo"},
        "learners": {"zero_stage": stage, "offload": offload},
    }
    problems = cross_checks(parse_config(tree))
    assert {problem.where for problem in problems} <= {"learners.zero_stage", "learners.offload"}
    return bool(problems)


WORKING = [case for case in CASES if not refused(*case)]


def test_what_the_config_refuses() -> None:
    """Stage 0 keeps no masters in bfloat16 and shards nothing to off-load; only stage 3 off-loads weights."""
    refused_ones = set(CASES) - set(WORKING)
    assert {c for c in refused_ones if c[1:] == (0, "none")} == {("bfloat16", 0, "none")}
    assert {c[1:] for c in refused_ones} == {(0, "none"), (0, "optimizer"), (0, "all"), (1, "all"), (2, "all")}
    assert len(WORKING) == 8 + 7


def small_model(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config).to(getattr(torch, dtype))
    return model


def engine_of(dtype: str, stage: Any, offload: Any, *, adapter: bool = False) -> Any:
    from actors.learner.deepspeed_engine import TrainingEngine

    model = small_model(dtype)
    if adapter:  # as an adapter's: most weights are frozen
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name)
    return TrainingEngine(
        model,
        learner=LearnerConfig(zero_stage=stage, offload=offload),
        train=TrainConfig(learning_rate=0.01, max_grad_norm=0.1),
        dtype=dtype,
        total_steps=STEPS,
    )


def loss_of(engine: Any) -> Tensor:
    logits = engine(input_ids=TOKENS).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def train(engine: Any, *, sharing: bool) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and norms of some steps, and the weights at the end; between steps the device is left and taken back."""
    losses, norms = [], []
    for _ in range(STEPS):
        if sharing:
            engine.reload()  # the first one: of nothing
        for _ in range(2):
            loss = loss_of(engine)
            engine.backward(loss / 2)
        losses.append(loss.item())
        norms.append(engine.step())
        if sharing:
            with torch.no_grad():
                before = loss_of(engine)
                engine.offload()
                assert loss_of(engine).item() == before.item()  # canaries
            assert all(torch.isfinite(tensor).all() for _, tensor in engine.weights())  # what is sent
    return losses, norms, dict(engine.weights())


def memory(engine: Any) -> int:
    """Bytes of the optimizer's states, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in engine.module.parameters()}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(engine._engine.optimizer)
    }
    return sum(size for place, size in storages.items() if place not in weights)


class OnlyRank:
    """A learner's only rank, in a process of its own: DeepSpeed keeps gigabytes of buffers of every engine."""

    def __init__(self, store: Path) -> None:
        use_built_ops()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)

    def share(self, dtype: str, stage: int, offload: str, adapter: bool) -> None:
        """Losses, norms and weights of a run that shares its device are those of one that does not."""
        alone = train(engine_of(dtype, stage, offload, adapter=adapter), sharing=False)
        engine = engine_of(dtype, stage, offload, adapter=adapter)
        shared = train(engine, sharing=True)
        assert shared[:2] == alone[:2]
        assert alone[0][-1] < alone[0][0]  # it learns
        assert alone[2].keys() == shared[2].keys()
        for name, tensor in alone[2].items():
            assert torch.equal(tensor, shared[2][name]), name
        away = memory(engine)
        engine.reload()
        trained = sum(tensor.numel() for tensor in alone[2].values())
        assert memory(engine) - away >= 8 * trained  # at least Adam's two moments in float32

    def leave_whole(self, stage: Any) -> None:
        """Frozen models and critics leave with their weights, and come back as they were."""
        from actors.learner.deepspeed_engine import FrozenEngine

        frozen = FrozenEngine(small_model("bfloat16"), learner=LearnerConfig(zero_stage=stage), dtype="bfloat16")
        trained = engine_of("float32", stage, "none")
        for engine, module in ((frozen, frozen._module), (trained, trained.module)):
            before = engine(input_ids=TOKENS).logits.detach().clone()
            kept = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in module.parameters()]
            for _ in range(2):
                for _ in range(2):  # the second does nothing
                    engine.offload(**({} if engine is frozen else {"weights": True}))
                assert {tensor.untyped_storage().nbytes() for tensor in kept} == {0}
                engine.reload()
                assert torch.equal(engine(input_ids=TOKENS).logits, before)


tiny.by_value(__name__)


@pytest.fixture
def only_rank(fork_server: ForkServer, tmp_path: Path) -> Iterator[ForkedGroup]:
    with fork_server.group([partial(OnlyRank, tmp_path / "store")], [tmp_path / "learner-0.log"]) as ranks:
        yield ranks


COVERING = {("float32", 0, "none", False), ("bfloat16", 1, "none", False), ("bfloat16", 2, "optimizer", False)}
COVERING |= {("bfloat16", 3, "all", False), ("bfloat16", 2, "none", True)}
ALL = [(*case, False) for case in WORKING] + [("bfloat16", stage, "none", True) for stage in (1, 2, 3)]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("dtype", "stage", "offload", "adapter"),
    [pytest.param(*case, marks=() if case in COVERING else pytest.mark.extended) for case in ALL],
)
def test_a_run_that_shares_its_device_is_the_one_that_does_not(
    only_rank: ForkedGroup, dtype: str, stage: int, offload: str, adapter: bool
) -> None:
    tiny.run(only_rank.each("share", lambda a, _: a.share.remote(dtype, stage, offload, adapter), deadline_s=240))


@pytest.mark.integration
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.extended), 3])
def test_frozen_models_and_critics_leave_with_their_weights(only_rank: ForkedGroup, stage: int) -> None:
    tiny.run(only_rank.each("leave", lambda a, _: a.leave_whole.remote(stage), deadline_s=240))


def test_views_and_gradients_come_back_and_what_is_kept_stays() -> None:
    flat = torch.arange(12.0)
    view, kept = flat[3:6].view(3, 1), torch.ones(3)
    leaf = nn.Parameter(torch.zeros(2))
    leaf.grad = torch.tensor([1.0, 2.0])
    host = HostCopies()
    for _ in range(2):
        host.take([flat, view, kept, *tensors_of([{"a": (leaf,)}])], device=flat.device, keep=[kept[1:]])
        assert [t.untyped_storage().nbytes() for t in (flat, view, leaf, leaf.grad, kept)] == [0, 0, 0, 0, 12]
        host.restore()
        host.restore()
        assert view.flatten().tolist() == [3.0, 4.0, 5.0]
        assert leaf.grad.tolist() == [1.0, 2.0]
    flat[4] = 7
    assert view[1].item() == 7


def test_what_is_on_another_device_stays() -> None:
    host, there = HostCopies(), torch.ones(2)
    host.take([there], device=torch.device("meta"))
    assert there.tolist() == [1.0, 1.0]
