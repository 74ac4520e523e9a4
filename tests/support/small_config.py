"""The smallest config that a run's directory and a resume can tell apart, for tests that need no policy and no data."""

from __future__ import annotations

from pathlib import Path

from cluster.runs.directory import RunDirectory
from trainers.config import Config, SamplingConfig, TrainConfig


class EvalConfig(Config):
    every: int = 10


class RewardConfig(Config):
    path: str
    timeout_s: float = 10.0


class RunConfig(Config):
    name: str = "haiku"
    seed: int = 0
    root: str = "runs"
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig(steps=20)
    eval: EvalConfig = EvalConfig()
    rewards: tuple[RewardConfig, ...] = (RewardConfig(path="r.py:reward"),)


def create(root: Path, config: RunConfig | None = None) -> RunDirectory:
    config = config or RunConfig()
    return RunDirectory.create(root, config.name, config)
