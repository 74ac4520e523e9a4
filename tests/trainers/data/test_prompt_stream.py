"""The stream's order: every prompt once an epoch, the same after every resume, shares by weight."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trainers.data.reader import PromptSet, open_prompts
from trainers.data.shuffle import Permutation
from trainers.data.stream import PromptStream
from trainers.errors import UserError
from trainers.types import Prompt


def prompts_of(folder: Path, **files: int) -> PromptSet:
    """One file for each name, of that many prompts "<name><number>"."""
    paths = []
    for name, n in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(n)))
        paths.append(str(path))
    return open_prompts(paths)


def texts(taken: list[tuple[str, Prompt]]) -> list[str]:
    return [prompt.messages[0]["content"] for _, prompt in taken]


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    stream = PromptStream(prompts_of(tmp_path, a=30, b=20), seed=1)
    epochs = [texts(stream.take(50)) for _ in range(3)]
    everything = {f"a{i}" for i in range(30)} | {f"b{i}" for i in range(20)}
    assert all(set(e) == everything for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert stream.epoch == 3.0
    other = texts(PromptStream(prompts_of(tmp_path, a=30, b=20), seed=2).take(50))
    assert other != epochs[0]


def test_ids_are_unique_and_say_epoch_and_position(tmp_path: Path) -> None:
    stream = PromptStream(prompts_of(tmp_path, a=3), seed=0)
    assert [i for i, _ in stream.take(7)] == [
        "e0-000000",
        "e0-000001",
        "e0-000002",
        "e1-000000",
        "e1-000001",
        "e1-000002",
        "e2-000000",
    ]


def test_without_shuffling_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    stream = PromptStream(prompts_of(tmp_path, b=2, a=2), seed=0, shuffle=False)
    assert texts(stream.take(6)) == ["b0", "b1", "a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
@pytest.mark.parametrize("done", [0, 1, 6, 7, 40])
def test_a_resume_goes_on_exactly(tmp_path: Path, weights: list[float] | None, done: int) -> None:
    whole = PromptStream(prompts_of(tmp_path, a=7, b=4), seed=3, weights=weights)
    expected = whole.take(60)
    first = PromptStream(prompts_of(tmp_path, a=7, b=4), seed=3, weights=weights)
    assert first.take(done) == expected[:done]
    state = json.loads(json.dumps(first.state()))
    again = PromptStream(prompts_of(tmp_path, a=7, b=4), seed=3, weights=weights)
    again.take(5)  # what it did before does not matter
    again.restore(state)
    assert again.take(60 - done) == expected[done:]
    assert first.state() == state  # a state is a copy


def test_changed_data_and_settings_are_refused(tmp_path: Path) -> None:
    state = PromptStream(prompts_of(tmp_path, a=5), seed=3).state()
    with pytest.raises(UserError, match="changed since the checkpoint"):
        PromptStream(prompts_of(tmp_path, a=6), seed=3).restore(state)
    with pytest.raises(UserError, match="seed 4"):
        PromptStream(prompts_of(tmp_path, a=5), seed=4).restore(state)
    with pytest.raises(UserError, match="shuffle"):
        PromptStream(prompts_of(tmp_path, a=5), seed=3, shuffle=False).restore(state)
    with pytest.raises(UserError, match=r"data\.weights"):
        PromptStream(prompts_of(tmp_path, a=5), seed=3, weights=[2.0]).restore(state)


def test_weights_hold_after_any_number_of_prompts(tmp_path: Path) -> None:
    weights = [5.0, 2.0, 1.0]
    stream = PromptStream(prompts_of(tmp_path, a=4, b=100, c=3), seed=0, weights=weights)
    counts: Counter[str] = Counter()
    ids = set()
    for n in range(1, 201):
        ((name, prompt),) = stream.take(1)
        ids.add(name)
        counts[prompt.messages[0]["content"][0]] += 1
        for pool, weight in zip("abc", weights, strict=True):
            assert abs(counts[pool] - n * weight / 8) <= 1
    assert counts == {"a": 125, "b": 50, "c": 25}
    assert len(ids) == 200


def test_weights_must_fit_the_entries(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 weights for 1 entries"):
        PromptStream(prompts_of(tmp_path, a=5), seed=0, weights=[1.0, 2.0])


@pytest.mark.parametrize("n", [0, 1, 2, 3, 63, 64, 65, 1000, 4097])
def test_a_permutation_is_one(n: int) -> None:
    order = Permutation(n, key="x")
    assert sorted(order[i] for i in range(n)) == list(range(n))
    with pytest.raises(IndexError):
        order[n]


def test_small_orders_are_drawn_evenly() -> None:
    """Chi-squared over all 24 orders of four things; its 99.9 % point at 23 degrees of freedom is 49.7."""
    draws = 2400
    seen = Counter(tuple(p[i] for i in range(4)) for p in (Permutation(4, key=f"key {k}") for k in range(draws)))
    expected = draws / math.factorial(4)
    assert set(seen) == set(itertools.permutations(range(4)))
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 49.7


def test_neighbours_are_scattered() -> None:
    """Places of consecutive numbers correlate no more than 4 standard errors (1/√n) with each other."""
    n = 10_000
    order = Permutation(n, key="seed 0, pool 0, epoch 0")
    x = [order[i] / n - 0.5 for i in range(n)]
    lag = sum(a * b for a, b in itertools.pairwise(x)) / sum(a * a for a in x)
    rank = 12 * sum(a * (i / n - 0.5) for i, a in enumerate(x)) / n
    assert abs(lag) < 4 / math.sqrt(n)
    assert abs(rank) < 4 / math.sqrt(n)


def test_the_order_is_the_documented_one() -> None:
    """A second implementation, in numpy's wrapping 64-bit arithmetic, of the network that checkpoints rely on."""
    n, key, bits = 50_000, "seed 0, pool 0, epoch 0", 8
    keys = np.frombuffer(hashlib.shake_256(key.encode()).digest(48), dtype="<u8")

    def encipher(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(bits), x & np.uint64(2**bits - 1)
        for k in keys:
            z = (right ^ k) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & np.uint64(2**bits - 1))
        return left << np.uint64(bits) | right

    expected = encipher(np.arange(n, dtype=np.uint64))
    while (outside := expected >= n).any():
        expected[outside] = encipher(expected[outside])
    order = Permutation(n, key=key)
    assert [order[i] for i in range(0, n, 97)] == expected[::97].tolist()
