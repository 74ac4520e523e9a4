"""What the Doctor looks at in the samples of a step: how alike, how repetitive, what failed. Pure; standard library."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LOOP_BYTES = 200  # shorter texts cannot be judged: deflate's own overhead counts too much
LOOP_RATIO = (
    0.2  # prose deflates to 0.4–0.6 of its size, tables and code to 0.25–0.4; a text that repeats itself to less
)
EXAMPLES = 3  # sample ids that are kept of each kind


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """The samples of one step in a few numbers, with ids of those that show them."""

    step: int
    samples: int
    distinct_share: float | None  # mean over groups of different completions / completions; None: no group of two
    looping_share: float  # of the completions that repeat themselves
    looping: tuple[str, ...] = ()  # sample ids
    alike: tuple[str, ...] = ()  # samples of the group with the fewest different completions
    truncated: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()  # samples without a score
    failed_by: tuple[str, ...] = ()  # names of the rewards that could not score some sample


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What is looked at of one sample; the names are columns of `rollouts/step-….parquet`."""

    sample_id: str
    group: int
    completion: str
    finish_reason: str = "stop"
    valid: bool = True
    rewards: Mapping[str, float | None] = field(default_factory=dict)


def summarize(step: int, rows: Iterable[SampleRow]) -> SampleSummary:
    """Of the samples of one step.

    >>> summarize(1, [SampleRow("a", group=0, completion="4"), SampleRow("b", group=0, completion="4")]).distinct_share
    0.5
    """
    groups: dict[int, list[SampleRow]] = {}
    looping, truncated, failed, count = [], [], [], 0
    failed_by: dict[str, None] = {}
    for row in rows:
        count += 1
        groups.setdefault(row.group, []).append(row)
        if loops(row.completion):
            looping.append(row.sample_id)
        if row.finish_reason == "length":
            truncated.append(row.sample_id)
        if not row.valid:
            failed.append(row.sample_id)
        failed_by |= dict.fromkeys(name for name, score in row.rewards.items() if score is None)
    shares = {key: _distinct(members) for key, members in groups.items() if len(members) > 1}
    alike = min(shares, key=lambda key: shares[key], default=None)
    return SampleSummary(
        step=step,
        samples=count,
        distinct_share=sum(shares.values()) / len(shares) if shares else None,
        looping_share=len(looping) / count if count else 0.0,
        looping=tuple(looping[:EXAMPLES]),
        alike=() if alike is None else tuple(row.sample_id for row in groups[alike][:EXAMPLES]),
        truncated=tuple(truncated[:EXAMPLES]),
        failed=tuple(failed[:EXAMPLES]),
        failed_by=tuple(failed_by),
    )


def loops(text: str) -> bool:
    """Whether a completion repeats itself: long enough, and deflate leaves less than `LOOP_RATIO` of it.

    >>> loops("I am sorry. " * 100), loops("I am sorry.")
    (True, False)
    """
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) >= LOOP_BYTES and len(zlib.compress(raw)) < LOOP_RATIO * len(raw)


def _distinct(rows: Sequence[SampleRow]) -> float:
    return len({row.completion.strip() for row in rows}) / len(rows)
