"""Loading the policy, and what its forward pass means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from actors.config import LoraConfig, PolicyConfig
from actors.learner.critic import forward_values, load_critic, value_head
from actors.modeling.causal_lm import chosen_logprobs, forward, load_model, load_policy, load_tokenizer
from actors.rewards.config import ModelReward
from actors.rewards.model import _load as load_reward_model
from tests.support import tiny
from tests.support.families import make_family
from trainers.algorithms.config import CriticConfig

LENGTHS = (9, 2, 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose config asks for dropout."""
    path = tiny.make_policy(tmp_path_factory.mktemp("policy"), tied=True)
    config = AutoConfig.from_pretrained(path)
    config.attention_dropout = 0.5
    config.save_pretrained(path)
    return path


def forward_logprobs(
    model: Any, tokens: torch.Tensor, lengths: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen_logprobs(forward(model, tokens, lengths), tokens, lengths, temperature=temperature)


def batch(padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.full((len(LENGTHS), max(LENGTHS) + 2), padding)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.from_numpy(tiny.prompt_tokens(row, length=length))
    return tokens, torch.tensor(LENGTHS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_has_the_policys_type_and_no_dropout(path: Path, dtype: Any) -> None:
    model: Any = load_model(PolicyConfig(model=str(path), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.training
    assert not model.config.use_cache
    assert model.config.attention_dropout == 0
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


def test_training_mode_computes_what_evaluation_does(path: Path) -> None:
    """The config of the model asks for dropout in attention; a rollout has none, so that training must not."""
    model = load_model(PolicyConfig(model=str(path), dtype="float32"))
    tokens, lengths = batch(0)
    trained, _ = forward_logprobs(model, tokens, lengths, temperature=1.0)
    evaluated, _ = forward_logprobs(model.eval(), tokens, lengths, temperature=1.0)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_and_entropy_are_those_of_each_sequence_alone(
    path: Path, temperature: float, checkpointing: bool
) -> None:
    model = load_policy(
        PolicyConfig(model=str(path), dtype="float32"), total_steps=1, gradient_checkpointing=checkpointing
    )
    plain = tiny.load_plain(path)
    tokens, lengths = batch(5)
    logprobs, entropy = forward_logprobs(model, tokens, lengths, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for row, length in enumerate(LENGTHS):
        ids = tokens[row, :length]
        with torch.no_grad():
            expected = tiny.plain_logprobs(plain, ids.numpy(), temperature=temperature)
            p = torch.softmax(plain(input_ids=ids[None]).logits[0, :-1] / temperature, dim=-1)
        np.testing.assert_allclose(logprobs[row, :length].detach(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(entropy[row, 1:length], -(p * p.log()).sum(-1), rtol=0, atol=1e-5)
        assert float(entropy[row, 0]) == 0
        assert not logprobs[row, length:].any()
        assert not entropy[row, length:].any()


def test_only_logprobs_of_real_tokens_carry_a_gradient(path: Path) -> None:
    """The gradient is the plain model's, whatever is in the padding."""
    plain = tiny.load_plain(path)
    total = sum(
        tiny.plain_logprobs(plain, tiny.prompt_tokens(row, length=length), temperature=0.7).sum()
        for row, length in enumerate(LENGTHS)
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    for padding in (0, 200):
        model: Any = load_policy(
            PolicyConfig(model=str(path), dtype="float32"), total_steps=1, gradient_checkpointing=True
        )
        logprobs, entropy = forward_logprobs(model, *batch(padding), temperature=0.7)
        assert not entropy.requires_grad
        logprobs.sum().backward()
        expected = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.double(), expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def test_the_configured_chat_template_replaces_the_tokenizers(path: Path) -> None:
    own = load_tokenizer(PolicyConfig(model=str(path)))
    assert own.chat_template == tiny.make_tokenizer().chat_template
    replaced = load_tokenizer(PolicyConfig(model=str(path), chat_template="{{ messages[0]['content'] }}!"))
    assert replaced.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


def capped_model(path: Path) -> torch.Tensor:
    return forward_logprobs(load_model(PolicyConfig(model=str(path), dtype="float32")), *batch(0), temperature=1.0)[0]


def capped_critic(path: Path) -> torch.Tensor:
    critic = load_critic(str(path), CriticConfig(), LoraConfig(), dtype="float32")
    with torch.no_grad():
        value_head(critic).weight.fill_(1.0)
    return forward_values(critic, *batch(0))


def capped_reward(path: Path) -> torch.Tensor:
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).save_pretrained(path)
    _, model = load_reward_model(ModelReward(type="model", model=str(path), dtype="float32"))
    torch.nn.init.ones_(model.score.weight)
    tokens, _ = batch(0)
    scores: torch.Tensor = model(input_ids=tokens).logits
    return scores


@pytest.mark.parametrize("compute", [capped_model, capped_critic, capped_reward])
def test_a_cap_on_attention_scores_is_felt(tmp_path: Path, compute: Callable[[Path], torch.Tensor]) -> None:
    """Gemma 2's c · tanh(s / c): with c = 0.1 hardly a score is left, with 10^6 every one is as it was."""
    found = [compute(make_family("gemma2", tmp_path / str(c), attn_logit_softcapping=c)) for c in (0.1, 1e6)]
    assert float((found[0] - found[1]).detach().abs().max()) > 0.1
