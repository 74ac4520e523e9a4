"""A metric's curve and the robust statistics that the rules share: medians over windows. Pure; standard library."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.doctor.finding import Curve

MIN_STEPS = 20  # a trend over fewer steps is noise: both windows would hold fewer than five steps
SHORTEST_WINDOW = 5  # the least number of steps whose median one outlier, or two, cannot move far
LONGEST_WINDOW = 50  # longer ones would answer late in long runs
SIGMAS = 4.0  # a shift must exceed so many standard errors: noise does so once in about 16,000 looks
HINT_SIGMAS = 1.5  # from here on a rise may be one: no finding claims that there is none
MOST_ALIKE = 0.95  # the largest correlation of neighbours that a window of at most 50 values can show
SHOWN_POINTS = 60  # points of a curve that go into a finding

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_MEDIAN_ERROR = 1.2533  # standard error of a median of n normal values: 1.2533 σ/√n


@dataclass(frozen=True, slots=True)
class Series:
    """The finite values of one metric, in the order of the steps."""

    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    broken: tuple[int, ...] = ()  # steps at which the value was not finite

    def __len__(self) -> int:
        return len(self.values)

    @property
    def window(self) -> int:
        """Steps in the early and the late window: a quarter of the run, within limits."""
        return max(SHORTEST_WINDOW, min(LONGEST_WINDOW, len(self) // 4))

    @property
    def early(self) -> float:
        """Median of the first window."""
        return statistics.median(self.values[: self.window])

    @property
    def late(self) -> float:
        """Median of the last window."""
        return statistics.median(self.values[-self.window :])

    @property
    def middle(self) -> float:
        """Median of the window in the middle of the run."""
        start = (len(self) - self.window) // 2
        return statistics.median(self.values[start : start + self.window])

    @property
    def long_enough(self) -> bool:
        """Whether there are enough steps for a trend."""
        return len(self) >= MIN_STEPS

    @property
    def shift(self) -> float:
        """`late` minus `early`."""
        return self.late - self.early

    def error(self) -> float:
        """Standard error of `shift`, from the spread within the windows about their own trend.

        Where neighbours are alike (the curve wanders), a window holds fewer independent values than steps.
        """
        return math.hypot(_median_error(self.values[: self.window]), _median_error(self.values[-self.window :]))

    def rose(self, *, at_least: float) -> bool:
        """Whether the late median is above the early one, beyond noise and by `at_least`."""
        return self.long_enough and self.shift >= at_least and self.shift > SIGMAS * self.error()

    @property
    def may_rise(self) -> bool:
        """Whether there is any sign of a rise; a weaker claim than `rose`."""
        return self.shift > HINT_SIGMAS * self.error()

    def fell(self, *, at_least: float) -> bool:
        """Whether the late median is below the early one, beyond noise and by `at_least`."""
        return self.long_enough and -self.shift >= at_least and -self.shift > SIGMAS * self.error()

    def last(self, count: int) -> tuple[float, ...]:
        """The last values, `count` at most."""
        return self.values[-count:]

    def curve(self, note: str = "") -> Curve:
        """The curve as evidence, thinned to `SHOWN_POINTS` (the last point stays)."""
        stride = max(1, -(-len(self) // SHOWN_POINTS))
        start = (len(self) - 1) % stride
        return Curve(self.key, self.steps[start::stride], self.values[start::stride], note)

    def at(self, steps: Iterable[int], note: str = "") -> Curve:
        """Some of its points as evidence."""
        wanted = set(steps)
        pairs = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if s in wanted]
        return Curve(self.key, tuple(s for s, _ in pairs), tuple(v for _, v in pairs), note)


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> Series:
    """The values of `key`; a null (not finite when it was written) is remembered as broken, an absent key is not."""
    steps, values, broken = [], [], []
    for row in metrics:
        if key not in row:
            continue
        value = row[key]
        if value is None or not math.isfinite(value):
            broken.append(int(row["step"]))
        else:
            steps.append(int(row["step"]))
            values.append(float(value))
    return Series(key, tuple(steps), tuple(values), tuple(broken))


def spread(values: Sequence[float]) -> float:
    """Standard deviation as the median absolute deviation gives it; 0 of fewer than two values.

    >>> spread([1.0, 1.0, 1.0, 100.0])
    0.0
    """
    if len(values) < 2:
        return 0.0
    centre = statistics.median(values)
    return _MAD_TO_SIGMA * statistics.median(abs(value - centre) for value in values)


def _median_error(window: Sequence[float]) -> float:
    """Standard error of a window's median; values follow a line and an AR(1) process about it."""
    half = len(window) // 2
    slope = (statistics.median(window[-half:]) - statistics.median(window[:half])) / (len(window) - half)
    rest = [value - slope * index for index, value in enumerate(window)]
    sigma = spread(rest)
    if sigma == 0:
        return 0.0
    differences = spread([b - a for a, b in itertools.pairwise(rest)])
    alike = min(MOST_ALIKE, max(0.0, 1 - (differences / sigma) ** 2 / 2))  # the AR(1) coefficient
    return _MEDIAN_ERROR * sigma * math.sqrt((1 + alike) / (1 - alike) / len(window))


def spikes(curve: Series, *, factor: float, above: float, reach: int = 10, recent: int = LONGEST_WINDOW) -> list[int]:
    """Steps among the `recent` last whose value exceeds `factor` × the median of its neighbours, and `above`.

    Neighbours are `reach` steps on either side without the step itself: a level that changes is not a spike. Steps with
    fewer than `reach` neighbours are not judged.

    >>> spikes(Series("kl/mean", tuple(range(12)), (1.0,) * 10 + (9.0, 1.0)), factor=4, above=0)
    [10]
    """
    found = []
    for index in range(max(0, len(curve) - recent), len(curve)):
        low = max(0, index - reach)
        around = curve.values[low:index] + curve.values[index + 1 : index + 1 + reach]
        if len(around) < reach:
            continue
        if curve.values[index] > max(above, factor * statistics.median(around)):
            found.append(curve.steps[index])
    return found
