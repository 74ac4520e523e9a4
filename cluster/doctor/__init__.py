"""The Doctor: from a run's metrics, config and samples to findings with evidence and a remedy.

Pure functions: no file is read, nothing is imported that is slow to import (no torch). A run that is too short, or
whose numbers only wander, gets no finding. docs/doctor.md lists the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.doctor.finding import SEVERITIES, Change, Curve, Finding, Remedy, SampleEvidence, Severity
from cluster.doctor.policy_rules import kl_range, mode_collapse, unstable_training
from cluster.doctor.reward_rules import (
    no_improvement,
    reward_failures,
    reward_hacking,
    reward_without_spread,
    too_little_signal,
)
from cluster.doctor.rollout_rules import logprob_gap, truncation
from cluster.doctor.run_history import RunHistory
from cluster.doctor.sample_summary import SampleRow, SampleSummary, summarize
from cluster.doctor.teacher_rules import teacher_not_followed

__all__ = [
    "RULES",
    "Change",
    "Curve",
    "Finding",
    "Remedy",
    "SampleEvidence",
    "SampleRow",
    "SampleSummary",
    "Severity",
    "diagnose",
    "summarize",
]

RULES: tuple[Callable[[RunHistory], list[Finding]], ...] = (
    reward_hacking,
    unstable_training,
    mode_collapse,
    no_improvement,
    teacher_not_followed,
    too_little_signal,
    reward_without_spread,
    kl_range,
    truncation,
    reward_failures,
    logprob_gap,
)


def diagnose(
    metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any], samples: Sequence[SampleSummary] = ()
) -> list[Finding]:
    """Every problem that the numbers show, the most severe first; [] for a run that looks healthy.

    `metrics` are the lines of `metrics.jsonl` in order, `config` the resolved config as plain values, `samples` the
    summaries (`summarize`) of some steps: the first few and the last few are enough. Step 0, the evaluation before
    training, is not a step. Pydantic's `ValidationError` where `rewards` or `sync` of the config are not valid.
    """
    history = RunHistory(
        [row for row in metrics if row["step"] > 0], config, tuple(sorted(samples, key=lambda summary: summary.step))
    )
    found = [finding for rule in RULES for finding in rule(history)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
