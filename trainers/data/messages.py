"""Checks a `messages` list: roles, contents, last turn, order. It knows the chat format, no file and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainers.data.findings import Finding, printable, shown

ROLES = ("system", "user", "assistant", "tool")
_EXPECTED_MESSAGES = 'a list of messages such as [{"role": "user", "content": "…"}]'
_EXPECTED_MESSAGE = 'an object such as {"role": "user", "content": "…"}'
_ROLE_REWRITES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}


def without_response(messages: Sequence[Any]) -> Sequence[Any]:
    """The turns before the trailing assistant turns: what the model is prompted with."""
    end = len(messages)
    while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
        end -= 1
    return messages[:end]


def ends_with_response(messages: Any) -> bool:
    """True if the last turn is the assistant's."""
    return bool(
        isinstance(messages, list)
        and messages
        and isinstance(messages[-1], dict)
        and messages[-1].get("role") == "assistant"
    )


def calls(message: dict[str, Any]) -> bool:
    """True for an assistant turn that calls tools."""
    tool_calls = message.get("tool_calls")
    return message.get("role") == "assistant" and isinstance(tool_calls, list) and bool(tool_calls)


def check_messages(messages: Any) -> list[Finding]:
    """Everything that is wrong (error) or odd (warning) with a `messages` value.

    >>> [f.field for f in check_messages([{"role": "human", "content": "Hi"}])]
    ['messages[0].role']
    >>> check_messages([{"role": "user", "content": "Hi"}])
    []
    """
    if isinstance(messages, str):
        return [Finding("messages", shown(messages), "a list of messages; name a plain text `prompt`")]
    if not isinstance(messages, list):
        return [Finding("messages", shown(messages), _EXPECTED_MESSAGES)]
    if not messages:
        return [Finding("messages", "an empty list", _EXPECTED_MESSAGES)]
    findings = [f for i, message in enumerate(messages) for f in _check_message(f"messages[{i}]", message)]
    if findings:
        return findings
    return list(_check_last(without_response(messages), len(messages))) or list(_check_earlier(messages))


def _check_message(path: str, message: Any) -> Iterator[Finding]:
    if not isinstance(message, dict):
        yield Finding(path, shown(message), _EXPECTED_MESSAGE)
        return
    if "role" not in message and "from" in message and "value" in message:
        yield Finding(path, "the ShareGPT keys `from` and `value`", f"`role` and `content`: {_EXPECTED_MESSAGE}")
        return
    role = message.get("role")
    if "role" not in message:
        yield Finding(f"{path}.role", "no `role`", "one of " + ", ".join(ROLES))
    elif not isinstance(role, str) or role not in ROLES:
        yield Finding(f"{path}.role", shown(role), _role_expected(role))
    yield from _check_content(f"{path}.content", message)


def _role_expected(role: Any) -> str:
    rewrite = _ROLE_REWRITES.get(role.strip().lower()) if isinstance(role, str) else None
    if rewrite is None and isinstance(role, str) and role.strip().lower() in ROLES:
        rewrite = role.strip().lower()
    return f'"{rewrite}"' if rewrite else "one of " + ", ".join(ROLES)


def _check_content(path: str, message: dict[str, Any]) -> Iterator[Finding]:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if calls(message):
            return
        found = "null" if "content" in message else "no `content`"
        yield Finding(path, found, "a string (null only beside an assistant's `tool_calls`)")
    elif isinstance(content, list):
        yield Finding(path, f"a list of {len(content)} content parts", _parts_rewrite(content))
    else:
        yield Finding(path, shown(content), "a string")


def _parts_rewrite(parts: list[Any]) -> str:
    others = sorted({str(p.get("type")) for p in parts if isinstance(p, dict) and p.get("type") != "text"})
    if others:
        return f"one string; parts of type {printable(', '.join(others)[:60])} cannot be used, models of text only"
    return 'one string: join the texts of the parts, [{"type": "text", "text": "Hi"}] becomes "Hi"'


def _check_last(prompt: Sequence[dict[str, Any]], length: int) -> Iterator[Finding]:
    if not prompt:
        yield Finding("messages", "assistant turns only", "a user or tool turn for the model to answer")
        return
    path, last = f"messages[{len(prompt) - 1}]", prompt[-1]
    if last["role"] == "system":
        where = "before the response" if len(prompt) < length else "as the last turn"
        yield Finding(f"{path}.role", f"a system turn {where}", "a user or tool turn for the model to answer")
    elif not last["content"].strip():
        yield Finding(f"{path}.content", _blank(last["content"]), "a text that the model can answer")


def _blank(text: str) -> str:
    return "white space only" if text else "an empty string"


def _check_earlier(messages: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Turn order and empty turns are for the chat template to judge: warnings, at most one for each message."""
    before = None
    last = len(without_response(messages)) - 1
    for i, message in enumerate(messages):
        odd = _odd_order(before, message["role"], i)
        if odd is not None:
            yield Finding(f"messages[{i}].role", *odd, severity="warning")
        elif i < last and not (message.get("content") or "").strip() and not calls(message):
            found = _blank(message["content"])
            yield Finding(f"messages[{i}].content", found, "a text, or no such turn", severity="warning")
        before = message["role"]


def _odd_order(before: str | None, role: str, index: int) -> tuple[str, str] | None:
    if role == "system" and index:
        return "a system turn that is not the first", "the system turn first (many chat templates refuse it elsewhere)"
    if role == "assistant" and before in (None, "system"):
        return "an assistant turn first", "a user turn first (many chat templates refuse this)"
    if role == "tool" and before not in ("assistant", "tool"):
        return f"a tool turn after {before or 'nothing'}", "the assistant turn that called the tool before it"
    if role == before and role in ("user", "assistant"):
        return f"two {role} turns in a row", "user and assistant in turn (many chat templates refuse this)"
    return None
