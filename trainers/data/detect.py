"""The detector: what one record is, and the one verdict for a file from all of its records.

It knows the public table of formats (docs/prompts.md), no file format and no model.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainers.data.findings import SHOWN, Evidence, Finding, LineProblem, plural, printable, shown
from trainers.data.messages import check_messages, ends_with_response
from trainers.data.strict import not_an_object


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """One way to write a record of a format; compared by identity."""

    format: str
    described: str


PROMPT = Shape("rlhf-online", "`prompt`, no response")
MESSAGES = Shape("rlhf-online", "`messages` ending in a user or tool turn, no response")
RESPONSE_FIELDS = ("response", "completion")  # the first that has a value decides
PROMPT_RESPONSE = {name: Shape("sft", f"`prompt` and `{name}`") for name in RESPONSE_FIELDS}
MESSAGES_RESPONSE = {name: Shape("sft", f"`messages` and `{name}`") for name in RESPONSE_FIELDS}
MESSAGES_ASSISTANT_LAST = Shape("sft", "`messages` ending in an assistant turn")
INSTRUCTION_OUTPUT = Shape("sft", "`instruction` and `output`")
CHOSEN_REJECTED = Shape("preference", "`chosen` and `rejected`")
REJECTED_RESPONSE = Shape("preference", "`rejected_response`")
REJECTED_MESSAGES = Shape("preference", "`rejected_messages`")
LABELED_RESPONSE = {name: Shape("kto", f"a true/false `label` and `{name}`") for name in RESPONSE_FIELDS}
LABELED_OUTPUT = Shape("kto", "a true/false `label` and `output`")
LABELED_MESSAGES = Shape("kto", "a true/false `label` and `messages` ending in an assistant turn")
TEXT = Shape("pretrain", "`text` only")

# If a record has none of these fields, a string `prompt` needs no second look.
DECISIVE = frozenset(
    {"messages", "instruction", "chosen", "rejected", "rejected_response", "rejected_messages", *RESPONSE_FIELDS}
)

READY = "rlhf-online"
_ADVICE = {
    "sft": "prompts only; `data.strip_responses: true` uses the prompts of this file "
    "(GKD may use the responses as its off-policy part)",
    "preference": "prompts; this is offline data (DPO, reward models), which online RLHF does not need",
    "kto": "prompts; this is offline data (KTO), which online RLHF does not need",
    "pretrain": "prompts; plain text for pre-training has none",
}
_REWRITES: Mapping[str, str] = {
    "conversations": "`messages`; rename the field, and in each turn `from` to `role` and `value` to `content` "
    "(human becomes user, gpt becomes assistant)",
    "conversation": '`messages`: [{"role": "user", "content": "…"}, …]',
    "query": "`prompt`; rename `query` (and `history` to earlier turns of `messages`)",
    "question": "`prompt`; rename `question`",
    "problem": "`prompt`; rename `problem`",
    "instruction": "`prompt`; rename `instruction`, with `input`, if any, after it",
    "input": "`prompt`; rename `input`",
    "inputs": "`prompt`; rename `inputs`",
}
_EXPECTED = "`prompt` (a string) or `messages` (a list of turns)"


def inspect(record: Any) -> tuple[Shape | None, list[Finding]]:
    """The shape of one record, None if it is not a valid one, and the findings about it (warnings leave it valid).

    >>> inspect({"prompt": "Hi", "answer": "1"})[0].format
    'rlhf-online'
    >>> inspect({"prompt": "Hi", "messages": []})[1][0].found
    'both `prompt` and `messages`'
    """
    if not isinstance(record, dict):
        return None, [not_an_object(record)]
    if shape := _offline(record):
        return shape, []
    prompt, messages = record.get("prompt"), record.get("messages")
    if prompt is not None and messages is not None:
        return None, [Finding("prompt", "both `prompt` and `messages`", "one of the two")]
    if messages is not None:
        findings = check_messages(messages)
        if any(f.severity == "error" for f in findings):
            return None, findings
        if ends_with_response(messages):
            return MESSAGES_ASSISTANT_LAST, findings
        name = _response_field(record)
        return (MESSAGES_RESPONSE[name] if name else MESSAGES), findings
    if prompt is not None:
        if findings := check_prompt(prompt):
            return None, findings
        name = _response_field(record)
        return (PROMPT_RESPONSE[name] if name else PROMPT), []
    return _without_prompt(record)


def check_prompt(prompt: Any) -> list[Finding]:
    """What is wrong with a `prompt` value; an empty list if it is valid."""
    if isinstance(prompt, str):
        if prompt.strip():
            return []
        found = "white space only" if prompt else "an empty string"
        return [Finding("prompt", found, "a text that the model can answer")]
    if isinstance(prompt, list):
        return [Finding("prompt", shown(prompt), "a string; name a list of turns `messages`")]
    return [Finding("prompt", shown(prompt), "a string")]


def _offline(record: dict[str, Any]) -> Shape | None:
    """The shape of preference and KTO data, whose prompts are not checked; None for everything else."""
    written = (str, list, dict)
    if isinstance(record.get("chosen"), written) and isinstance(record.get("rejected"), written):
        return CHOSEN_REJECTED
    if isinstance(record.get("rejected_response"), written):
        return REJECTED_RESPONSE
    if isinstance(record.get("rejected_messages"), list):
        return REJECTED_MESSAGES
    return _labeled(record) if isinstance(record.get("label"), bool) else None


def _labeled(record: dict[str, Any]) -> Shape | None:
    """The KTO shape of a record with a true/false `label`; None without a completion: then the label is a column."""
    if name := _response_field(record):
        return LABELED_RESPONSE[name]
    if _is_alpaca(record):
        return LABELED_OUTPUT
    return LABELED_MESSAGES if ends_with_response(record.get("messages")) else None


def _response_field(record: dict[str, Any]) -> str | None:
    return next((name for name in RESPONSE_FIELDS if record.get(name) is not None), None)


def _is_alpaca(record: dict[str, Any]) -> bool:
    return isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)


def _without_prompt(record: dict[str, Any]) -> tuple[Shape | None, list[Finding]]:
    if _is_alpaca(record):
        if record["instruction"].strip():
            return INSTRUCTION_OUTPUT, []
        return None, [Finding("instruction", "an empty instruction", "a text that the model can answer")]
    for name, rewrite in _REWRITES.items():
        if record.get(name) is not None:
            return None, [Finding(name, f"`{name}`, no `prompt` or `messages`", rewrite)]
    for name in ("prompt", "messages"):
        if name in record:
            return None, [Finding(name, "null", _EXPECTED)]
    if isinstance(record.get("text"), str):
        return TEXT, []
    for name in record:
        if near := difflib.get_close_matches(name.strip().lower()[:40], ["prompt", "messages"], n=1, cutoff=0.75):
            return None, [Finding(printable(name), "no `prompt` or `messages`", f"`{near[0]}`; rename this field")]
    return None, [Finding(None, shown(record), _EXPECTED)]


@dataclass(slots=True)
class Detector:
    """Counts the shapes of a file's valid records; memory does not grow with the file."""

    strip_responses: bool = False
    counts: Counter[Shape] = field(default_factory=Counter)
    lines: dict[Shape, list[int]] = field(default_factory=dict)  # the first of each shape, to name those that disagree

    def add(self, shapes: Sequence[Shape | None], lines: Sequence[int]) -> None:
        """Count a block's shapes; None marks a line without a valid record."""
        counted = Counter(shapes)
        for shape in counted:
            if shape is None:
                continue
            self.counts[shape] += counted[shape]
            named = self.lines.setdefault(shape, [])
            if len(named) < SHOWN:
                named += [n for n, s in zip(lines, shapes, strict=True) if s is shape][: SHOWN - len(named)]

    @property
    def records(self) -> int:
        """Valid records so far."""
        return self.counts.total()

    def usable(self, shape: Shape) -> bool:
        """True if a run can train on the prompt of such a record."""
        return shape.format == READY or (self.strip_responses and shape.format == "sft")

    def unusable(self, shape: Shape) -> Finding:
        """Why a run leaves out a valid record that is not `usable`."""
        return Finding(None, f"`{shape.format}`: {shape.described}", _ADVICE[shape.format])

    def formats(self) -> Counter[str]:
        """Valid records by format."""
        formats: Counter[str] = Counter()
        for shape, n in self.counts.items():
            formats[shape.format] += n
        return formats

    def verdict(self) -> str:
        """The one format of the file; `unknown` if there is no valid record, or records disagree."""
        formats = self.formats()
        if self.strip_responses and set(formats) == {READY, "sft"}:
            return "sft"  # every prompt is used, so nothing disagrees
        return next(iter(formats)) if len(formats) == 1 else "unknown"

    def evidence(self) -> list[Evidence]:
        """Counts by shape, the most frequent first."""
        return [Evidence(s.described, s.format, n, self.lines[s][0]) for s, n in self.counts.most_common()]

    def verdict_problem(self) -> Finding | None:
        """Why a recognized format is not ready, and what to do; None if it is ready, or if lines disagree."""
        verdict = self.verdict()
        if verdict in ("unknown", READY) or (verdict == "sft" and self.strip_responses):
            return None
        shapes = ", ".join(e.shape for e in self.evidence())
        return Finding(None, f"`{verdict}` data: {plural(self.records, 'record')} with {shapes}", _ADVICE[verdict])

    def disagreements(self) -> tuple[list[LineProblem], int]:
        """The lines whose format is not the most frequent one (the first hundred of each shape), and how many."""
        if self.verdict() != "unknown" or not self.counts:
            return [], 0
        formats = self.formats()
        most, n = formats.most_common(1)[0]
        problems = [
            LineProblem(line, Finding(None, f"`{shape.format}`: {shape.described}", f"`{most}`, as {n:,} others are"))
            for shape, lines in self.lines.items()
            if shape.format != most
            for line in lines
        ]
        return sorted(problems, key=lambda p: p.line or 0)[:SHOWN], formats.total() - n
