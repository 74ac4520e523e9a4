"""What the reader reports about a file: findings by line, and the report that users and programs get.

It knows no file format; the JSON shape of a report is a public contract (`rlhf data check --json`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainers.errors import Problem

SHOWN = 100  # problems kept and shown per file; the rest is counted
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one record: the field, what was found, and what was expected, with what to do."""

    field: str | None
    found: str
    expected: str
    severity: Severity = "error"


@dataclass(frozen=True, slots=True)
class LineProblem:
    """A finding at a physical line (Parquet: row) from 1; `line` is None for a finding about the file itself."""

    line: int | None
    finding: Finding

    def as_json(self) -> dict[str, Any]:
        """The public form: `line`, `field`, `found`, `expected`, `severity`."""
        f = self.finding
        return {
            "line": self.line,
            "field": f.field,
            "found": f.found,
            "expected": f.expected,
            "severity": f.severity,
        }

    def as_problem(self, file: str) -> Problem:
        """As the error that stops a run.

        >>> print(LineProblem(3, Finding("prompt", "a number: 5", "a string")).as_problem("p.jsonl").message)
        prompt: found a number: 5; expected a string
        """
        where = file if self.line is None else f"{file}:{self.line}"
        name = "" if self.finding.field is None else f"{self.finding.field}: "
        return Problem(where, f"{name}found {self.finding.found}; expected {self.finding.expected}")


@dataclass(slots=True)
class Findings:
    """Collects problems in bounded memory: the first `SHOWN` are kept, all are counted."""

    kept: list[LineProblem] = field(default_factory=list)
    errors: int = 0
    warnings: int = 0

    def add(self, line: int | None, findings: Iterable[Finding]) -> None:
        """Count the findings of one line; keep them while there is room (errors before warnings)."""
        for finding in findings:
            if finding.severity == "error":
                self.errors += 1
            else:
                self.warnings += 1
            if len(self.kept) < SHOWN:
                self.kept.append(LineProblem(line, finding))
            elif finding.severity == "error" and self.errors <= SHOWN:
                self._displace(LineProblem(line, finding))

    def _displace(self, problem: LineProblem) -> None:
        """Warnings make room for errors: the report of a refused file must show why."""
        last = max(i for i, p in enumerate(self.kept) if p.finding.severity == "warning")
        del self.kept[last]
        self.kept.append(problem)


@dataclass(frozen=True, slots=True)
class Evidence:
    """How many records have one shape, and the line of the first."""

    shape: str
    format: str
    records: int
    first_line: int

    def as_json(self) -> dict[str, Any]:
        """The public form."""
        return {"shape": self.shape, "format": self.format, "records": self.records, "first_line": self.first_line}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """One file's verdict. `records` are valid ones; `problems` are the first hundred, by line."""

    file: str
    format: str
    ready: bool
    records: int
    duplicates: int
    evidence: Sequence[Evidence]
    problems: Sequence[LineProblem]
    problems_total: int
    errors: int

    def as_json(self) -> dict[str, Any]:
        """The public form, one entry of `files` in `rlhf data check --json`."""
        return {
            "file": self.file,
            "format": self.format,
            "ready": self.ready,
            "records": self.records,
            "duplicates": self.duplicates,
            "evidence": [e.as_json() for e in self.evidence],
            "problems": [p.as_json() for p in self.problems],
            "problems_total": self.problems_total,
        }


def plural(n: int, noun: str) -> str:
    """A count in words.

    >>> plural(1, "record"), plural(12000, "record")
    ('1 record', '12,000 records')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def shown(value: Any, limit: int = 60) -> str:
    """A value as a user sees it: its JSON kind and the beginning of it.

    >>> shown(5), shown("hello"), shown(None), shown([1, 2])
    ('a number: 5', 'a string: "hello"', 'null', 'a list of 2')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64 * 4:
        return "a number of many digits"
    if isinstance(value, int | float):
        return f"a number: {value}"
    if isinstance(value, str):
        text = value[:limit] + ("…" if len(value) > limit else "")
        return f'a string: "{printable(text)}"'
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        keys = ", ".join(f"`{printable(str(k)[:30])}`" for k in list(value)[:6])
        return f"an object with {keys}{', …' if len(value) > 6 else ''}" if value else "an empty object"
    return f"a value of type {type(value).__name__}"


def printable(text: str) -> str:
    """Text that is safe on a terminal and in UTF-8: control characters and lone surrogates escaped.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
