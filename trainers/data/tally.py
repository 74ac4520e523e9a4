"""What is counted while one file is read: verdict, findings, duplicates. The same for lines and for Parquet rows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainers.data.detect import DECISIVE, PROMPT, Detector, Shape, inspect
from trainers.data.findings import SHOWN, FileReport, Finding, Findings, LineProblem, plural
from trainers.data.messages import without_answer

_PLAIN_TURN = 2  # keys of a message that is no more than role and content


@dataclass(slots=True)
class Tally:
    """The growing verdict on one file. Beside 8 bytes a record (the prompt's hash) its memory is constant."""

    file: str
    detector: Detector
    findings: Findings = field(default_factory=Findings)
    fatal: list[Finding] = field(default_factory=list)  # about the whole file: nothing of it can be used
    _hashes: array[int] = field(default_factory=lambda: array("q"))

    def judge(self, record: Any) -> tuple[Shape | None, list[Finding]]:
        """The shape of a record (None: not valid) and the findings about it."""
        return inspect(record)

    def judge_plain(self, records: Sequence[dict[str, Any]]) -> list[Shape | None] | None:
        """The shapes of a block where every record is a valid `prompt` and nothing that decides otherwise, else None.

        Says what `judge` says of each, without a step of Python for each.
        """
        for names in set(map(tuple, records)):
            if "prompt" not in names or not DECISIVE.isdisjoint(names):
                return None
        prompts = [r["prompt"] for r in records]
        if set(map(type, prompts)) != {str} or not all(prompts) or any(map(str.isspace, prompts)):
            return None
        return [PROMPT] * len(records)

    def count(self, shapes: Sequence[Shape | None], lines: Sequence[int], records: Sequence[Any]) -> None:
        """Take a block's judged records in; those whose shape is None are left out of every count."""
        self.detector.add(shapes, lines)
        if shapes.count(PROMPT) == len(shapes):
            keys = [r["prompt"] for r in records]
        else:
            keys = [prompt_key(r) for s, r in zip(shapes, records, strict=True) if s is not None]
        self._hashes.extend(list(map(hash, keys)))

    def duplicates(self) -> int:
        """Prompts that stood in the file before; equal 64-bit hashes count as equal prompts."""
        if not self._hashes:
            return 0
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()  # in place: no copy
        return int(np.count_nonzero(hashes[1:] == hashes[:-1]))

    def refusals(self, *, skip_invalid: bool) -> list[LineProblem]:
        """The problems that forbid a run to use this file, at most a hundred (and one for the format)."""
        whole = [LineProblem(None, f) for f in self._whole_file()]
        disagreeing, _ = self.detector.disagreements()
        if skip_invalid:
            usable = sum(n for shape, n in self.detector.counts.items() if self.detector.usable(shape))
            if usable * 2 > self.detector.records:
                return [LineProblem(None, f) for f in self.fatal]
            return [*whole, *disagreeing, *self.findings.kept][: SHOWN + 1]
        errors = [p for p in self.findings.kept if p.finding.severity == "error"]
        return [*whole, *sorted([*errors, *disagreeing], key=_by_line)[:SHOWN]]

    def errors(self) -> int:
        """All errors, shown or not."""
        return self.findings.errors + self.detector.disagreements()[1] + len(self._whole_file())

    def report(self) -> FileReport:
        """The verdict as users and programs get it."""
        duplicates = self.duplicates()
        whole = [LineProblem(None, f) for f in self._whole_file()]
        if duplicates:
            found = f"{plural(duplicates, 'repeated prompt')} of {self.detector.records:,}"
            expected = "each prompt once (repeats are kept and trained on more often)"
            whole.append(LineProblem(None, Finding("prompt", found, expected, severity="warning")))
        disagreeing, _ = self.detector.disagreements()
        by_line = sorted([*self.findings.kept, *disagreeing], key=_by_line)
        errors = self.errors()
        return FileReport(
            file=self.file,
            format=self.detector.verdict(),
            ready=errors == 0,
            records=self.detector.records,
            duplicates=duplicates,
            evidence=self.detector.evidence(),
            problems=[*whole, *by_line][:SHOWN],
            problems_total=errors + self.findings.warnings + bool(duplicates),
            errors=errors,
        )

    def _whole_file(self) -> list[Finding]:
        findings = list(self.fatal)
        if problem := self.detector.verdict_problem():
            findings.append(problem)
        if not self.detector.records and not self.findings.errors and not findings:
            findings.append(Finding(None, "no records (an empty file)", "one record on each line"))
        return findings


def _by_line(problem: LineProblem) -> int:
    return problem.line or 0


def prompt_key(record: Mapping[str, Any]) -> Any:
    """What two records must share to count as the same prompt; a `prompt` equals one user turn of the same text."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        turns = without_answer(messages)
        if len(turns) == 1 and turns[0].get("role") == "user" and len(turns[0]) == _PLAIN_TURN:
            return _hashable(turns[0].get("content"))
        if all(type(m.get("content")) is str and len(m) == _PLAIN_TURN for m in turns):
            return tuple([(m.get("role"), m["content"]) for m in turns])
        return repr([sorted(m.items(), key=lambda item: str(item[0])) for m in turns])
    for name in ("prompt", "instruction", "text", "chosen"):
        if (value := record.get(name)) is not None:
            return _hashable(value) if name != "instruction" else (value, repr(record.get("input")))
    return repr(record)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else repr(value)
