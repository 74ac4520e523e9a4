"""The tiny models: real files that transformers loads, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


def test_lessons_are_the_texts_that_the_chat_template_makes() -> None:
    tokenizer = tiny_models.make_tokenizer()
    lessons = dict(tiny_models._prompt_texts(tokenizer))
    turn = {"role": "user", "content": "69+99="}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert lessons[text] == "168"
    whole = tokenizer.apply_chat_template([turn, {"role": "assistant", "content": "168"}], tokenize=False)
    assert whole == text + "168" + tiny_models.TURN_END + "\n"  # what the reward model is taught on


def test_the_preference_loss_is_bradley_terrys_and_centred() -> None:
    """One right answer and two rounds of wrong ones, in float64: the second wrong one is shorter and differs later."""
    scores = np.array([[0.1, 0.5, 1.0, 2.0], [0.1, -0.5, 0.3, -1.0], [0.1, 0.5, 0.2, 9.0]])
    ids = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4], [1, 2, 4, 0]])
    lengths = torch.tensor([4, 4, 3])

    def cost(margins: list[float]) -> float:  # −log σ, mean
        return float(np.mean([np.log1p(np.exp(-m)) for m in margins]))

    final = cost([2.0 + 1.0, 2.0 - 0.2]) + tiny_models.CENTER * float(np.mean([(2.0 - 1.0) ** 2, (2.0 + 0.2) ** 2]))
    by_token = cost([0.5 + 0.5, 1.0 - 0.3, 2.0 + 1.0, 1.0 - 0.2])
    loss = tiny_models._preference_loss(torch.tensor(scores), ids, lengths, right=1)
    assert loss.item() == pytest.approx(final + by_token, rel=1e-12)


@pytest.mark.integration
def test_teaching_is_decided_by_the_seed_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_models.make_policy(tmp_path / name, seed=seed, steps=2, tie_word_embeddings=False)
    tiny_models.make_reward_model(tmp_path / "reward", steps=1)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.norm.weight"], c["model.norm.weight"])
    assert torch.equal(torch.get_rng_state(), state)


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
