"""The algorithms, one file each; a new one is a file, a config and a line in `ALGORITHMS`."""

from __future__ import annotations

from trainers.algorithms.base import Algorithm
from trainers.algorithms.config import AlgorithmConfig
from trainers.algorithms.grpo import GRPO
from trainers.config import TrainConfig

ALGORITHMS = {"grpo": GRPO}


def make_algorithm(config: AlgorithmConfig, train: TrainConfig) -> Algorithm:
    """The algorithm that `config.type` names."""
    return ALGORITHMS[config.type](config, train.importance_correction)
