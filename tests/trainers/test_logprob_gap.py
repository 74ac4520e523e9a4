"""The rule on the gap of log-probabilities: its limits, and the quantile of many arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainers.logprob_gap import GapLimits, gap_limits, gap_quantile


@pytest.mark.parametrize(("tokens", "above"), [(1, 0), (999, 0), (1000, 1), (1999, 1), (2600, 2), (100_000, 100)])
def test_at_most_one_token_in_a_thousand_is_above(tokens: int, above: int) -> None:
    """Whatever the order, and however the tokens are spread over ranks and micro-batches."""
    values = np.random.default_rng(tokens).permutation(tokens).astype(np.float32)
    found = gap_quantile(np.array_split(values, 7))
    assert found == tokens - 1 - above
    assert (values > found).sum() == above


def test_of_no_token_it_is_zero_and_nan_is_the_largest() -> None:
    assert gap_quantile([]) == 0.0
    assert gap_quantile([np.zeros(0, dtype=np.float32)]) == 0.0
    values = np.full(999, 0.1, dtype=np.float32)
    values[5] = np.nan
    assert math.isnan(gap_quantile([values]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.15, 1.0)),
        ({"quantile": 0.5}, (0.075, 0.5)),
        ({"mean": 0.2}, (0.2, 1.0)),
        ({"quantile": 2.0, "mean": 0.1}, (0.1, 2.0)),
    ],
)
def test_limits_of_bfloat16(given: dict[str, float], expected: tuple[float, float]) -> None:
    limits = gap_limits("bfloat16", **given)
    assert (limits.mean, limits.quantile) == pytest.approx(expected)


def test_limits_of_float32() -> None:
    assert gap_limits("float32") == GapLimits(mean=0.00015, quantile=0.001)


# mean and 99.9 % quantile (or, where it is all that was published, the mean) of runs that were right
@pytest.mark.parametrize(
    ("mean", "quantile"), [(0.048, 0.298), (0.037, 0.285), (0.045, 0.61), (0.011, 0.0), (0.064, 0.0)]
)
def test_what_was_measured_is_allowed_twice_over(mean: float, quantile: float) -> None:
    limits = gap_limits("bfloat16")
    assert limits.allow(mean=2 * mean, quantile=1.6 * quantile)


@pytest.mark.parametrize(
    ("mean", "quantile"), [(0.16, 0.3), (0.05, 1.01), (math.nan, 0.3), (0.05, math.nan), (0.05, math.inf)]
)
def test_either_alone_is_enough_to_refuse(mean: float, quantile: float) -> None:
    assert not gap_limits("bfloat16").allow(mean=mean, quantile=quantile)
