"""Which class implements which `algorithm.type`. Not in `__init__`, so that reading a config loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainers.algorithms.base import Algorithm
from trainers.algorithms.config import AlgorithmConfig
from trainers.algorithms.gkd import GKD
from trainers.algorithms.grpo import GRPO
from trainers.algorithms.ppo import PPO
from trainers.config import ImportanceConfig, TrainConfig

ALGORITHMS: dict[str, Callable[[Any, ImportanceConfig | None], Algorithm]] = {"grpo": GRPO, "ppo": PPO, "gkd": GKD}


def make_algorithm(config: AlgorithmConfig, train: TrainConfig) -> Algorithm:
    """The algorithm that `config.type` names. Raises UserError where `train` asks for what it cannot do."""
    return ALGORITHMS[config.type](config, train.importance_correction)
