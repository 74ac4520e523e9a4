"""The order in which launched roles start, and what a person sees of it; the roles are fakes, nothing starts Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from actors.modeling.policy_source import Origin
from cluster.config.run import parse_config
from cluster.runs.directory import RunDirectory
from cluster.training.recording import Recording
from cluster.training.roles import Launched
from cluster.training.run_spec import Merge, RunSpec, derive_spec
from tests.support.fake_runs import Silent
from trainers.adapter_folder import AdapterConfig, AdapterFolder


@dataclass
class Calls:
    """Every call that a role got, in order; `start` takes a few turns of the loop, so that others can overtake."""

    log: list[str] = field(default_factory=list)

    async def slowly(self, name: str) -> None:
        self.log.append(f"{name} begins")
        for _ in range(5):
            await asyncio.sleep(0)
        self.log.append(f"{name} ready")


@dataclass
class Actors:
    """The actors of one role."""

    role: str
    calls: Calls
    actors: tuple[int, ...] = (0,)

    async def each(self, phase: str, call: object, *, deadline_s: float) -> None:
        self.calls.log.append(f"{self.role}: {phase}")


class Group:
    """Generators, a teacher or learners."""

    def __init__(self, role: str, calls: Calls, count: int = 1) -> None:
        self.actors = Actors(role, calls, tuple(range(count)))
        self._calls = calls

    async def start(self) -> None:
        await self._calls.slowly(self.actors.role)

    async def merge(self, policy: object, adapter: object, directory: str) -> None:
        await self._calls.slowly(f"merge to {directory}")

    async def write_base(self, directory: str) -> None:
        await self._calls.slowly(f"base to {Path(directory).name}")


class Scorer:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def start(self, *, deadline_s: float) -> None:
        await self._calls.slowly("rewards")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "run", config_of())


def config_of(**sections: Any) -> Any:
    tree = {
        "policy": {"model": "/models/base"},
        "data": {"prompts": "p.jsonl"},
        "rewards": [{"type": "http", "name": "judge", "url": "http://judge/score"}],
        "algorithm": {"type": "grpo"},
    }
    return parse_config(tree | sections)


def spec_of(config: Any, run: RunDirectory, *, gpus: bool = False) -> RunSpec:
    return derive_spec(config, Origin(policy=config.policy), run, gpus=gpus)


def start(spec: RunSpec, run: RunDirectory, *, learners: int = 1, teacher: bool = False) -> tuple[list[str], list[str]]:
    """What was called, and the parts that were waited for."""
    calls = Calls()
    recording = Recording(Silent(), run)
    roles: Any = {
        "generators": Group("generator", calls),
        "teacher": Group("teacher", calls) if teacher else None,
        "learners": Group("learner", calls, learners),
        "scorer": Scorer(calls),
    }
    asyncio.run(Launched(spec=spec, progress=recording, **roles).start())
    return calls.log, sorted(recording.parts)


def test_all_start_at_once_where_none_waits_for_another(run: RunDirectory) -> None:
    log, parts = start(spec_of(config_of(), run), run, learners=3)
    assert log[:3] == ["rewards begins", "learner begins", "generator begins"]
    assert parts == ["loading 3 learners", "loading generator 0 (vLLM)", "starting rewards (judge)"]


def test_on_shared_gpus_the_generators_wait_until_the_learners_have_left(run: RunDirectory) -> None:
    log, _ = start(spec_of(config_of(placement="colocated"), run, gpus=True), run)
    assert [entry for entry in log if "rewards" not in entry] == [
        "learner begins",
        "learner ready",
        "learner: offload",
        "generator begins",
        "generator ready",
    ]


def test_a_base_is_written_before_the_generators_load_it(run: RunDirectory) -> None:
    config = config_of(policy={"model": "/models/base", "train_type": "qlora"})
    log, parts = start(spec_of(config, run), run)
    order = ["learner ready", "base to base begins", "base to base ready", "generator begins"]
    assert [entry for entry in log if entry in order] == order
    assert "writing the de-quantized base" in parts


def test_an_adapter_is_merged_before_anything_loads_it(run: RunDirectory) -> None:
    adapter = AdapterFolder(path=Path("/models/adapter"), base="/models/base", config=AdapterConfig(), tensors={})
    config = config_of()
    spec = replace(spec_of(config, run), merge=Merge(policy=config.policy, adapter=adapter, directory="merged"))
    log, parts = start(spec, run)
    assert log[:2] == ["merge to merged begins", "merge to merged ready"]
    assert "merging the adapter" in parts


def test_a_teacher_writes_with_the_weights_that_it_was_loaded_with(run: RunDirectory) -> None:
    log, parts = start(spec_of(config_of(), run), run, teacher=True)
    assert log[-1] == "teacher: resume"
    assert "loading teacher 0 (vLLM)" in parts


def test_without_rewards_nothing_of_them_is_started(run: RunDirectory) -> None:
    log, _ = start(replace(spec_of(config_of(), run), rewards=()), run)
    assert not [entry for entry in log if "rewards" in entry]
