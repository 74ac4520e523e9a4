"""Which class implements which `algorithm.type`. Not in `__init__`, so that reading a config loads no torch."""

from __future__ import annotations

from trainers.algorithms.base import Algorithm
from trainers.algorithms.config import AlgorithmConfig
from trainers.algorithms.grpo import GRPO
from trainers.config import TrainConfig

ALGORITHMS = {"grpo": GRPO}


def make_algorithm(config: AlgorithmConfig, train: TrainConfig) -> Algorithm:
    """The algorithm that `config.type` names."""
    return ALGORITHMS[config.type](config, train.importance_correction)
