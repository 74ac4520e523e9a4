"""Rules on the reward: hacked, flat or falling, without spread, failing. Pure.

Every threshold is defined here with its reason; docs/doctor.md is the table for people.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.doctor.curves import SHORTEST_WINDOW, Series
from cluster.doctor.finding import Change, Curve, Finding, Remedy, SampleEvidence, Severity
from cluster.doctor.run_history import RunHistory

RISE_IN_STDS = 0.25  # of the samples' spread: a smaller rise of the trained reward is not worth exploiting
SLOW_RISE_IN_STDS = 0.05  # of the samples' spread over the full run: less would need hundreds of such runs
FALL_OF_WATCHED = 0.1  # of its early value: less is what another draw of prompts does
LENGTH_FACTOR = 1.5  # completions half as long again, or two thirds as long: reasoning may do so, so KL must grow too
LOOPING_RISE = 0.1  # one completion in ten more repeats itself: far beyond what healthy models do (about none)
KL_GROWTH = 1.25  # the last quarter against the middle: a healthy run's KL has levelled off by then
KL_HIGH = 0.5  # nats per token; RLHF runs end at 0.01 to 0.2, short completions at a little more
KL_FLOOR = 0.02  # nats per token: below it the policy generates what the reference does
LOST_IN_STDS = 0.75  # of the samples' spread below the first step's mean, which is known to a quarter of it or better
LOST_SAMPLES = 16  # … from so many samples on
LOST_STEPS = 10  # two of the shortest windows
FLAT_STEPS = 40  # slow rewards need tens of steps; fewer would accuse runs that have only begun
HARDLY_MOVED = 1e-3  # nats per token after FLAT_STEPS: e^0.001, one token in a thousand differs
IDLE_GROUPS = 0.7  # share of groups without any advantage: over two thirds of the generation is thrown away
NO_SPREAD = 1e-3  # of the reward's size: float noise of a bfloat16 reward model is larger
SPREAD_STEPS = 10  # so many steps in a row without spread are not chance
FAILED_WARNING = 0.01  # one in a hundred: seldom enough to harm little, often enough to have a cause
FAILED_OF_LIMIT = 0.5  # half of what stops the run (train.max_failed_fraction)


def reward_hacking(history: RunHistory) -> list[Finding]:
    """The trained reward rises while what is not trained on gets worse."""
    reward = history.curve("reward/mean")
    if not reward.rose(at_least=RISE_IN_STDS * _sample_spread(history)) or reward.shift == 0:
        return []
    signs = _signs(history)
    if not signs.curves and not signs.samples:
        return []
    kl = history.curve("kl/mean")
    grows = _grows(kl)
    if signs.length_only and not grows:
        return []
    far = len(kl) > 0 and kl.late >= KL_HIGH
    severity: Severity = "critical" if signs.watched and (grows or far) else "warning"
    curves = (reward.curve("trained reward, rising"), *signs.curves)
    growth = ", and the policy moves away from the reference" if grows or far else ""
    changes = history.raised_kl()
    return [
        Finding(
            rule="reward_hacking",
            severity=severity,
            title="Possible reward hacking",
            explanation=f"The trained reward rose from {reward.early:.3g} to {reward.late:.3g}, while "
            f"{'; '.join(signs.words)}{growth}. The policy may be exploiting the reward.",
            remedy=Remedy(
                "Read the samples of the last steps. Raise the KL coefficient so that the policy stays near the "
                "reference, use more diverse prompts, and train on the monitored reward by giving it a weight.",
                changes,
            ),
            curves=(*curves, kl.curve("divergence from the reference")) if grows or far else curves,
            samples=signs.samples,
        )
    ]


@dataclass(frozen=True, slots=True)
class _Signs:
    words: tuple[str, ...]
    curves: tuple[Curve, ...]
    samples: tuple[SampleEvidence, ...]
    watched: bool
    length_only: bool


def _signs(history: RunHistory) -> _Signs:
    """What goes the wrong way: monitored rewards, looping completions, lengths."""
    words: list[str] = []
    curves: list[Curve] = []
    for name in history.watched():
        watched = history.curve(f"reward/{name}")
        if len(watched) and watched.fell(at_least=FALL_OF_WATCHED * abs(watched.early)) and watched.shift < 0:
            words.append(f"the monitored reward {name} fell from {watched.early:.3g} to {watched.late:.3g}")
            curves.append(watched.curve("monitored, not trained on: falling"))
    by_watched = bool(words)
    samples: tuple[SampleEvidence, ...] = ()
    first, last = (history.samples[0], history.samples[-1]) if history.samples else (None, None)
    if first is not None and last is not None and last.looping_share - first.looping_share >= LOOPING_RISE:
        words.append(
            f"{last.looping_share:.0%} of the completions repeat themselves, {first.looping_share:.0%} at first"
        )
        samples = tuple(SampleEvidence(last.step, sample, "repeats itself") for sample in last.looping)
    by_loops = len(words) > by_watched
    length = history.curve("rollout/length_mean")
    if len(length) and (
        length.rose(at_least=(LENGTH_FACTOR - 1) * length.early)
        or length.fell(at_least=(1 - 1 / LENGTH_FACTOR) * length.early)
    ):
        words.append(f"the mean completion length went from {length.early:.3g} to {length.late:.3g} tokens")
        curves.append(length.curve("mean length"))
    return _Signs(tuple(words), tuple(curves), samples, by_watched, not by_watched and not by_loops)


def _sample_spread(history: RunHistory) -> float:
    """Early spread of the reward among a step's samples; 0 where it is not known."""
    std = history.curve("reward/std")
    return std.early if len(std) else 0.0


def _grows(kl: Series) -> bool:
    return kl.long_enough and kl.late > KL_FLOOR and kl.late > KL_GROWTH * kl.middle and kl.rose(at_least=0.0)


def learned(history: RunHistory) -> bool:
    """Whether the trained reward rose and no monitored one fell: the run learns."""
    reward = history.curve("reward/mean")
    rose = len(reward) > 0 and reward.rose(at_least=RISE_IN_STDS * _sample_spread(history)) and reward.shift > 0
    return rose and not _signs(history).watched


def no_improvement(history: RunHistory) -> list[Finding]:
    """After `FLAT_STEPS` steps the reward is where it was, or lower; silent where a rule below says why."""
    reward = history.curve("reward/mean")
    if _lost_at_once(history):
        return [_falling(history, reward.values[0])]
    if len(reward) < FLAT_STEPS or too_little_signal(history) or reward_without_spread(history):
        return []
    if reward.may_rise and reward.shift >= SLOW_RISE_IN_STDS * _sample_spread(history):
        return []
    kl = history.curve("kl/mean")
    if reward.fell(at_least=RISE_IN_STDS * _sample_spread(history)) and reward.shift < 0:
        return [_falling(history, reward.early)]
    still = len(kl) > 0 and abs(kl.late) < HARDLY_MOVED
    why = (
        f" The policy has hardly moved from the reference (KL {kl.late:.2g} nats per token): it learns too slowly."
        if still
        else " The policy moves without improving: the reward may not be learnable from these prompts."
        if len(kl)
        else ""
    )
    remedy = (
        Remedy("Raise the learning rate.", history.scaled("train.learning_rate", 3.0))
        if still
        else Remedy(
            "Check the reward on completions that you have ranked yourself. More samples per prompt and a lower "
            "KL coefficient leave more room to learn.",
            history.scaled("sampling.n", 2),
        )
    )
    curves = (reward.curve("flat"), kl.curve("near 0")) if still else (reward.curve("flat"),)
    return [
        Finding(
            rule="no_improvement",
            severity="warning",
            title="No improvement: the reward is flat",
            explanation=f"The reward is {reward.late:.3g} after {len(reward)} steps; it was {reward.early:.3g} at the "
            f"beginning, no significant difference.{why}",
            remedy=remedy,
            curves=curves,
        )
    ]


def _lost_at_once(history: RunHistory) -> bool:
    """Whether the first steps threw away what the policy could do: too fast for windows to see."""
    reward, std, samples = (history.curve(key) for key in ("reward/mean", "reward/std", "rollout/samples"))
    if len(reward) < LOST_STEPS or not len(std) or not len(samples) or samples.values[0] < LOST_SAMPLES:
        return False
    return reward.values[0] - reward.late >= LOST_IN_STDS * std.values[0] > 0


def _falling(history: RunHistory, before: float) -> Finding:
    reward = history.curve("reward/mean")
    return Finding(
        rule="no_improvement",
        severity="critical",
        title="The reward is falling",
        explanation=f"The reward went from {before:.3g} to {reward.late:.3g} over {len(reward)} steps.",
        remedy=Remedy(
            "Lower the learning rate. If it falls again, read the samples: does the reward prefer the completions "
            "that you would?",
            history.scaled("train.learning_rate", 0.5),
        ),
        curves=(reward.curve("falling"),),
    )


def too_little_signal(history: RunHistory) -> list[Finding]:
    """In most groups all completions get the same reward: nothing is learned from them."""
    idle = history.curve("advantage/zero_groups")
    if not idle.long_enough or idle.late < IDLE_GROUPS:
        return []
    solved = learned(history)
    meaning = (
        "The reward has risen: the prompts are probably solved, and more steps on them bring little."
        if solved
        else "The prompts are too easy or too hard for this policy, or the reward is too coarse."
    )
    return [
        Finding(
            rule="too_little_signal",
            severity="info" if solved else "warning",
            title="Most groups have zero advantage",
            explanation=f"In {idle.late:.0%} of the groups all completions got the same reward: zero "
            f"advantage. {meaning}",
            remedy=Remedy(
                "Use prompts that the policy solves sometimes but not always, or a finer reward. More samples per "
                "prompt and a higher temperature make rewards differ within a group; algorithm.dynamic_sampling "
                "replaces groups in which they do not.",
                history.scaled("sampling.n", 2) + history.scaled("sampling.temperature", 1.2, most=1.5),
            ),
            curves=(idle.curve("groups with zero advantage"),),
        )
    ]


def reward_without_spread(history: RunHistory) -> list[Finding]:
    """The reward gives all completions of a step nearly the same score."""
    std, mean = history.curve("reward/std"), history.curve("reward/mean")
    if len(std) < SPREAD_STEPS or not len(mean):
        return []
    limit = NO_SPREAD * max(abs(mean.late), NO_SPREAD)
    recent = std.last(SPREAD_STEPS)
    improved = mean.rose(at_least=RISE_IN_STDS * std.early) and mean.shift > 0
    if max(recent) > limit or improved:
        return []
    return [
        Finding(
            rule="reward_without_spread",
            severity="critical",
            title="The reward does not distinguish completions",
            explanation=f"Over the last {SPREAD_STEPS} steps the scores of a step spread by at most {max(recent):.2g} "
            f"around {mean.late:.3g}. If all completions score the same, nothing can be learned.",
            remedy=Remedy(
                "Check the reward: is it the right model, does it get the prompt and the completion, does a function "
                "return a constant, does `clip` cut everything to one value? Score a good and a bad completion by hand."
            ),
            curves=(std.curve("spread of the scores"),),
        )
    ]


def reward_failures(history: RunHistory) -> list[Finding]:
    """Samples could not be scored."""
    failed, total = history.curve("reward/failed"), history.curve("rollout/samples")
    if len(failed) < SHORTEST_WINDOW or len(total) != len(failed):
        return []
    window = failed.window
    share = sum(failed.last(window)) / max(1.0, sum(total.last(window)))
    if share < FAILED_WARNING:
        return []
    limit = history.setting("train.max_failed_fraction")
    near = isinstance(limit, int | float) and share >= FAILED_OF_LIMIT * limit
    names = sorted({name for summary in history.samples for name in summary.failed_by})
    stop = f"; the run stops at {limit:.0%} of a step" if isinstance(limit, int | float) else ""
    samples = [SampleEvidence(s.step, sample, "not scored") for s in history.samples for sample in s.failed]
    return [
        Finding(
            rule="reward_failures",
            severity="critical" if near else "warning",
            title="Some completions cannot be scored",
            explanation=f"{share:.1%} of the last {window} steps' samples have no score and are left out{stop}."
            + (f" Failing: {', '.join(names)}." if names else ""),
            remedy=Remedy(
                "The logs name the first cause of each step. A slow reward needs a longer timeout or more replicas; "
                "one that fails on some completions must be fixed.",
                tuple(change for name in names for change in _longer_timeout(history, name)),
            ),
            curves=(failed.curve("samples without a score"),),
            samples=tuple(samples[-6:]),
        )
    ]


def _longer_timeout(history: RunHistory, name: str) -> tuple[Change, ...]:
    index = history.reward_index(name)
    return () if index is None else history.scaled(f"rewards.{index}.timeout_s", 2.0)
