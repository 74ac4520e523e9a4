"""Normalization, clipping and the weighted sum, against numpy in float64 and hand calculations."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.rewards import RunningNormalizer, clipped, overlong_penalty, weighted_sum

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60)


@given(SCORES, st.integers(1, 59))
def test_running_statistics_are_those_of_all_scores(scores: list[float], cut: int) -> None:
    seen = RunningNormalizer().updated(scores[:cut]).updated(scores[cut:])
    assert seen.count == len(scores)
    assert seen.mean == pytest.approx(np.mean(scores), rel=1e-9, abs=1e-9)
    assert seen.m2 == pytest.approx(np.var(scores) * len(scores), rel=1e-6, abs=1e-3)


def test_standard_deviation_is_unbiased() -> None:
    scores = [0.5, -1.25, 3.0, 8.0]
    assert RunningNormalizer().updated(scores).std == pytest.approx(np.std(scores, ddof=1), rel=1e-14)


@given(SCORES, st.randoms())
def test_order_within_a_call_changes_nothing(scores: list[float], rng: random.Random) -> None:
    shuffled = scores[:]
    rng.shuffle(shuffled)
    start = RunningNormalizer().updated([1.0, 5.0])
    assert start.updated(shuffled) == start.updated(scores)  # to the last bit


def test_failed_scores_enter_nothing() -> None:
    assert RunningNormalizer().updated([1.0, None, 3.0]) == RunningNormalizer().updated([1.0, 3.0])
    assert RunningNormalizer().updated([None]) == RunningNormalizer()


def test_nothing_is_blown_up() -> None:
    assert RunningNormalizer().normalized(7.0) == 7.0
    assert RunningNormalizer().updated([5.0]).normalized(7.0) == 2.0
    assert RunningNormalizer().updated([5.0, 5.0, 5.0]).normalized(7.0) == 2.0


def test_state_survives_json_to_the_last_bit() -> None:
    seen = RunningNormalizer().updated([0.1, 0.2, 1 / 3])
    assert RunningNormalizer.from_state(json.loads(json.dumps(seen.state()))) == seen


@pytest.mark.parametrize("state", [{}, {"count": 1, "mean": 0.0}, {"count": 2, "mean": 0.0, "m2": -1.0}])
def test_strange_state_is_refused(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not the statistics"):
        RunningNormalizer.from_state(state)


@pytest.mark.parametrize(("score", "expected"), [(-3.0, -1.0), (0.5, 0.5), (9.0, 2.0)])
def test_clip(score: float, expected: float) -> None:
    assert clipped(score, (-1.0, 2.0)) == expected


def test_weighted_sum_by_hand() -> None:
    # 2·1 − 0.5·4 = 0; 2·3 − 0.5·2 = 5
    assert weighted_sum([[1.0, 3.0], [4.0, 2.0]], [2.0, -0.5]) == (0.0, 5.0)


def test_a_failure_counts_only_with_a_weight() -> None:
    assert weighted_sum([[1.0, None], [None, 1.0]], [1.0, 0.0]) == (1.0, None)


def test_only_watched() -> None:
    assert weighted_sum([[1.0, None]], [0.0]) == (0.0, 0.0)


@pytest.mark.parametrize(("scores", "weights"), [([[1.0]], [1.0, 2.0]), ([[1.0], [1.0, 2.0]], [1.0, 1.0])])
def test_numbers_must_agree(scores: list[list[float]], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights|different numbers"):
        weighted_sum(scores, weights)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (12, 0.0), (13, -0.75), (15, -2.25), (16, -3.0), (17, -3.0), (10**9, -3.0)]
)
def test_overlong_penalty_by_hand(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_tokens=16, buffer_tokens=4, penalty=3.0) == expected


@pytest.mark.parametrize(
    ("length", "max_tokens", "buffer_tokens", "penalty"),
    [(1, 8, 0, 1.0), (1, 8, 9, 1.0), (1, 8, 2, -1.0), (1, 8, 2, float("nan")), (-1, 8, 2, 1.0)],
)
def test_overlong_penalty_refuses(length: int, max_tokens: int, buffer_tokens: int, penalty: float) -> None:
    with pytest.raises(ValueError, match=r"must be (in|0)"):
        overlong_penalty(length, max_tokens=max_tokens, buffer_tokens=buffer_tokens, penalty=penalty)
