"""The detector against the public table of formats and its rules."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.data.detect import Detector, inspect

USER = [{"role": "user", "content": "Hi"}]
ANSWERED = [*USER, {"role": "assistant", "content": "Hello"}]


def format_of(record: Any) -> str | None:
    shape, findings = inspect(record)
    assert (shape is None) == any(f.severity == "error" for f in findings)
    return shape.format if shape else None


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("rlhf-online", {"prompt": "Hi"}),
        ("rlhf-online", {"prompt": "Hi", "answer": "4", "task": None}),
        ("rlhf-online", {"messages": USER}),
        ("rlhf-online", {"messages": USER, "prompt": None}),
        ("rlhf-online", {"prompt": "Hi", "messages": None, "response": None}),
        ("rlhf-online", {"prompt": "Hi", "label": True}),  # no completion beside it
        ("rlhf-online", {"prompt": "Hi", "text": "column", "chosen": 1}),
        ("sft", {"prompt": "Hi", "response": "Hello"}),
        ("sft", {"prompt": "Hi", "completion": "Hello"}),
        ("sft", {"prompt": "Hi", "completion": "Hello", "label": 1}),  # a label that is not true or false is a column
        ("sft", {"messages": ANSWERED}),
        ("sft", {"messages": USER, "response": "Hello"}),
        ("sft", {"instruction": "Add", "input": "1 2", "output": "3"}),
        ("sft", {"instruction": "Add", "output": "3", "prompt": None}),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("preference", {"chosen": ANSWERED, "rejected": ANSWERED}),
        ("preference", {"prompt": USER, "chosen": ANSWERED, "rejected": ANSWERED}),
        ("preference", {"messages": ANSWERED, "rejected_response": "b"}),
        ("preference", {"messages": ANSWERED, "rejected_messages": ANSWERED}),
        ("preference", {"prompt": "Hi", "messages": ANSWERED, "chosen": "a", "rejected": "b"}),
        (
            "preference",
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "completion": "c", "label": True},
        ),  # first fits
        ("kto", {"prompt": "Hi", "completion": "Hello", "label": False}),
        ("kto", {"messages": ANSWERED, "label": True}),
        ("kto", {"instruction": "Add", "output": "3", "label": True}),
        ("pretrain", {"text": "Once upon a time"}),
        (None, {"prompt": "Hi", "messages": USER}),
        (None, {"prompt": None}),
        (None, {"prompt": ""}),
        (None, {"prompt": " \t"}),
        (None, {"prompt": 5}),
        (None, {"prompt": "", "response": "Hello"}),
        (None, {"instruction": " ", "output": "x"}),
        (None, {"messages": [{"role": "gpt", "content": "x"}], "response": "y"}),
        (None, {}),
        (None, {"answer": "4"}),
        (None, ["prompt"]),
        (None, "prompt"),
        (None, None),
    ],
)
def test_format_of_a_record(format: str | None, record: Any) -> None:
    assert format_of(record) == format


@pytest.mark.parametrize(
    ("record", "field", "told"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "conversations", "`from` to `role`"),
        ({"query": "Hi", "response": "Hello"}, "query", "rename `query`"),
        ({"prompt": USER}, "prompt", "`messages`"),
        ({"question": "Hi", "answer": "1"}, "question", "rename `question`"),
        ({"instruction": "Add"}, "instruction", "rename `instruction`"),
        ({"Prompt": "Hi"}, "Prompt", "`prompt`; rename"),
        ({"message": USER}, "message", "`messages`; rename"),
        ({"prompt": None, "query": "Hi"}, "query", "rename `query`"),
        ({"foo": 1}, None, "`prompt` (a string) or `messages`"),
    ],
)
def test_foreign_forms_are_told_their_rewrite(record: Any, field: str | None, told: str) -> None:
    shape, (finding,) = inspect(record)
    assert shape is None
    assert finding.field == field
    assert told in finding.expected


def detector_of(*records: Any, strip_responses: bool = False) -> Detector:
    detector = Detector(strip_responses)
    detector.add([inspect(r)[0] for r in records], range(1, len(records) + 1))
    return detector


def test_one_format_is_the_verdict_whatever_the_shapes() -> None:
    detector = detector_of({"prompt": "a"}, {"messages": USER}, {"prompt": 5}, {"prompt": "b"})
    assert detector.verdict() == "rlhf-online"
    assert detector.records == 3
    assert [(e.records, e.first_line) for e in detector.evidence()] == [(2, 1), (1, 2)]
    assert detector.verdict_problem() is None
    assert detector.disagreements() == ([], 0)


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"prompt": "Hi", "response": "Hello"}, "`prompt` and `response`"),
        ({"prompt": "Hi", "completion": "Hello"}, "`prompt` and `completion`"),
        ({"prompt": "Hi", "completion": "Hello", "response": None}, "`prompt` and `completion`"),
        ({"prompt": "Hi", "completion": "Hello", "response": "Ho"}, "`prompt` and `response`"),
        ({"messages": USER, "completion": "Hello"}, "`messages` and `completion`"),
        ({"instruction": "Add", "output": "3"}, "`instruction` and `output`"),
        ({"messages": ANSWERED, "rejected_response": "b"}, "`rejected_response`"),
        ({"messages": ANSWERED, "rejected_messages": ANSWERED}, "`rejected_messages`"),
        ({"prompt": "Hi", "response": "Hello", "label": True}, "a true/false `label` and `response`"),
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "a true/false `label` and `completion`"),
        ({"instruction": "Add", "output": "3", "label": True}, "a true/false `label` and `output`"),
        ({"messages": ANSWERED, "label": True}, "a true/false `label` and `messages` ending in an assistant turn"),
    ],
)
def test_the_evidence_names_the_field_that_decided(record: Any, shape: str) -> None:
    assert [e.shape for e in detector_of(record).evidence()] == [shape]


def test_lines_that_disagree_are_named() -> None:
    detector = detector_of(*[{"prompt": "a"}] * 5, {"prompt": "a", "response": "b"}, {"text": "c"}, {"prompt": "d"})
    problems, total = detector.disagreements()
    assert detector.verdict() == "unknown"
    assert ([p.line for p in problems], total) == ([6, 7], 2)
    assert "6 others" in problems[0].finding.expected


def test_only_a_hundred_disagreeing_lines_are_kept_and_all_counted() -> None:
    problems, total = detector_of(*[{"prompt": "a"}] * 300, *[{"text": "t"}] * 299).disagreements()
    assert (len(problems), total, problems[0].line) == (100, 299, 301)


def test_no_valid_record_is_unknown() -> None:
    assert detector_of({"foo": 1}).verdict() == "unknown"
    assert detector_of().verdict() == "unknown"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "a", "response": "b"}, "data.strip_responses: true"),
        ({"chosen": "a", "rejected": "b"}, "offline data (DPO"),
        ({"prompt": "a", "completion": "b", "label": True}, "offline data (KTO"),
        ({"text": "a"}, "pre-training"),
    ],
)
def test_recognised_formats_are_told_what_to_do(record: Any, told: str) -> None:
    problem = detector_of(record).verdict_problem()
    assert problem is not None
    assert told in problem.expected


def test_stripping_makes_sft_usable_also_beside_prompts() -> None:
    sft, prompt = {"prompt": "a", "response": "b"}, {"prompt": "c"}
    assert detector_of(sft, strip_responses=True).verdict_problem() is None
    mixed = detector_of(sft, prompt, strip_responses=True)
    assert (mixed.verdict(), mixed.verdict_problem(), mixed.disagreements()) == ("sft", None, ([], 0))
    assert detector_of(sft, prompt).verdict() == "unknown"
