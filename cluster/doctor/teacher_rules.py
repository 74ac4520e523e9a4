"""Rules on distillation: whether the policy converges to its teacher. Pure.

Every threshold is defined here with its reason; docs/doctor.md is the table for people.
"""

from __future__ import annotations

from cluster.doctor.curves import Series, series
from cluster.doctor.finding import Finding, Remedy
from cluster.doctor.reward_rules import FLAT_STEPS
from cluster.doctor.run_history import RunHistory

TAUGHT = 1e-3  # nats per token: e^0.001, the teacher would choose one token in a thousand differently
SLOW_FALL = 0.02  # of the divergence over the full run: less would need fifty such runs
AWAY = 0.25  # of the divergence: a policy that learns from its teacher converges
_BY_THE_POLICY = (
    "rollout/logprob_gap_mean"  # recorded for steps whose completions the policy generated, and only for them
)


def teacher_not_followed(history: RunHistory) -> list[Finding]:
    """GKD: after `FLAT_STEPS` steps the divergence from the teacher is what it was, or more."""
    jsd = _divergence(history)
    if len(history.curve("distill/jsd")) < FLAT_STEPS or not jsd.long_enough or jsd.late < TAUGHT:
        return []
    away = jsd.rose(at_least=AWAY * jsd.early)
    if not away and -jsd.shift >= SLOW_FALL * jsd.early:
        return []
    if away:
        title, why, moved = "is diverging from", "the updates are too large", "rising"
        remedy = Remedy("Lower the learning rate.", history.scaled("train.learning_rate", 0.5))
    else:
        title, why, moved = "is not converging to", "no significant difference", "flat"
        remedy = Remedy(
            "Raise the learning rate. With `algorithm.lmbda` 0 the teacher generates, which shows whether the policy "
            "can follow it at all.",
            history.scaled("train.learning_rate", 3.0),
        )
    change = f"After {jsd.steps[-1]} steps the divergence is {jsd.late:.3g} nats per token, {jsd.early:.3g} at first"
    return [
        Finding(
            rule="teacher_not_followed",
            severity="critical" if away else "warning",
            title=f"The policy {title} its teacher",
            explanation=f"{change}: {why}.",
            remedy=remedy,
            curves=(jsd.curve(f"divergence from the teacher, {moved}"),),
        )
    ]


def _divergence(history: RunHistory) -> Series:
    """Of the steps that the policy generated, if any: on other completions the level differs, and a mixture of two
    levels moves with the source of each step."""
    own = [row for row in history.metrics if _BY_THE_POLICY in row]
    return series(own, "distill/jsd") if own else history.curve("distill/jsd")
