"""Rules on distillation: whether the policy comes nearer to its teacher. Pure.

Every threshold stands here with its reason; docs/doctor.md is the table for people.
"""

from __future__ import annotations

from cluster.doctor.curves import Series, series
from cluster.doctor.finding import Finding, Remedy
from cluster.doctor.reward_rules import FLAT_STEPS
from cluster.doctor.run_history import RunHistory

TAUGHT = 1e-3  # nats per token: e^0.001, the teacher would give one token in a thousand otherwise
SLOW_FALL = 0.02  # of the divergence over the whole run: less would need fifty such runs
AWAY = 0.25  # of the divergence: a policy that learns from its teacher comes nearer
_BY_THE_POLICY = "rollout/logprob_gap_mean"  # measured where the policy wrote the step's answers, and only there


def teacher_not_followed(patient: RunHistory) -> list[Finding]:
    """GKD: after `FLAT_STEPS` steps the divergence from the teacher is what it was, or more."""
    jsd = _divergence(patient)
    if len(patient.curve("distill/jsd")) < FLAT_STEPS or not jsd.long_enough or jsd.late < TAUGHT:
        return []
    away = jsd.rose(at_least=AWAY * jsd.early)
    if not away and -jsd.shift >= SLOW_FALL * jsd.early:
        return []
    if away:
        title, why, moved = "goes away from", "the steps are too large", "rises"
        remedy = Remedy("Lower the learning rate.", patient.scaled("train.learning_rate", 0.5))
    else:
        title, why, moved = "does not come nearer to", "no difference to speak of", "stays"
        remedy = Remedy(
            "Raise the learning rate. With `algorithm.lmbda` 0 the teacher writes, which shows whether the policy can "
            "follow it at all.",
            patient.scaled("train.learning_rate", 3.0),
        )
    said = f"After {jsd.steps[-1]} steps it is {jsd.late:.3g} nats per token, at first it was {jsd.early:.3g}"
    return [
        Finding(
            rule="teacher_not_followed",
            severity="critical" if away else "warning",
            title=f"The policy {title} its teacher",
            explanation=f"{said}: {why}.",
            remedy=remedy,
            curves=(jsd.curve(f"the divergence from the teacher {moved}"),),
        )
    ]


def _divergence(patient: RunHistory) -> Series:
    """Of the steps that the policy wrote, if it wrote any: on what others wrote the level is another one, and a mixture
    of two levels moves with who happened to write."""
    own = [row for row in patient.metrics if _BY_THE_POLICY in row]
    return series(own, "distill/jsd") if own else patient.curve("distill/jsd")
