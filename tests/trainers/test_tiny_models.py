"""The tiny models: real files that transformers loads, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers import tiny_models


def test_any_text_goes_through_the_tokenizer_and_comes_back() -> None:
    tokenizer = tiny_models.make_tokenizer()
    for text in ("37+48=", "Grüße, 世界 🙂", "user system assistant", "\n\t"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_opens_the_assistants_turn() -> None:
    tokenizer = tiny_models.make_tokenizer()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("tied", [True, False])
def test_random_policies_load_and_are_decided_by_their_seed(tmp_path: Path, tied: bool) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_models.make_random_policy(tmp_path / name, seed=seed, tie_word_embeddings=tied)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert ("lm_head.weight" in a) is not tied
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert AutoTokenizer.from_pretrained(tmp_path / "a").eos_token_id == model.generation_config.eos_token_id


def test_a_random_reward_model_has_one_label(tmp_path: Path) -> None:
    tiny_models.make_random_reward_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path).pad_token_id


def test_making_models_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny_models.make_random_policy(tmp_path / "p")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.integration
def test_a_few_steps_of_teaching(tmp_path: Path) -> None:
    """Both makers run, report every step, and the reward model scores a chat."""
    seen: list[tuple[int, int]] = []
    tiny_models.make_policy(tmp_path / "policy", steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    tiny_models.make_reward_model(tmp_path / "reward", policy=tmp_path / "policy", steps=2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert model(**tokenizer("1+1=2", return_tensors="pt")).logits.shape == (1, 1)
