"""What is left of a long run's curves: what a person looks for."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.service.results.downsample import telling_rows

KEYS = [f"key/{i}" for i in range(40)]


def long_run(steps: int, *, every: int = 100) -> list[dict[str, float]]:
    """Noise in many keys, and evaluations in few steps."""
    draw = random.Random(0)
    rows = [{key: draw.gauss(0, 1) for key in KEYS} | {"step": step} for step in range(steps)]
    for step in range(0, steps, every):
        rows[step]["eval/reward_mean"] = step
    return rows


def test_every_evaluation_of_a_long_run_is_shown() -> None:
    rows = long_run(5_000)
    kept = telling_rows(rows, keys=[], points=1_500)
    assert set(range(0, 5_000, 100)) <= set(kept)
    assert len(kept) <= 1_500


def test_evaluations_leave_room_for_the_other_steps() -> None:
    kept = telling_rows(long_run(4_000, every=3), keys=[], points=900)
    evaluated = [step for step in kept if step % 3 == 0]
    assert len(kept) - len(evaluated) > 200
    assert max(later - earlier for earlier, later in pairwise(kept)) < 4_000 / 200


@pytest.mark.parametrize("place", [1, 1_234, 2_999])
def test_a_spike_of_one_step_is_shown(place: int) -> None:
    rows = long_run(3_000)
    rows[place]["key/7"] = 30.0
    assert place in telling_rows(rows, keys=[], points=300)


def test_two_spikes_of_one_key_are_shown_both() -> None:
    """The lower one is neither the key's highest nor its lowest value: it stands out from its stretch."""
    rows = long_run(3_000)
    rows[500]["key/7"], rows[2_000]["key/7"] = 30.0, 20.0
    assert {500, 2_000} <= set(telling_rows(rows, keys=[], points=300))


def test_the_curve_stays_whole_between_what_stands_out() -> None:
    kept = telling_rows([{"a": float(step == 10)} for step in range(10_000)], keys=["a"], points=1_000)
    assert max(later - earlier for earlier, later in pairwise(kept)) <= 2 * 10_000 / (1_000 / 2)


VALUES = st.none() | st.floats() | st.integers(-(10**400), 10**400) | st.booleans() | st.just("text")


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["a", "b", "eval/c"]), VALUES), max_size=40),
    points=st.integers(1, 45),
    keys=st.lists(st.sampled_from(["a", "eval/c", "absent"]), unique=True),
)
def test_any_rows_are_thinned_to_their_bound(rows: list[dict[str, float]], points: int, keys: list[str]) -> None:
    kept = telling_rows(rows, keys=keys, points=points)
    assert kept == sorted(set(kept))
    assert len(kept) == min(len(rows), points)
    assert not rows or len(rows) - 1 in kept
