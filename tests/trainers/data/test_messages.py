"""The rules for `messages`: roles, contents, last turn; order is a warning."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.data.messages import check_messages, ends_with_response, without_response

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "You are a coding expert."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
TOOL = {"role": "tool", "content": "4"}


def said(messages: Any) -> list[tuple[str | None, str, str]]:
    return [(f.field, f.found, f.severity) for f in check_messages(messages)]


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ANSWER, USER],
        [USER, CALL, TOOL],
        [USER, CALL, TOOL, TOOL],
        [USER, {k: v for k, v in CALL.items() if k != "content"}, TOOL],
        [USER, ANSWER],
        [USER | {"name": "Ann", "extra": {"kept": 1}}],
    ],
)
def test_good_ones_have_no_finding(messages: list[Any]) -> None:
    assert said(messages) == []


@pytest.mark.parametrize(
    ("messages", "field", "found"),
    [
        ("Hi", "messages", 'a string: "Hi"'),
        ({"role": "user"}, "messages", "an object with `role`"),
        ([], "messages", "an empty list"),
        (["Hi"], "messages[0]", 'a string: "Hi"'),
        ([{"content": "Hi"}], "messages[0].role", "no `role`"),
        ([{"role": "human", "content": "Hi"}], "messages[0].role", 'a string: "human"'),
        ([{"role": 1, "content": "Hi"}], "messages[0].role", "a number: 1"),
        ([{"from": "human", "value": "Hi"}], "messages[0]", "the ShareGPT keys `from` and `value`"),
        ([{"role": "user"}], "messages[0].content", "no `content`"),
        ([{"role": "user", "content": None}], "messages[0].content", "null"),
        ([USER, CALL | {"tool_calls": []}, TOOL], "messages[1].content", "null"),
        ([USER | {"content": 5}], "messages[0].content", "a number: 5"),
        ([USER | {"content": [{"type": "text", "text": "Hi"}]}], "messages[0].content", "a list of 1 content parts"),
        ([USER | {"content": " \n"}], "messages[0].content", "white space only"),
        ([USER, ANSWER, USER | {"content": ""}], "messages[2].content", "an empty string"),
        ([USER | {"content": ""}, ANSWER], "messages[0].content", "an empty string"),
        ([SYSTEM], "messages[0].role", "a system turn as the last turn"),
        ([SYSTEM, ANSWER], "messages[0].role", "a system turn before the response"),
        ([ANSWER], "messages", "assistant turns only"),
    ],
)
def test_errors(messages: Any, field: str, found: str) -> None:
    assert said(messages) == [(field, found, "error")]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([USER, SYSTEM, USER], "messages[1].role"),
        ([ANSWER, USER], "messages[0].role"),
        ([SYSTEM, ANSWER, USER], "messages[1].role"),
        ([USER, USER], "messages[1].role"),
        ([TOOL], "messages[0].role"),
        ([USER, TOOL], "messages[1].role"),
        ([SYSTEM | {"content": ""}, USER], "messages[0].content"),
        ([USER, ANSWER | {"content": " "}, USER], "messages[1].content"),
    ],
)
def test_order_and_empty_earlier_turns_are_warnings(messages: list[Any], field: str) -> None:
    assert [(f, s) for f, _, s in said(messages)] == [(field, "warning")]


def test_every_bad_message_is_named() -> None:
    assert [f for f, _, _ in said([{"role": "x", "content": 1}, USER, 7])] == [
        "messages[0].role",
        "messages[0].content",
        "messages[2]",
    ]


@pytest.mark.parametrize(
    ("role", "rewrite"), [("human", "user"), ("GPT", "assistant"), ("User", "user"), ("x", "one of")]
)
def test_roles_of_other_formats_are_told_their_name_here(role: str, rewrite: str) -> None:
    (finding,) = check_messages([{"role": role, "content": "Hi"}])
    assert rewrite in finding.expected


def test_responses_are_removed_from_the_end() -> None:
    assert without_response([USER, ANSWER, USER, ANSWER, ANSWER]) == [USER, ANSWER, USER]
    assert ends_with_response([USER, ANSWER])
    assert not ends_with_response([USER, ANSWER, USER])
    assert not ends_with_response("text")
