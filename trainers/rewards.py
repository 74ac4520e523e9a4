"""From raw scores to the reward that is trained on: running normalization, clipping, the weighted sum, and the penalty
of an overlong completion.

Pure; a failed score is None everywhere and never a number. It knows the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Score: TypeAlias = float | None


@dataclass(frozen=True, slots=True)
class RunningNormalizer:
    """Mean and standard deviation of all scores seen so far; immutable.

    The parts of a sample may come in any order: `updated` gives the same statistics, to the last bit, for any order of
    the same scores (Chan, Golub and LeVeque 1983 for merging, exact sums within a call).

    >>> seen = RunningNormalizer().updated([1.0, 2.0, 3.0])
    >>> seen.mean, seen.std, seen.normalized(4.0)
    (2.0, 1.0, 2.0)
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 if it is 0 or not defined, so that the division stays harmless."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 and self.m2 > 0 else 1.0

    def normalized(self, score: float) -> float:
        """(score − mean) / std; the score itself before the first update."""
        return (score - self.mean) / self.std

    def updated(self, scores: Iterable[Score]) -> RunningNormalizer:
        """The statistics after these scores too; None is skipped."""
        new = sorted(score for score in scores if score is not None)
        if not new:
            return self
        mean = math.fsum(new) / len(new)
        m2 = math.fsum((score - mean) ** 2 for score in new)
        count = self.count + len(new)
        delta = mean - self.mean
        return RunningNormalizer(
            count=count,
            mean=self.mean + delta * len(new) / count,
            m2=self.m2 + m2 + delta * delta * self.count * len(new) / count,
        )

    def state(self) -> dict[str, float]:
        """For a checkpoint; plain JSON."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> RunningNormalizer:
        """The inverse of `state`. Raises ValueError on anything else."""
        match state:
            case {"count": count, "mean": mean, "m2": m2, **rest} if count >= 0 and m2 >= 0 and not rest:
                return cls(count=int(count), mean=float(mean), m2=float(m2))
        raise ValueError(f"not the statistics of a reward normalizer: {dict(state)}")


def clipped(score: float, clip: tuple[float, float] | None) -> float:
    """The score, clipped to the limits if there are any.

    >>> clipped(7.0, (-5.0, 5.0)), clipped(7.0, None)
    (5.0, 7.0)
    """
    return score if clip is None else min(max(score, clip[0]), clip[1])


def overlong_penalty(length: int, *, max_tokens: int, buffer_tokens: int, penalty: float = 1.0) -> float:
    """What is added to the reward of a completion of `length` tokens: 0, or less (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_tokens − buffer_tokens, then falling linearly to −penalty at max_tokens and constant beyond.

    >>> [overlong_penalty(n, max_tokens=100, buffer_tokens=20, penalty=2.0) for n in (80, 85, 100, 300)]
    [0.0, -0.5, -2.0, -2.0]

    Raises:
        ValueError: not 1 ≤ buffer_tokens ≤ max_tokens, or a penalty or length below 0.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}; must be in 1 … max_tokens = {max_tokens}")
    if not penalty >= 0 or length < 0:
        raise ValueError(f"penalty {penalty} and length {length}; both must be 0 or more")
    over = length - (max_tokens - buffer_tokens)
    return -penalty * min(over, buffer_tokens) / buffer_tokens if over > 0 else 0.0


def weighted_sum(scores: Sequence[Sequence[Score]], weights: Sequence[float]) -> tuple[Score, ...]:
    """`scores[source][completion]` → for each completion Σ weight · score over the sources with a weight.

    None if any source with a weight has none. A source of weight 0 is only monitored: neither its scores nor its
    failures count.

    >>> weighted_sum([[1.0, 2.0, None], [10.0, None, 30.0], [None, None, None]], [2.0, 0.5, 0.0])
    (7.0, None, None)

    Raises:
        ValueError: sources and weights, or the sources' scores, differ in number.
    """
    if len(scores) != len(weights):
        raise ValueError(f"{len(scores)} rows of scores, but {len(weights)} weights")
    if len({len(row) for row in scores}) > 1:
        raise ValueError(f"the sources have different numbers of scores: {[len(row) for row in scores]}")
    counted = [(weight, row) for weight, row in zip(weights, scores, strict=True) if weight != 0]
    n = len(scores[0]) if scores else 0
    return tuple(_sum([(weight, row[i]) for weight, row in counted]) for i in range(n))


def _sum(terms: Sequence[tuple[float, Score]]) -> Score:
    products: list[float] = []
    for weight, score in terms:
        if score is None:
            return None
        products.append(weight * score)
    return math.fsum(products)
