"""A step's metrics, from what was written, scored and learned: pure, the one place that names the keys.

A key that does not apply is absent, never 0. What each key means is in `docs/semantics.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.messages import Proof, StepReport
from trainers.algorithms.base import VALUE_MOMENTS, WEIGHT_MOMENTS, Mean
from trainers.algorithms.ppo import explained_variance
from trainers.types import Rollout, TrainSample


@dataclass(slots=True)
class Clock:
    """Seconds of each phase of a step."""

    generate: float = 0.0  # until the last completion was written
    reward: float = 0.0  # from then until the last score
    annotate: float = 0.0
    train: float = 0.0
    sync: float = 0.0
    step: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """Everything that the metrics of a step are made from."""

    step: int
    version: int  # of the policy that wrote, before the update
    rollouts: Sequence[Rollout]  # all that were written, also those that were replaced
    replaced: int | None = None  # how many of them were; None without dynamic sampling
    samples: Sequence[TrainSample]
    report: StepReport
    proof: Proof
    kl_coef: float | None
    trained_rewards: bool = True  # False: rewards are watched only, as GKD may have it
    clock: Clock = field(default_factory=Clock)


def step_metrics(facts: StepFacts) -> dict[str, float]:
    """The metrics of one step, in the order in which they are written."""
    report, clock = facts.report, facts.clock
    tokens = sum(len(c.tokens) for r in facts.rollouts for c in r.completions)
    metrics: dict[str, float] = {"step": facts.step, "policy/version": facts.version + 1}
    metrics |= reward_metrics(facts.rollouts, trained=facts.trained_rewards)
    if facts.kl_coef is not None:
        metrics["kl/coef"] = facts.kl_coef
    hidden = {*WEIGHT_MOMENTS, *VALUE_MOMENTS}
    metrics |= {name: mean.value for name, mean in report.metrics.items() if name not in hidden}
    metrics |= effective_sample_size(report.metrics)
    if (explained := explained_variance(report.metrics)) is not None:
        metrics["value/explained_variance"] = explained
    metrics["policy/loss"] = report.loss
    if report.grad_norm is not None:
        metrics |= {"policy/grad_norm": report.grad_norm, "policy/lr": report.learning_rate}
    if facts.trained_rewards:
        metrics["advantage/zero_groups"] = zero_groups(facts.samples)
    if facts.replaced is not None:
        metrics["advantage/replaced_groups"] = facts.replaced
    metrics |= rollout_metrics(facts.rollouts)
    if "rollout/logprob_gap_mean" in report.metrics:  # not where someone else than the policy wrote
        metrics |= {"rollout/logprob_gap_p999": report.gap_quantile, "rollout/logprob_gap_max": report.gap_max}
    metrics |= {
        "rollout/staleness_max": facts.version - min(c.policy_version for r in facts.rollouts for c in r.completions),
        "weights/sync_bytes": facts.proof.bytes,
        "weights/sync_s": clock.sync,
        "weights/canary_gap": facts.proof.canary_gap,
        "time/generate_s": clock.generate,
        "time/reward_s": clock.reward,
        "time/annotate_s": clock.annotate,
        "time/train_s": clock.train,
        "time/step_s": clock.step,
        "throughput/tokens_per_s": tokens / clock.step if clock.step else 0.0,
    }
    return metrics


def effective_sample_size(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """`importance/ess`: (mean w)² / mean w², what share of the tokens the weighted ones are worth."""
    first, second = (metrics.get(name) for name in WEIGHT_MOMENTS)
    if first is None or second is None or second.value == 0:
        return {}
    return {"importance/ess": first.value**2 / second.value}


def reward_metrics(rollouts: Sequence[Rollout], *, trained: bool = True) -> dict[str, float]:
    """Mean and spread (unbiased) of the trained reward, the mean of each source, and how many scores failed."""
    watched = {f"reward/{name}": mean for name, mean in source_means(rollouts).items()}
    if not trained:
        return watched
    scores = [r for rollout in rollouts for r in rollout.reward if r is not None]
    total = sum(len(rollout.reward) for rollout in rollouts)
    metrics: dict[str, float] = {}
    if scores:
        metrics["reward/mean"] = float(np.mean(scores))
    if len(scores) > 1:
        metrics["reward/std"] = float(np.std(scores, ddof=1))
    return metrics | watched | {"reward/failed": total - len(scores)}


def source_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean raw score of each reward source, over what it could score."""
    scores: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, values in rollout.rewards.items():
            scores.setdefault(name, []).extend(v for v in values if v is not None)
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths and counts of what was written."""
    completions = [c for rollout in rollouts for c in rollout.completions]
    lengths = [len(c.tokens) for c in completions]
    return {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/truncated_fraction": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "rollout/samples": len(completions),
        "rollout/tokens": sum(lengths),
    }


def zero_groups(samples: Sequence[TrainSample]) -> float:
    """Share of groups whose every advantage is 0: they teach nothing."""
    groups: dict[int, bool] = {}
    for sample in samples:
        alive = bool(np.any(sample.advantages))
        groups[sample.sample.group] = groups.get(sample.sample.group, False) or alive
    return sum(not alive for alive in groups.values()) / len(groups) if groups else 0.0


def eval_metrics(rollouts: Sequence[Rollout], *, trained: bool = True) -> dict[str, float]:
    """`eval/reward_mean` and `eval/<name>`."""
    scores = [r for rollout in rollouts for r in rollout.reward if r is not None]
    metrics: Mapping[str, float] = {f"eval/{name}": mean for name, mean in source_means(rollouts).items()}
    return ({"eval/reward_mean": float(np.mean(scores))} if trained and scores else {}) | dict(metrics)
