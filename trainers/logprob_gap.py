"""How far generator and trainer may disagree about the same tokens at the same weights. Pure; knows no engine.

Rounding has a tail: of 10⁵ tokens some differ by ten times the mean, on any model and for no fault. So the largest
difference decides nothing; the mean and a high quantile do. `docs/semantics.md` derives the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.types import Float32Array

ONE_IN = 1000  # the quantile is the difference that one token in so many may exceed: 99.9 %
# Mean over quantile, of rounding: 0.045 / 0.298 was measured. So that one number sets both limits.
MEAN_OF_QUANTILE = 0.15
# Of the quantile, in nats. float32: two hundred times what was seen. bfloat16: three times what was seen at 30 layers.
_DEFAULTS = {"float32": 1e-3, "bfloat16": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class GapLimits:
    """The largest allowed differences of log-probabilities, in nats."""

    mean: float  # over all tokens
    quantile: float  # that one token in `ONE_IN` may exceed

    def allow(self, *, mean: float, quantile: float) -> bool:
        """Whether both are within the limits; NaN is not.

        >>> GapLimits(mean=0.1, quantile=1.0).allow(mean=0.05, quantile=float("nan"))
        False
        """
        return mean <= self.mean and quantile <= self.quantile


def gap_limits(dtype: str, *, quantile: float | None = None, mean: float | None = None) -> GapLimits:
    """The limits for a policy of that type; what is given replaces a default.

    >>> gap_limits("bfloat16")
    GapLimits(mean=0.15, quantile=1.0)
    """
    high = _DEFAULTS[dtype] if quantile is None else quantile
    return GapLimits(mean=MEAN_OF_QUANTILE * high if mean is None else mean, quantile=high)


def gap_quantile(gaps: Sequence[Float32Array]) -> float:
    """The smallest of all values that at most one token in `ONE_IN` exceeds; 0 without tokens. NaN counts as largest.

    Of fewer than `ONE_IN` tokens it is the largest.

    >>> import numpy as np
    >>> gap_quantile([np.arange(1500, dtype=np.float32), np.arange(1500, 2000, dtype=np.float32)])
    1997.0
    """
    import numpy as np  # not before a config is checked: a mistake in it is refused at once

    values = np.concatenate([np.zeros(0, dtype=np.float32), *gaps])
    if not len(values):
        return 0.0
    place = len(values) - 1 - len(values) // ONE_IN
    return float(np.partition(values, place)[place])  # which places NaN last
