"""The algorithms' config: defaults, what is refused and why, and the table that makes an algorithm of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from trainers.algorithms.catalog import make_algorithm
from trainers.algorithms.config import AlgorithmConfig, GKDConfig, GRPOConfig, PPOConfig
from trainers.algorithms.gkd import GKD
from trainers.algorithms.grpo import GRPO
from trainers.algorithms.ppo import PPO
from trainers.config import TrainConfig
from trainers.errors import UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(AlgorithmConfig)
GKD_TREE = {"type": "gkd", "teacher": {"model": "t"}}


def test_the_type_chooses_the_config_and_the_algorithm() -> None:
    for tree, config, algorithm in (
        ({"type": "grpo"}, GRPOConfig, GRPO),
        ({"type": "ppo"}, PPOConfig, PPO),
        (GKD_TREE, GKDConfig, GKD),
    ):
        found = ADAPTER.validate_python(tree)
        assert type(found) is config
        assert type(make_algorithm(found, TrainConfig())) is algorithm
        assert ADAPTER.validate_python(found.model_dump()) == found  # as config.yaml is read again


def test_kl_defaults_stay_when_one_key_is_given() -> None:
    for tree, expected in (
        ({"type": "grpo"}, ("k3", "loss", 0.05)),
        ({"type": "ppo"}, ("k1", "reward", 0.05)),
        (GKD_TREE, ("k3", "loss", 0.0)),
    ):
        for kl in ({}, {"horizon": 7}):
            found = ADAPTER.validate_python({**tree, "kl": kl}).kl
            assert (found.estimator, found.placement, found.coef) == expected


def test_other_defaults() -> None:
    ppo = PPOConfig(type="ppo")
    assert (ppo.gamma, ppo.lam, ppo.clip_low, ppo.clip_high, ppo.value_clip) == (1.0, 0.95, 0.2, 0.2, 0.2)
    assert (ppo.critic.model, ppo.critic.learning_rate, ppo.critic.warmup_steps) == (None, 1e-5, 0)
    gkd = ADAPTER.validate_python(GKD_TREE)
    assert (gkd.beta, gkd.lmbda, gkd.temperature, gkd.top_k) == (0.5, 0.5, 1.0, None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"type": "dpo"}, "grpo"),
        ({"type": "ppo", "kl": {"estimator": "k3"}}, "set algorithm.kl.estimator: k1"),
        ({"type": "grpo", "kl": {"estimator": "k1"}}, "the gradient of k1 is 0 on average"),
        (GKD_TREE | {"kl": {"estimator": "k1", "coef": 0.1}}, "the gradient of k1 is 0 on average"),
        ({"type": "ppo", "kl": {"placement": "loss"}}, "k2 or k3"),
        ({"type": "ppo", "value_clip": 0}, "greater than 0"),
        ({"type": "ppo", "lam": 1.1}, "less than or equal to 1"),
        ({"type": "ppo", "critic": {"warmup_steps": -1}}, "greater than or equal to 0"),
        ({"type": "ppo", "scale": "none"}, "not permitted"),
        ({"type": "gkd"}, "teacher"),
        (GKD_TREE | {"kl": {"placement": "reward", "estimator": "k1"}}, "gkd learns from no reward"),
        (GKD_TREE | {"beta": 1.5}, "less than or equal to 1"),
        (GKD_TREE | {"lmbda": -0.5}, "greater than or equal to 0"),
        (GKD_TREE | {"temperature": 0}, "greater than 0"),
        (GKD_TREE | {"top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(tree)


def test_an_importance_correction_for_gkd_is_refused() -> None:
    train = TrainConfig.model_validate({"importance_correction": {}})
    assert make_algorithm(PPOConfig(type="ppo"), train) == PPO(PPOConfig(type="ppo"), train.importance_correction)
    with pytest.raises(UserError, match=r"train\.importance_correction"):
        make_algorithm(ADAPTER.validate_python(GKD_TREE), train)


def test_the_config_loads_no_torch() -> None:
    code = "import sys, trainers.algorithms.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
