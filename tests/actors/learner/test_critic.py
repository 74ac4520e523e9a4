"""PPO's critic as it is loaded: what of it is trained, and its values before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.config import LearnerConfig, LoraConfig, PolicyConfig
from actors.learner import models as learner_models
from actors.learner.critic import forward_values, load_critic, value_head
from tests.support import tiny
from trainers.algorithms.config import CriticConfig, PPOConfig
from trainers.config import TrainConfig
from trainers.errors import UserError
from trainers.tiny_models import make_random_reward_model

LORA = LoraConfig(r=1)  # its own matrices have one output too
KINDS: Any = ["full", "lora", "qlora"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"), tied=True)


def values(model: Any) -> torch.Tensor:
    tokens = torch.from_numpy(tiny.prompt_tokens(0, length=9)).long()[None]
    return forward_values(model, tokens, torch.tensor([9]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_critic_foresees_nothing(kind: Any, policy: Path) -> None:
    critic = load_critic(str(policy), CriticConfig(train_type=kind), LORA, dtype="float32")
    assert torch.equal(values(critic), torch.zeros(1, 9))
    with torch.no_grad():
        value_head(critic).weight.fill_(1.0)
    assert float(values(critic).detach()[0, 1:].abs().min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_models_head_is_kept(kind: Any, tmp_path: Path) -> None:
    make_random_reward_model(tmp_path)
    critic = load_critic(str(tmp_path), CriticConfig(train_type=kind), LORA, dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(value_head(critic).weight, plain.score.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_head_and_adapter_are_trained(kind: Any, dtype: str, policy: Path) -> None:
    critic = load_critic(str(policy), CriticConfig(train_type=kind), LORA, dtype=dtype)
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    heads = {name for name in trained if name.startswith("score.")}
    assert heads == {"score.weight", "score.bias"}
    assert len(trained.keys() - heads) == 2 * 7 * 2  # A and B of 7 layers in each of 2
    assert all("lora_" in name for name in trained.keys() - heads)
    assert {p.dtype for p in trained.values()} == {getattr(torch, dtype)}


def test_only_named_layers_get_an_adapter_and_never_the_head(policy: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "score"))
    critic = load_critic(str(policy), CriticConfig(train_type="lora"), lora, dtype="float32")
    trained = [name for name, p in critic.named_parameters() if p.requires_grad and "lora_" in name]
    assert len(trained) == 4
    assert all(".q_proj." in name for name in trained)


def test_layers_that_are_not_there(policy: Path) -> None:
    lora = LoraConfig(target_modules=("query",))
    with pytest.raises(
        UserError, match="no linear layer of the model is called query; its linear layers are down_proj"
    ):
        load_critic(str(policy), CriticConfig(train_type="lora"), lora, dtype="float32")


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_recomputed_where_the_learners_do(
    kind: Any, wanted: bool, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(learner_models, "TrainingEngine", lambda model, **_: made.append(model))
    algorithm = PPOConfig(type="ppo", critic=CriticConfig(train_type=kind))
    spec = tiny.learner_spec(
        policy,
        policy=PolicyConfig(model=str(policy), dtype="float32", lora=LORA),
        learners=LearnerConfig(gradient_checkpointing=wanted),
        algorithm=algorithm,
        train=TrainConfig(),
    )
    learner_models._load_critic(spec)
    (critic,) = made
    assert critic.is_gradient_checkpointing == wanted
