"""What is counted while one file is read: verdict, findings, duplicates. The same for lines and for Parquet rows."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainers.data.detect import Detector, Shape
from trainers.data.findings import SHOWN, FileReport, Finding, Findings, LineProblem, plural
from trainers.data.messages import without_response

_PLAIN_TURN = 2  # keys of a message that has only role and content


@dataclass(slots=True)
class Tally:
    """The growing verdict on one file. Beside 8 bytes a record (the prompt's hash) its memory is constant."""

    file: str
    detector: Detector
    findings: Findings = field(default_factory=Findings)
    fatal: list[Finding] = field(default_factory=list)  # about the file itself: it cannot be used at all
    _hashes: array[int] = field(default_factory=lambda: array("q"))

    def count(self, shapes: Sequence[Shape | None], lines: Sequence[int], prompts: Iterable[Any]) -> None:
        """Take a block in: each line's shape (None: no valid record), and what identifies each valid one's prompt."""
        self.detector.add(shapes, lines)
        self._hashes.extend(list(map(hash, prompts)))

    def duplicates(self) -> int:
        """Prompts that occurred in the file before; equal 64-bit hashes count as equal prompts."""
        if not self._hashes:
            return 0
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()  # in place: no copy
        return int(np.count_nonzero(hashes[1:] == hashes[:-1]))

    def refusals(self, *, skip_invalid: bool) -> list[LineProblem]:
        """The problems that forbid a run to use this file, at most a hundred (and one for the format)."""
        overall = [LineProblem(None, f) for f in self._file_findings()]
        disagreeing, _ = self.detector.disagreements()
        if skip_invalid:
            usable = sum(n for shape, n in self.detector.counts.items() if self.detector.usable(shape))
            if usable * 2 > self.detector.records:
                return [LineProblem(None, f) for f in self.fatal]
            return [*overall, *disagreeing, *self.findings.kept][: SHOWN + 1]
        errors = [p for p in self.findings.kept if p.finding.severity == "error"]
        return [*overall, *sorted([*errors, *disagreeing], key=_by_line)[:SHOWN]]

    def errors(self) -> int:
        """All errors, shown or not."""
        return self.findings.errors + self.detector.disagreements()[1] + len(self._file_findings())

    def report(self) -> FileReport:
        """The verdict as users and programs get it."""
        duplicates = self.duplicates()
        overall = [LineProblem(None, f) for f in self._file_findings()]
        if duplicates:
            found = f"{plural(duplicates, 'repeated prompt')} of {self.detector.records:,}"
            expected = "each prompt once (repeats are kept and trained on more often)"
            overall.append(LineProblem(None, Finding("prompt", found, expected, severity="warning")))
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
            problems=[*overall, *by_line][:SHOWN],
            problems_total=errors + self.findings.warnings + bool(duplicates),
            errors=errors,
        )

    def _file_findings(self) -> list[Finding]:
        findings = list(self.fatal)
        if problem := self.detector.verdict_problem():
            findings.append(problem)
        if not self.detector.records and not self.findings.errors and not findings:
            findings.append(Finding(None, "no records (an empty file)", "one record on each line"))
        return findings


def _by_line(problem: LineProblem) -> int:
    return problem.line or 0


def prompt_key(record: Mapping[str, Any]) -> Hashable:
    """What two records must share to count as the same prompt; a `prompt` equals one user turn of the same text."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        turns = without_response(messages)
        if all(type(m.get("content")) is str and type(m.get("role")) is str and len(m) == _PLAIN_TURN for m in turns):
            return turns_key(tuple([m["role"] for m in turns]), tuple([m["content"] for m in turns]))
        return repr([sorted(m.items(), key=lambda item: str(item[0])) for m in turns])
    for name in ("prompt", "instruction", "text", "chosen"):
        if (value := record.get(name)) is not None:
            if name == "instruction":
                return value, repr(record.get("input"))
            return value if isinstance(value, str) else repr(value)
    return repr(record)


def turns_key(roles: tuple[str, ...], contents: tuple[str, ...]) -> Hashable:
    """The same for turns of nothing but role and content."""
    return contents[0] if roles == ("user",) else (roles, contents)
