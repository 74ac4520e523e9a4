"""What a config's roles are built from, worked out by hand; no Ray, no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.config import PolicyConfig
from actors.modeling.policy_source import Origin
from cluster.config.run import RunConfig, parse_config
from cluster.runs.directory import RunDirectory
from cluster.training.run_spec import RunSpec, derive_spec
from trainers.adapter_folder import AdapterConfig, AdapterFolder

RUN = RunDirectory(Path("/runs/20250131-run-abc"))


def config_of(**sections: Any) -> RunConfig:
    tree = {
        "policy": {"model": "/models/base", "dtype": "float32"},
        "data": {"prompts": "p.jsonl", "max_prompt_tokens": 100},
        "rewards": [{"type": "http", "url": "http://judge/score"}],
        "algorithm": {"type": "grpo"},
        "sampling": {"n": 4, "max_tokens": 28},
        "train": {"steps": 10, "updates_per_step": 2, "epochs_per_step": 3},
    }
    return parse_config(tree | sections)


def spec_of(config: RunConfig, *, gpus: bool = False, **origin: Any) -> RunSpec:
    return derive_spec(config, Origin(policy=config.policy, **origin), RUN, gpus=gpus)


def test_a_full_policy_on_the_cpu() -> None:
    spec = spec_of(config_of())
    assert (spec.run_id, spec.logs) == ("20250131-run-abc", RUN.logs)
    assert list(spec.layout.bundles) == [{"CPU": 1.0}, {"CPU": 1.0}]
    engine = spec.policy_engine
    assert (engine.model, engine.dtype, engine.max_model_len) == ("/models/base", "float32", 128)
    assert (engine.transport, engine.adapter) == ("ray", None)
    assert (spec.learner.total_optimizer_steps, spec.learner.critic_optimizer_steps) == (60, 60)
    assert (spec.teacher_engine, spec.merge, spec.base, spec.shares_gpus) == (None, None, None, False)
    assert [reward.weight for reward in spec.rewards] == [1.0]
    assert (spec.canaries.prompts, spec.canaries.limits.quantile) == (4, 1e-3)


def test_every_timeout_arrives_and_room_is_not_waited_for_as_long() -> None:
    timeouts = {"start_s": 600, "generate_s": 2, "update_s": 3, "sync_s": 4, "save_s": 5}
    spec = spec_of(config_of(timeouts=timeouts))
    deadlines = spec.deadlines
    assert (deadlines.start, deadlines.generate, deadlines.update) == (600, 2, 3)
    assert (deadlines.sync, deadlines.save, spec.learner.collective_timeout_s) == (4, 5, 3)
    assert spec.place_s == 120
    assert spec_of(config_of(timeouts={"start_s": 60})).place_s == 60


@pytest.mark.parametrize(
    ("sections", "gpus", "transport", "shared"),
    [
        ({}, False, "ray", False),
        ({}, True, "nccl", False),
        ({"placement": "colocated"}, True, "ipc", True),
        ({"placement": "colocated"}, False, "ray", False),
        ({"sync": {"transport": "ray"}}, True, "ray", False),
        ({"policy": {"model": "m", "train_type": "lora"}}, True, "ray", False),
    ],
)
def test_the_transport(sections: dict[str, Any], gpus: bool, transport: str, shared: bool) -> None:
    spec = spec_of(config_of(**sections), gpus=gpus)
    assert (spec.transport, spec.policy_engine.transport, spec.shares_gpus) == (transport, transport, shared)


def test_nccl_joins_rank_0_and_every_engine_worker() -> None:
    """Two engines of four workers each, and the rank that sends: nine."""
    spec = spec_of(config_of(generators={"replicas": 2, "tensor_parallel": 4}, learners={"workers": 3}), gpus=True)
    assert spec.transfer_world == 9


def test_qlora_serves_the_base_that_the_learners_write() -> None:
    config = config_of(policy={"model": "/models/base", "train_type": "qlora"})
    spec = spec_of(config)
    assert spec.base == RUN.base
    assert spec.policy_engine.model == str(RUN.base)
    assert (spec.learner.policy.model, spec.policy_engine.adapter) == ("/models/base", config.policy)


def test_an_adapter_that_is_merged_is_loaded_merged_by_every_role() -> None:
    config = config_of(policy={"model": "/models/adapter", "dtype": "float32"})
    adapter = AdapterFolder(path=Path("/models/adapter"), base="/models/base", config=AdapterConfig(), tensors={})
    on_base = config.policy.model_copy(update={"model": "/models/base"})
    spec = derive_spec(config, Origin(policy=on_base, merged=adapter), RUN, gpus=False)
    assert spec.merge is not None
    assert (spec.merge.policy, spec.merge.adapter, spec.merge.directory) == (on_base, adapter, str(RUN.merged))
    assert {spec.policy_engine.model, spec.learner.policy.model} == {str(RUN.merged)}


def test_an_adapter_that_is_continued_goes_to_the_learners() -> None:
    config = config_of(policy={"model": "/models/adapter", "train_type": "lora"})
    adapter = AdapterFolder(path=Path("/models/adapter"), base="/models/base", config=AdapterConfig(), tensors={})
    on_base = PolicyConfig(model="/models/base", train_type="lora")
    spec = derive_spec(config, Origin(policy=on_base, continued=adapter), RUN, gpus=False)
    assert (spec.learner.adapter, spec.learner.policy.model) == (adapter, "/models/base")
    assert (spec.policy_engine.model, spec.policy_engine.adapter) == ("/models/base", on_base)
    assert spec.merge is None


@pytest.mark.parametrize(("algorithm", "top_logprobs"), [({"lmbda": 0.5}, 1), ({"top_k": 7}, 7)])
def test_a_teacher_that_writes_or_judges_has_an_engine(algorithm: dict[str, Any], top_logprobs: int) -> None:
    """Of its own, after generator and learner; its rewards are watched, never trained on."""
    served = "top_k" in algorithm
    teacher = {"model": "/models/teacher", "served": served}
    config = config_of(algorithm={"type": "gkd", "teacher": teacher, **algorithm}, sampling={"n": 1, "max_tokens": 28})
    spec = spec_of(config)
    assert spec.teacher_engine is not None
    assert (spec.teacher_engine.model, spec.teacher_engine.top_logprobs) == ("/models/teacher", top_logprobs)
    assert list(spec.layout.teacher) == [2]
    assert [reward.weight for reward in spec.rewards] == [0.0]
