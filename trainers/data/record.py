"""From a validated record to a `Prompt`. It knows the public record format and the stage types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.data.detect import RESPONSE_FIELDS
from trainers.data.messages import without_response
from trainers.types import Message, Prompt

_PROMPT_FIELDS = ("prompt", "messages")
_ALPACA_FIELDS = ("instruction", "input", "output")


def to_prompt(record: Mapping[str, Any], *, source: str, line: int) -> Prompt:
    """The prompt of a valid record; a response is left out, every other column is kept.

    >>> to_prompt({"prompt": "2 + 2 = ?", "answer": "4"}, source="p.jsonl", line=1).columns
    {'answer': '4'}
    """
    left_out = {*_PROMPT_FIELDS, *(name for name in RESPONSE_FIELDS if record.get(name) is not None)}
    prompt, turns = record.get("prompt"), record.get("messages")
    messages: tuple[Message, ...]
    if turns is not None:
        messages = tuple(without_response(turns))
    elif prompt is not None:
        messages = (_user(prompt),)
    else:
        messages = (_user(_instruction(record)),)
        left_out |= set(_ALPACA_FIELDS)
    columns = {name: value for name, value in record.items() if name not in left_out}
    return Prompt(messages=messages, columns=columns, response=response_of(record), source=source, line=line)


def response_of(record: Mapping[str, Any]) -> str | None:
    """The response in `sft` data, if it is a text; GKD may train on it."""
    values = [record.get(name) for name in RESPONSE_FIELDS]
    turns = record.get("messages")
    if turns is not None and len(without_response(turns)) < len(turns):
        values.append(turns[-1].get("content"))
    elif record.get("prompt") is None:
        values.append(record.get("output"))
    return next((v for v in values if isinstance(v, str)), None)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _instruction(record: Mapping[str, Any]) -> str:
    """Alpaca's instruction, with its input on the next line (as ms-swift joins them)."""
    instruction, context = str(record["instruction"]), record.get("input")
    return f"{instruction}\n{context}" if isinstance(context, str) and context else instruction
