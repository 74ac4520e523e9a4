"""What the Doctor reports: a finding with its evidence and its remedy. Plain data; it knows nothing of rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["info", "warning", "critical"]

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")  # the most severe first


def sentence(parts: Sequence[str]) -> str:
    """One sentence of several parts; abbreviations keep their capitals.

    >>> sentence(["the KL divergence jumped", "ESS fell"])
    'The KL divergence jumped; ESS fell.'
    """
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


@dataclass(frozen=True, slots=True)
class Curve:
    """The part of a metric's curve that a finding rests on."""

    key: str  # as in metrics.jsonl
    steps: tuple[int, ...]
    values: tuple[float | None, ...]  # None: not a finite number
    note: str = ""  # what to see there


@dataclass(frozen=True, slots=True)
class SampleEvidence:
    """A completion that shows the problem."""

    step: int
    sample_id: str
    note: str


@dataclass(frozen=True, slots=True)
class Change:
    """One setting to change: a dotted key of the config and its new value."""

    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do, in words and as changes with which the run can be cloned; no changes: no setting can fix it."""

    text: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a run."""

    rule: str
    severity: Severity
    title: str
    explanation: str
    remedy: Remedy
    curves: tuple[Curve, ...] = ()
    samples: tuple[SampleEvidence, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values: rule, severity, title, explanation, evidence {metrics, samples}, remedy {text, changes}."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "title": self.title,
            "explanation": self.explanation,
            "evidence": {
                "metrics": [asdict(curve) for curve in self.curves],
                "samples": [asdict(sample) for sample in self.samples],
            },
            "remedy": asdict(self.remedy),
        }
