"""Rules on what was generated: truncated, or not from the policy that is trained. Pure.

Every threshold is defined here with its reason; docs/doctor.md is the table for people.
"""

from __future__ import annotations

from actors.config import SyncConfig
from cluster.doctor.curves import SHORTEST_WINDOW
from cluster.doctor.finding import Change, Finding, Remedy, SampleEvidence
from cluster.doctor.run_history import RunHistory

TRUNCATED = 0.2  # one completion in five is unfinished: rewards then score fragments
FORMERLY = 0.05  # below it completions had room enough at first: they grew into the limit
MOSTLY_TRUNCATED = 0.5  # the reward's mean is that of fragments
GAP_OF_LIMIT = 0.5  # half of the difference that stops the run (sync.max_logprob_gap)
GAP_GROWTH = 10.0  # × the early mean gap: rounding does not grow with training by an order of magnitude
GAP_FLOOR = 0.02  # of the limit: growth below it is growth of rounding errors


def truncation(history: RunHistory) -> list[Finding]:
    """Many completions end at `sampling.max_tokens`."""
    cut = history.curve("rollout/truncated_fraction")
    if len(cut) < SHORTEST_WINDOW or cut.late < TRUNCATED:
        return []
    last = history.samples[-1] if history.samples else None
    longest = history.setting("sampling.max_tokens")
    grew = cut.long_enough and cut.early <= FORMERLY
    remedy = (
        Remedy(
            "They were short enough at first, so they grew: does the reward favor length? A higher KL coefficient "
            "limits the growth.",
            history.raised_kl(),
        )
        if grew
        else Remedy(
            "Allow longer completions if the model's context has room.", history.scaled("sampling.max_tokens", 2)
        )
    )
    return [
        Finding(
            rule="truncation",
            severity="critical" if cut.late >= MOSTLY_TRUNCATED else "warning",
            title="Completions are truncated",
            explanation=f"{cut.late:.0%} of the completions reach the limit"
            + (f" of {longest} tokens" if longest else "")
            + " before they end. The reward scores fragments, and the policy never learns to stop.",
            remedy=remedy,
            curves=(cut.curve("share of truncated completions"),),
            samples=tuple(SampleEvidence(last.step, one, "truncated") for one in last.truncated) if last else (),
        )
    ]


def logprob_gap(history: RunHistory) -> list[Finding]:
    """Generator and trainer give the same tokens different log-probabilities."""
    high, mean = history.curve("rollout/logprob_gap_p999"), history.curve("rollout/logprob_gap_mean")
    if not len(high):  # a run of before the quantile was recorded
        high = history.curve("rollout/logprob_gap_max")
    limit = _limit(history)
    near = len(high) >= SHORTEST_WINDOW and high.late >= GAP_OF_LIMIT * limit
    grows = len(mean) > 0 and mean.late > GAP_FLOOR * limit and mean.rose(at_least=(GAP_GROWTH - 1) * mean.early)
    if not (near or grows):
        return []
    growth = f"; its mean grew from {mean.early:.2g} to {mean.late:.2g}" if grows else ""
    changes: tuple[Change, ...] = (
        () if history.setting("generators.enforce_eager") else (Change("generators.enforce_eager", True),)
    )
    if history.setting("policy.dtype") == "bfloat16":
        changes += (Change("policy.dtype", "float32"),)
    found = high if near else mean
    return [
        Finding(
            rule="logprob_gap",
            severity="critical" if near else "warning",
            title="Generator and trainer log-probabilities disagree",
            explanation=f"At the same weights their log-probabilities of a token differ by up to {found.late:.2g} "
            f"(the run stops at {limit:.2g}){growth}. The update is then not for the tokens that were generated.",
            remedy=Remedy(
                "Compute in float32 where memory allows, and run the generators without CUDA graphs to find the cause. "
                "Importance correction (`train.importance_correction`) bounds the error. Report it with the model's "
                "name.",
                changes,
            ),
            curves=(found.curve("difference of log-probabilities"),),
        )
    ]


def _limit(history: RunHistory) -> float:
    """The gap that stops the run."""
    sync = SyncConfig.model_validate(history.setting("sync") or {})
    return sync.allowed_gap(history.setting("policy.dtype") or "bfloat16").quantile
