"""The examples of docs/extending.md, run: each is added to its table, and a run on the fakes uses them together."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from actors.rewards.catalog import SOURCES
from actors.rewards.checks import validate_rewards
from actors.rewards.scorer import Scorer
from actors.weights.transports import TRANSPORTS, choose_transport, make_sender, transport_problem
from cluster.config.checks import cross_checks
from cluster.config.run import RunConfig
from cluster.config.warnings import advise
from cluster.models.inspect import ModelInfo
from cluster.planning.memory import learner_memory
from cluster.runs.metrics_sinks import SINKS
from tests.support import fake_runs
from trainers.algorithms.catalog import ALGORITHMS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(# (\S+?\.py).*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
RECEIVER = "actors/weights/file_receiver.py"  # imports vLLM


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """A module with everything that the page defines, but for what imports vLLM."""
    module = ModuleType("extending_page")
    sys.modules[module.__name__] = module  # where dataclasses and pydantic look for it
    for source, place in BLOCKS:
        if place != RECEIVER:
            exec(compile(source, f"{PAGE.name}: {place}", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(autouse=True)
def tables(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that the page adds."""
    monkeypatch.setitem(ALGORITHMS, "a2c", page.A2C)
    monkeypatch.setitem(SOURCES, "pattern", page.PatternSource)
    monkeypatch.setitem(SINKS, "csv", page.CsvSink)
    monkeypatch.setitem(TRANSPORTS, "file", page.FILE)  # type: ignore[misc]


@pytest.fixture
def config(page: ModuleType, tmp_path: Path) -> RunConfig:
    """A run with the new algorithm and the new reward, whose names are in the unions."""
    extended = type(
        "Extended",
        (RunConfig,),
        {"__annotations__": {"algorithm": page.A2CConfig, "rewards": tuple[page.PatternReward, ...]}},
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(4)))
    tree: dict[str, Any] = {
        "seed": 3,
        "policy": {"model": "toy", "dtype": "float32"},
        "data": {"prompts": str(tmp_path / "prompts.jsonl")},
        "rewards": [{"type": "pattern", "pattern": "b", "name": "has_b"}],
        "algorithm": {"type": "a2c", "kl": {"coef": 0}},
        "sampling": {"n": 4, "max_tokens": 6},
        "train": {"steps": 3, "prompts_per_step": 2, "learning_rate": 0.5},
        "checkpoint": {"every": 0},
    }
    config: RunConfig = extended.model_validate_json(json.dumps(tree), strict=True)
    return config


@pytest.fixture
async def run(config: RunConfig, tmp_path: Path) -> fake_runs.Run:
    scorer = Scorer(config.scored_rewards, base_dir=tmp_path, run_id="run")
    await scorer.start(deadline_s=30)
    (tmp_path / "run").mkdir()
    return await fake_runs.Run(tmp_path / "run", config, scorer=scorer, sinks=("jsonl", "csv")).run()


def test_the_page_has_every_example() -> None:
    assert len(BLOCKS) == 8


async def test_the_new_source_judges_and_the_new_algorithm_learns_with_its_critic(run: fake_runs.Run) -> None:
    first = run.rollouts(1)
    rewards = np.array([row["reward"] for row in first])
    lengths = np.array([len(row["tokens"]) for row in first])
    assert rewards.tolist() == [float("b" in row["completion"]) for row in first]
    assert {tuple(dict(row["rewards"])) for row in first} == {("has_b",)}
    loss = float((rewards**2 / 2 * lengths).sum() / lengths.sum())  # of a critic that says 0
    assert run.metrics[0]["value/loss"] == pytest.approx(loss, rel=1e-6)
    assert first[0]["advantage"] == pytest.approx(rewards[0])  # reward − 0
    value = 0.5 * float((rewards * lengths).sum() / lengths.sum())  # after one step of gradient descent at rate 0.5
    second = run.rollouts(2)[0]
    assert second["advantage"] == pytest.approx(second["reward"] - value, abs=1e-6)


async def test_the_new_sink_has_what_the_jsonl_has(run: fake_runs.Run) -> None:
    rows = list(csv.reader((run.directory / "metrics.csv").read_text().splitlines()))
    found = {(int(step), name): float(value) for step, name, value in rows}
    assert found == {(row["step"], name): v for row in run.metrics for name, v in row.items() if v is not None}


def test_the_plan_knows_the_new_critic(config: RunConfig) -> None:
    assert cross_checks(config) == []
    assert "algorithm.critic.learning_rate" in {warning.where for warning in advise(config)}  # far below the policy's
    memory = learner_memory(config, ModelInfo(name="toy", config={}, parameters=1000))
    assert memory is not None
    assert memory.device["critic"] > 0
    late = config.algorithm.model_copy(
        update={"critic": config.algorithm.critic.model_copy(update={"warmup_steps": 3})}
    )  # type: ignore[union-attr]
    problems = cross_checks(config.model_copy(update={"algorithm": late}))
    assert [problem.where for problem in problems] == ["algorithm.critic.warmup_steps"]


def test_a_wrong_pattern_is_found_before_anything_starts(page: ModuleType, tmp_path: Path) -> None:
    (problem,) = validate_rewards([page.PatternReward(type="pattern", pattern="(")], tmp_path)
    assert problem.where == "rewards.0.pattern"
    assert "is not a regular expression" in problem.message


class Client:
    """The generators' side: what each call brings."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(update_info)

    def finish_weight_update(self) -> None:
        self.calls.append("finish")


def test_the_new_transport_sends(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    client = Client()
    route = page.Route(transport="file", deadline_s=1)
    sent = [make_sender(route, weights.items(), client, rank=rank).send() for rank in (0, 1)]  # type: ignore[arg-type]
    start, update, finish = client.calls
    assert (start, finish) == ("start", "finish")
    received = load_file(update["path"])
    assert {name: page.tensor_digest(tensor) for name, tensor in received.items()} == sent[0].digests
    assert sent[0].bytes == 32
    assert not sent[1].digests


def test_the_new_transport_is_chosen_only_where_it_fits() -> None:
    wanted: Any = "file"
    assert choose_transport(wanted, placement="split", gpus=True, adapter=False) == "file"
    assert transport_problem(wanted, placement="split", adapter=False) is None
    assert transport_problem(wanted, placement="colocated", adapter=False) == "a file is for split placements"
    assert transport_problem(wanted, placement="split", adapter=True) == (
        "transport: file cannot send an adapter; use auto or ray"
    )


@pytest.mark.integration  # imports vLLM: seconds
def test_the_new_receiver_loads_a_file_and_proves_it(page: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    [source] = [source for source, place in BLOCKS if place == RECEIVER]
    names: dict[str, Any] = {"__name__": page.__name__}
    exec(compile(source, PAGE.name, "exec"), names)

    class Model:
        def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
            self.loaded = dict(weights)

    weights = {"a": torch.arange(6.0), "b": torch.ones(2)}
    save_file(weights, tmp_path / "w.safetensors")
    engine = object.__new__(names["FileEngine"])
    engine.received, engine.model, engine.device = {}, Model(), torch.device("cpu")
    engine.receive_weights(names["FileUpdateInfo"](path=str(tmp_path / "w.safetensors")))
    assert all(torch.equal(engine.model.loaded[name], tensor) for name, tensor in weights.items())
    assert engine.received == {name: page.tensor_digest(tensor) for name, tensor in weights.items()}
