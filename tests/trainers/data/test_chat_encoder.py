"""Prompts to tokens with a byte-level tokenizer (a token a byte), and the limit on their lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from trainers.data.chat import ChatEncoder, Lengths, limit_lengths
from trainers.data.check import CheckOptions, check
from trainers.data.reader import PromptSet, open_prompts
from trainers.errors import UserError
from trainers.tiny_models import CHAT_TEMPLATE, make_tokenizer
from trainers.types import Prompt

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning') }}{% endif %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "S"}


def prompt(*messages: dict[str, Any]) -> Prompt:
    return Prompt(messages=messages, source="p.jsonl", line=7)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Iterable[Any]], PromptSet]:
    def open_records(records: Iterable[Any]) -> PromptSet:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return open_prompts(str(path))

    return open_records


def test_the_models_template_with_the_turn_that_it_is_to_write() -> None:
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoder.encode(prompt(SYSTEM, USER))) == text
    assert encoder.encode(prompt(SYSTEM, USER)) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_of_ones_own_takes_its_place() -> None:
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer, chat_template=STRICT)
    assert tokenizer.decode(encoder.encode(prompt(SYSTEM, USER))) == "<s>S<u>Hi<a>"


def test_without_a_template_one_user_turn_is_its_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    encoder = ChatEncoder(tokenizer)
    assert encoder.encode(prompt(USER)) == tokenizer("Hi")["input_ids"]
    for messages in ([SYSTEM, USER], [USER, {"role": "assistant", "content": "x"}, USER]):
        with pytest.raises(UserError, match=r"p\.jsonl:7: messages: .*policy\.chat_template"):
            encoder.encode(prompt(*messages))


def test_the_templates_own_error_is_reported_by_line(opened: Callable[..., PromptSet]) -> None:
    encoder = ChatEncoder(make_tokenizer(), chat_template=STRICT)
    prompts = opened([{"prompt": "Hi"}, {"messages": [USER, SYSTEM, USER]}])
    with pytest.raises(UserError, match="System message must be at the beginning") as error:
        limit_lengths(prompts, encoder, max_tokens=100, overlong="filter")
    assert [p.where.rsplit(":", 1)[1] for p in error.value.problems] == ["2"]
    broken = ChatEncoder(make_tokenizer(), chat_template="{{ messages[0]['content'] + 1 }}")
    with pytest.raises(UserError, match="template refuses"):
        broken.encode(prompt(USER))


def test_lengths_are_template_and_text(opened: Callable[..., PromptSet]) -> None:
    encoder = ChatEncoder(make_tokenizer(), chat_template=STRICT)  # "<u>" and "<a>": 6 bytes around the text
    prompts = opened([{"prompt": "x" * n} for n in (1, 4, 5, 20)])
    with pytest.raises(UserError) as error:
        limit_lengths(prompts, encoder, max_tokens=10, overlong="error")
    assert [(p.where.rsplit(":", 1)[1], p.message.split(";")[0]) for p in error.value.problems] == [
        ("3", "prompt: found 11 tokens"),
        ("4", "prompt: found 26 tokens"),
    ]
    kept, lengths = limit_lengths(prompts, encoder, max_tokens=10, overlong="filter")
    assert [p.line for p in kept] == [1, 2]
    assert (lengths.over, lengths.longest) == (2, 26)
    assert kept.fingerprint() != prompts.fingerprint()
    same, lengths = limit_lengths(prompts, encoder, max_tokens=26, overlong="error")
    assert (same, lengths.over) == (prompts, 0)
    with pytest.raises(UserError, match="every prompt is longer than 6"):
        limit_lengths(prompts, encoder, max_tokens=6, overlong="filter")


def test_a_hundred_long_prompts_are_named_and_the_rest_counted(opened: Callable[..., PromptSet]) -> None:
    prompts = opened([{"prompt": f"{i:05}"} for i in range(600)])
    with pytest.raises(UserError) as error:
        limit_lengths(prompts, ChatEncoder(make_tokenizer(), chat_template=STRICT), max_tokens=8, overlong="error")
    assert len(error.value.problems) == 101
    assert error.value.problems[-1].message == "500 more problems"


def test_histogram_counts_every_length_once() -> None:
    lengths = Lengths(limit=100)
    for n in (0, 10, 11, 100, 101, 5000):
        lengths.add(n)
    rows = lengths.histogram(10)
    assert rows[0] == (0, 10, 2)
    assert rows[1] == (11, 20, 1)
    assert rows[-1] == (91, 100, 1)
    assert sum(n for _, _, n in rows) + lengths.over == 6


def test_check_with_a_model_reports_lengths_by_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "aaaaaaaaa"}\n')
    encoder = ChatEncoder(make_tokenizer(), chat_template=STRICT)
    checked = check(str(path), CheckOptions(encoder=encoder, max_prompt_tokens=10)).as_json()
    assert not checked["ready"]
    assert [(p["line"], p["found"]) for p in checked["problems"]] == [(2, "15 tokens")]
    assert checked["lengths"]["over_limit"] == 1


def test_a_model_without_tokenizer_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        ChatEncoder.load(str(tmp_path))


def test_load_finds_a_saved_tokenizer(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    assert ChatEncoder.load(str(tmp_path)).encode(prompt(USER)) == ChatEncoder(make_tokenizer()).encode(prompt(USER))
