"""Runs against the fakes, for the tests of the driver.

Prompts, stream, recorder, checkpoints, algorithm and packing are the real ones; only the roles are fakes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.fakes import Event, FakeScorer, World, fake_roles
from actors.protocols import Scorer
from cluster.config.run import RunConfig, parse_config
from cluster.runs.checkpoint import CheckpointStore, DriverState
from cluster.runs.metrics_jsonl import read_metrics
from cluster.runs.recorder import Recorder
from cluster.training.driver import Data, Driver, Sinks
from trainers.algorithms.catalog import make_algorithm
from trainers.data.reader import open_prompts
from trainers.data.stream import PromptStream
from trainers.types import Prompt

PROMPTS, STEPS, PER_STEP, N = 5, 6, 2, 4
SAMPLES = PER_STEP * N


def make_config(directory: Path, **sections: Any) -> RunConfig:
    """A run of six steps, two prompts each (the stream's epoch ends within a step), four completions a prompt."""
    prompts = directory / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(PROMPTS)))
    tree: dict[str, Any] = {
        "seed": 3,
        "policy": {"model": "toy", "dtype": "float32"},
        "data": {"prompts": str(prompts)},
        "rewards": [{"type": "function", "path": "share.py:share"}],
        "algorithm": {"type": "grpo"},
        "sampling": {"n": N, "max_tokens": 6},
        "train": {"steps": STEPS, "prompts_per_step": PER_STEP, "learning_rate": 0.5},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


class Encoder:
    def encode(self, prompt: Prompt) -> list[int]:
        return [ord(c) for c in prompt.messages[0]["content"]]


class Silent:
    """Implements `Progress`; remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def start(self, *, steps: int, done: int) -> None: ...

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def waiting(self, since: object) -> None: ...

    def step(self, metrics: object) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Run:
    """One process's life of a run in `directory`: a fresh world, and whatever the disk holds."""

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        *,
        evaluate: int = 0,
        normalize: bool = False,
        scorer: Scorer | None = None,
        sinks: Sequence[str] = ("jsonl",),
    ) -> None:
        """`scorer` instead of the fake one."""
        self.directory, self.world, self.progress = directory, World(weight=0.1), Silent()
        algorithm = make_algorithm(config.algorithm, config.train)
        self.scorer = FakeScorer(self.world, normalize=normalize)
        fakes = fake_roles(self.world, algorithm, train=config.train, sampling=config.sampling)
        self.roles = replace(fakes, scorer=scorer or self.scorer)
        prompts = open_prompts(config.data.prompts)
        data = Data(
            stream=PromptStream(prompts, seed=config.seed),
            eval_prompts=[prompts[i] for i in range(evaluate)],
            encoder=Encoder(),
        )
        self.recorder = Recorder(directory, sinks=sinks)
        self.checkpoints = CheckpointStore(directory / "checkpoints", config.checkpoint.keep)
        self.driver = Driver(
            config,
            self.roles,
            data,
            Sinks(recorder=self.recorder, checkpoints=self.checkpoints, progress=self.progress),
            algorithm=algorithm,
        )

    async def run(self) -> Run:
        """From the last checkpoint, or the beginning, to the end."""
        if (checkpoint := self.checkpoints.latest()) is None:
            self.recorder.truncate_after(-1)
        else:
            await self.driver.restore(checkpoint, self.state())
            self.recorder.truncate_after(checkpoint.step)
        await self.driver.run()
        return self

    def state(self) -> DriverState:
        """Of the last checkpoint."""
        checkpoint = self.checkpoints.latest()
        assert checkpoint is not None
        return self.checkpoints.load_state(checkpoint.path)

    def at(self, kind: str, nth: int, act: Callable[[], Awaitable[None] | None]) -> None:
        """Do something at the n-th event of a kind, from 1."""

        async def interfere(event: Event) -> None:
            if event.kind == kind and sum(e.kind == kind for e in self.world.events) == nth:
                result = act()
                if result is not None:
                    await result

        self.world.interfere = interfere

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.directory / "metrics.jsonl")

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.metrics]

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.directory / f"rollouts/step-{step:06d}.parquet").to_pylist()
        return rows

    def recorded(self) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Everything that must not depend on when or how often a run was interrupted."""
        metrics = [
            {k: v for k, v in row.items() if not k.startswith(("time", "throughput/")) and k != "weights/sync_s"}
            for row in self.metrics
        ]
        files = sorted((self.directory / "rollouts").iterdir())
        return metrics, {file.name: pq.read_table(file).to_pylist() for file in files}


class KilledError(Exception):
    """Stands for the end of the process: nothing is saved."""


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


async def forever() -> None:
    await asyncio.Event().wait()


def new_run(tmp_path: Path, name: str = "run", *, evaluate: int = 0, normalize: bool = False, **sections: Any) -> Run:
    (tmp_path / name).mkdir(exist_ok=True)
    return Run(tmp_path / name, make_config(tmp_path, **sections), evaluate=evaluate, normalize=normalize)


async def nothing_is_under_way() -> bool:
    await asyncio.sleep(0)  # what was cancelled ends
    return asyncio.all_tasks() == {asyncio.current_task()}
