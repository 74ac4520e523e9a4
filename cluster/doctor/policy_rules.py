"""Rules on the policy: unstable, collapsed, too far from its start. Pure.

Every threshold is defined here with its reason; docs/doctor.md is the table for people.
"""

from __future__ import annotations

from cluster.doctor.curves import Series, spikes
from cluster.doctor.finding import Change, Curve, Finding, Remedy, SampleEvidence, sentence
from cluster.doctor.reward_rules import KL_HIGH, learned
from cluster.doctor.run_history import RunHistory

GRAD_SPIKE = 5.0  # × the neighbours' median: heavy-tailed but healthy gradient norms stay below about 3
GRAD_HUGE = 50.0  # × the neighbours' median: once is enough: no ordinary batch does that
KL_SPIKE = 4.0  # × the neighbours' median
KL_SPIKE_FLOOR = 0.05  # nats per token: jumps below it change no completion
SPIKES = 3  # among the last 50 steps: one or two come from a strange batch
GRAD_GROWTH = 10.0  # the late median against the early one: an order of magnitude is not a drift
CLIPPED = 0.3  # of the tokens: usual is 0.05 to 0.2; beyond, the update is mostly cut off
ENTROPY_LEFT = 0.3  # of the early entropy: sharpening halves it in healthy runs, collapse takes nearly all
IDLE_GROUPS = 0.5  # half of the groups give one completion's worth of information
IDLE_RISE = 0.3  # and it was not so from the start
COLLAPSED_GROUPS = 0.8  # from here on hardly anything is learned
DISTINCT_LEFT = 0.5  # distinct completions in a group fell to half of what they were
KL_VERY_HIGH = 1.5  # e^1.5: the reference gives each token less than a quarter of the policy's probability
KL_NEGATIVE = -0.01  # a divergence is ≥ 0; noise of its estimate is smaller
KL_OFF_TARGET = 2.0  # × the target, either way: the controller moves the coefficient slowly, but not that slowly
KL_LIMITED = 0.01  # tokens beyond ±20 nats are outside of what k3 computes; healthy runs have none


def unstable_training(history: RunHistory) -> list[Finding]:
    """Numbers that are not finite, spikes of gradient norm or KL, too many clipped tokens."""
    grad, kl, clipped = (history.curve(key) for key in ("policy/grad_norm", "kl/mean", "policy/clip_fraction"))
    loss = history.curve("policy/loss")
    slower = history.scaled("train.learning_rate", 0.5)
    if broken := sorted({*grad.broken, *loss.broken}):
        curve = Curve("policy/loss", tuple(broken[-10:]), (None,) * len(broken[-10:]), "not a finite number")
        return [
            _unstable("critical", f"The loss or the gradient was not finite at step {broken[0]}.", (curve,), slower)
        ]
    words, curves = [], []
    changes = slower
    floor = history.setting("train.max_grad_norm") or 0.0
    if huge := spikes(grad, factor=GRAD_HUGE, above=10 * floor, recent=len(grad)):
        largest = max(value for step, value in zip(grad.steps, grad.values, strict=True) if step in huge)
        words.append(f"the gradient norm was {largest:.4g} at step {huge[0]}")
        curves.append(grad.at(huge, "spike"))
    elif len(jumps := spikes(grad, factor=GRAD_SPIKE, above=floor)) >= SPIKES:
        words.append(f"the gradient norm spiked {len(jumps)} times in the last 50 steps")
        curves.append(grad.at(jumps, "spikes"))
    elif len(grad) and grad.late > floor and grad.rose(at_least=(GRAD_GROWTH - 1) * grad.early) and grad.early > 0:
        words.append(f"the gradient norm grew from {grad.early:.3g} to {grad.late:.3g}")
        curves.append(grad.curve("growing"))
    if len(jumps := spikes(kl, factor=KL_SPIKE, above=KL_SPIKE_FLOOR)) >= SPIKES:
        words.append(f"the KL divergence spiked {len(jumps)} times in the last 50 steps")
        curves.append(kl.at(jumps, "spikes"))
        changes += history.raised_kl()
    if clipped.long_enough and clipped.late >= CLIPPED:
        words.append(f"{clipped.late:.0%} of the tokens are clipped")
        curves.append(clipped.curve("share of tokens whose update is clipped"))
        changes += history.scaled("train.updates_per_step", 0.5, least=1)
    if not words:
        return []
    return [_unstable("critical" if len(words) > 1 else "warning", sentence(words), tuple(curves), changes)]


def _unstable(severity: str, text: str, curves: tuple[Curve, ...], changes: tuple[Change, ...]) -> Finding:
    return Finding(
        rule="unstable_training",
        severity="critical" if severity == "critical" else "warning",
        title="Training is unstable",
        explanation=text + " Updates that are too large undo what earlier ones learned.",
        remedy=Remedy(
            "Lower the learning rate. A higher KL coefficient and a warm-up also stabilize training.", changes
        ),
        curves=curves,
    )


def mode_collapse(history: RunHistory) -> list[Finding]:
    """The entropy is nearly gone, and the completions of a prompt are nearly identical."""
    entropy, idle = history.curve("policy/entropy"), history.curve("advantage/zero_groups")
    if not (entropy.fell(at_least=(1 - ENTROPY_LEFT) * entropy.early) if len(entropy) else False):
        return []
    distinct = [(s.step, s.distinct_share) for s in history.samples if s.distinct_share is not None]
    alike = len(distinct) > 1 and distinct[-1][1] <= DISTINCT_LEFT * distinct[0][1]
    idler = len(idle) > 0 and idle.late >= IDLE_GROUPS and idle.rose(at_least=IDLE_RISE)
    if not (alike or idler):
        return []
    solved = learned(history)
    hopeless = idler and idle.late >= COLLAPSED_GROUPS
    words = [f"the entropy fell from {entropy.early:.3g} to {entropy.late:.3g} nats"]
    curves = [entropy.curve("falling")]
    if idler:
        words.append(
            f"in {idle.late:.0%} of the groups all completions get the same reward ({idle.early:.0%} at first)"
        )
        curves.append(idle.curve("groups with zero advantage"))
    if alike:
        words.append(
            f"the share of distinct completions in a group went from {distinct[0][1]:.0%} to {distinct[-1][1]:.0%}"
        )
    close = " The reward rose all the same, so this is expected: the prompts are nearly solved."
    last = history.samples[-1] if alike else None
    return [
        Finding(
            rule="mode_collapse",
            severity="info" if solved else "critical" if hopeless else "warning",
            title="Mode collapse: completions are nearly identical",
            explanation=sentence(words) + (close if solved else ""),
            remedy=Remedy(
                "Raise the temperature and the KL coefficient, let rare tokens gain more (`clip_high` 0.28), and use "
                "more diverse prompts. Start again from a checkpoint before the collapse.",
                history.scaled("sampling.temperature", 1.2, most=1.5)
                + history.raised_kl()
                + history.scaled("algorithm.clip_high", 1.0, least=0.28),
            ),
            curves=tuple(curves),
            samples=tuple(SampleEvidence(last.step, one, "identical to others of its group") for one in last.alike)
            if last
            else (),
        )
    ]


def kl_range(history: RunHistory) -> list[Finding]:
    """The KL divergence from the reference is too large, off its target, or negative."""
    kl = history.curve("kl/mean")
    limited = history.curve("kl/limited_fraction")
    if not kl.long_enough:
        return []
    target = (
        history.setting("algorithm.kl.target") if history.setting("algorithm.kl.controller") == "adaptive" else None
    )
    if kl.late < KL_NEGATIVE and kl.late < -4 * kl.error():
        return [_negative(kl)]
    if target and kl.late > KL_OFF_TARGET * target:
        return [_off_target(history, kl, target)]
    if kl.late >= KL_HIGH or (limited.long_enough and limited.late >= KL_LIMITED):
        curves = (
            kl.curve("nats per token"),
            *((limited.curve("beyond ±20 nats"),) if len(limited) and limited.late >= KL_LIMITED else ()),
        )
        return [
            Finding(
                rule="kl_range",
                severity="critical" if kl.late >= KL_VERY_HIGH else "warning",
                title="The policy is far from the reference",
                explanation=f"The KL divergence is {kl.late:.3g} nats per token; healthy runs stay "
                f"below {KL_HIGH}. Beyond that, fluency and knowledge that no reward measures are lost.",
                remedy=Remedy(
                    "Raise the KL coefficient (0.05 to 0.1 is recommended) and lower the learning rate.",
                    history.raised_kl() + history.scaled("train.learning_rate", 0.5),
                ),
                curves=curves,
            )
        ]
    return []


def _negative(kl: Series) -> Finding:
    return Finding(
        rule="kl_range",
        severity="warning",
        title="The KL divergence is negative",
        explanation=f"It is {kl.late:.3g} nats per token on average. A divergence is never negative, so the samples "
        "do not come from the policy that is measured: they are stale, or generator and trainer disagree.",
        remedy=Remedy("Check the log-probability gap and the staleness; report it as a bug if both are near 0."),
        curves=(kl.curve("below 0"),),
    )


def _off_target(history: RunHistory, kl: Series, target: float) -> Finding:
    return Finding(
        rule="kl_range",
        severity="warning",
        title="The KL divergence is above its target",
        explanation=f"It is {kl.late:.3g} nats per token, the target is {target:g}: the adaptive coefficient lags "
        "behind.",
        remedy=Remedy(
            "Let the controller react faster, and start from a higher coefficient.",
            history.scaled("algorithm.kl.horizon", 0.5, least=1) + history.raised_kl(),
        ),
        curves=(kl.curve("nats per token"),),
    )
