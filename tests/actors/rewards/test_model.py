"""The reward model: batched scores against one chat at a time without padding, and what cannot be scored."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from actors.rewards.config import ModelReward
from actors.rewards.model import RewardModel
from actors.rewards.model_replica import ModelReplica
from tests.support.tiny_reward_models import make_reward_model
from trainers.errors import UserError
from trainers.types import Message, Prompt

TEXTS = ["a", "forty two", "x" * 31, "y" * 70, "the same", "the same", "", "Step by step: 25 * 4 = 100, + 10 = 110."]


def config_of(path: Path, **fields: Any) -> ModelReward:
    return ModelReward(type="model", model=str(path), dtype=fields.pop("dtype", "float32"), threads=1, **fields)


def prompt_of(*messages: Message) -> Prompt:
    return Prompt(messages=messages or ({"role": "user", "content": "2+2?"},), source="p.jsonl", line=7)


def alone(path: Path, texts: Sequence[str]) -> list[float]:
    """The oracle: plain transformers, one chat, no padding, no mask; the template written out by hand."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    chats = [tokenizer(f"<user>2+2?</s><assistant>{text}</s>", return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        return [model(chat).logits.item() for chat in chats]


def scores(model: RewardModel, texts: Sequence[str]) -> list[float]:
    chats = [model.encode(prompt_of(), text) for text in texts]
    return model.score([chat for chat in chats if isinstance(chat, list)])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("models") / "judge")


@pytest.mark.parametrize("pad_token_id", [0, None, 1], ids=["pad", "no pad", "pad is eos"])
@pytest.mark.parametrize("max_batch_tokens", [256, 32768])
def test_batched_scores_are_those_of_each_chat_alone(
    tmp_path: Path, pad_token_id: int | None, max_batch_tokens: int
) -> None:
    path = make_reward_model(tmp_path / "judge", pad_token_id=pad_token_id)
    model = RewardModel(config_of(path, max_tokens=256, max_batch_tokens=max_batch_tokens))
    expected = alone(path, TEXTS)
    assert scores(model, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # there is something to tell apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_does_not_depend_on_its_batch(model_path: Path, dtype: str) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc 123", k=rng.randrange(150))) for _ in range(40)]
    model = RewardModel(config_of(model_path, dtype=dtype, max_tokens=256))
    together = dict(zip(texts, scores(model, texts), strict=True))
    rng.shuffle(texts)
    for size in (1, 3, 7):
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            assert scores(model, part) == [together[text] for text in part]  # to the last bit


def test_system_and_several_turns_go_through_the_template(model_path: Path) -> None:
    model = RewardModel(config_of(model_path))
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    chat = model.encode(prompt_of(*({"role": role, "content": content} for role, content in turns)), "B")
    text = "<system>S</s><user>U</s><assistant>A</s><user>V</s><assistant>B</s>"
    assert chat == AutoTokenizer.from_pretrained(model_path)(text).input_ids


def test_without_a_chat_template(tmp_path: Path) -> None:
    path = make_reward_model(tmp_path / "judge", chat_template=None)
    model = RewardModel(config_of(path))
    assert model.encode(prompt_of(), "4") == AutoTokenizer.from_pretrained(path)("2+2?4").input_ids
    refused = model.encode(prompt_of({"role": "system", "content": "S"}, {"role": "user", "content": "U"}), "B")
    assert not isinstance(refused, list)
    assert "p.jsonl:7" in str(refused.cause)
    assert "no chat template, so it cannot judge a chat with the turns system, user" in str(refused.cause)


def test_what_cannot_be_scored_says_why(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = RewardModel(config_of(make_reward_model(tmp_path / "judge", chat_template=template), max_tokens=20))
    system = prompt_of({"role": "system", "content": "S"}, {"role": "user", "content": "U"})
    empty = prompt_of({"role": "user", "content": ""})
    for prompt, text, expected in [
        (prompt_of(), "x" * 17, "judges at most 20 tokens, and this chat has 21"),
        (system, "x", "has a chat template that refuses this chat: no system role"),
        (empty, "", "has no token for this chat"),
    ]:
        answer = model.encode(prompt, text)
        assert not isinstance(answer, list)
        assert answer.value is None
        assert expected in str(answer.cause)
    assert isinstance(model.encode(prompt_of(), "x" * 16), list)


def test_the_models_own_context_is_a_limit(model_path: Path) -> None:
    refused = RewardModel(config_of(model_path)).encode(prompt_of(), "x" * 300)
    assert not isinstance(refused, list)
    assert "judges at most 256 tokens" in str(refused.cause)


async def test_groups_that_come_at_once_get_their_own_scores(model_path: Path) -> None:
    replica = ModelReplica(config_of(model_path, max_tokens=256, max_batch_tokens=512))
    groups = [[f"{i} " * (i + j) for j in range(4)] + ["x" * 300] for i in range(12)]
    found = await asyncio.gather(*(replica.score(prompt_of(), group) for group in groups))
    for group, answers in zip(groups, found, strict=True):
        assert [a.value for a in answers[:4]] == pytest.approx(alone(model_path, group[:4]), abs=1e-5)
        assert "judges at most" in str(answers[4].cause)
    assert await replica.check() is None
    replica.check_health()


async def test_a_caller_who_leaves_fails_no_one_else(model_path: Path) -> None:
    replica = ModelReplica(config_of(model_path))
    leaver = asyncio.create_task(replica.score(prompt_of(), TEXTS))
    await asyncio.sleep(0)
    leaver.cancel()
    (answer,) = await replica.score(prompt_of(), ["a"])
    assert answer.value == pytest.approx(alone(model_path, ["a"])[0], abs=1e-5)


async def test_a_forward_pass_that_fails_is_reported(tmp_path: Path) -> None:
    """The tokenizer has more tokens than the model."""
    replica = ModelReplica(config_of(make_reward_model(tmp_path / "judge", vocab_size=20)))
    answers = await replica.score(prompt_of(), ["a", "b"])
    assert [a.value for a in answers] == [None, None]
    assert "index out of range" in str(answers[0].cause)
    replica.check_health()  # and it continues


def two_labels(path: Path) -> None:
    make_reward_model(path, num_labels=2)


def no_head(path: Path) -> None:
    make_reward_model(path)
    config = Qwen3Config(**{k: v for k, v in json.loads((path / "config.json").read_text()).items() if k != "dtype"})
    Qwen3ForCausalLM(config).save_pretrained(path)


def pickled(path: Path) -> None:
    make_reward_model(path)
    weights = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


def broken(path: Path) -> None:
    make_reward_model(path)
    (path / "model.safetensors").write_bytes(b"\x08")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_labels, "has 2 labels; a reward model has exactly one"),
        (no_head, r"the checkpoint lacks score\.weight; it is not a trained reward model"),
        (pickled, "cannot be loaded as a reward model"),
        (broken, "cannot be loaded as a reward model"),
        (Path.mkdir, "cannot be loaded as a reward model"),
    ],
)
async def test_a_checkpoint_that_cannot_be_used(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "judge")
    with pytest.raises(UserError, match=message):
        RewardModel(config_of(tmp_path / "judge"))
    replica = ModelReplica(config_of(tmp_path / "judge"))
    assert "judge" in str(await replica.check())
    assert (await replica.score(prompt_of(), ["a"]))[0].value is None
