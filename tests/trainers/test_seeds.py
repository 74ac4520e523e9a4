"""Seeds by purpose, against another implementation of BLAKE2b (coreutils: `b2sum -l 64`)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainers.seeds import derive_seed

Part = st.text(st.characters(exclude_characters="\x1f", exclude_categories=("Cs",)), max_size=12) | st.integers()


def test_known_answers() -> None:
    # printf '0\x1fsample\x1fe0-000001\x1f0' | b2sum -l 64, shifted right by two bits
    assert derive_seed(0, "sample", "e0-000001", 0) == 0x05851D18F9ED4FD4 >> 2
    assert derive_seed(7, "updates", 12) == 0x617F352C85D06992 >> 2
    assert derive_seed(0) == 0x842B7D9D43CDDF75 >> 2


@given(seed=st.integers(0, 2**32 - 1), purpose=st.lists(Part, max_size=4))
def test_a_seed_fits_every_generator(seed: int, purpose: list[str | int]) -> None:
    assert 0 <= derive_seed(seed, *purpose) < 2**62


@given(first=st.lists(Part, max_size=3), second=st.lists(Part, max_size=3))
def test_purposes_that_read_differently_have_different_seeds(first: list[str | int], second: list[str | int]) -> None:
    same = [*map(str, first)] == [*map(str, second)]
    assert (derive_seed(1, *first) == derive_seed(1, *second)) == same


def test_every_draw_of_a_large_run_has_its_own() -> None:
    seeds = {derive_seed(run, "sample", f"e0-{p:06d}", i) for run in (0, 1) for p in range(2000) for i in range(8)}
    assert len(seeds) == 2 * 2000 * 8
