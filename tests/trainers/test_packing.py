"""Packing: every sample once, within the budget, the same work for every rank, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.packing import MicroBatch, OptimizerStep, pack_samples, pack_updates, split_by_budget, unpack_rows
from trainers.types import AnnotatedSample, Float32Array, Sample, TopLogprobs, TrainSample

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
Shards = st.integers(1, 5)
Budget = st.integers(1, 120)


def make_sample(i: int, length: int, *, chosen: int | None = None) -> Sample:
    """Sample i: token t is 100·i + t; the last `chosen` tokens are the policy's (default: half of them)."""
    positions = np.arange(length)
    mask = positions >= length - (length // 2 if chosen is None else chosen)
    return Sample(
        id=f"s{i}",
        group=i,
        tokens=(100 * i + positions).astype(np.int32),
        mask=mask,
        rollout_logprobs=np.where(mask, -0.01 * (100 * i + positions), 0).astype(np.float32),
        reward=float(i),
        valid=True,
        policy_version=0,
    )


def make_samples(lengths: Sequence[int]) -> list[Sample]:
    return [make_sample(i, length) for i, length in enumerate(lengths)]


def to_train(samples: Sequence[Sample], *, old: bool = True, ref: bool = True) -> list[TrainSample]:
    return [
        TrainSample(
            annotated=AnnotatedSample(
                sample=s,
                old_logprobs=(s.rollout_logprobs - 1).astype(np.float32) if old else None,
                ref_logprobs=(s.rollout_logprobs - 2).astype(np.float32) if ref else None,
            ),
            advantages=np.where(s.mask, np.float32(s.reward), np.float32(0)),
        )
        for s in samples
    ]


def rows(batch: MicroBatch) -> list[int]:
    """The samples in a micro-batch, without the row that only keeps ranks in step."""
    return [int(i) for i in batch.order if i >= 0]


# --- who computes what ------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), max_size=30), shards=Shards, budget=Budget)
def test_every_sequence_once_within_the_budget_and_in_step(lengths: list[int], shards: int, budget: int) -> None:
    split = split_by_budget(lengths, shards=shards, max_tokens=budget)
    assert len(split) == shards
    assert sorted(chain.from_iterable(chain.from_iterable(split))) == list(range(len(lengths)))
    assert len({len(shard) for shard in split}) == 1
    for cut in chain.from_iterable(split):
        assert len(cut) <= 1 or len(cut) * max(lengths[i] for i in cut) <= budget
    if len(lengths) >= shards:
        assert all(any(cut for cut in shard) for shard in split)  # nobody idles while another has two sequences
    for shard in split:
        assert [] not in shard[:-1]


@given(lengths=Lengths, budget=st.integers(40, 400))
def test_one_rank_gets_no_more_micro_batches_than_first_fit_needs(lengths: list[int], budget: int) -> None:
    """Longest first, each next sequence into the open micro-batch while it fits: the greedy count, done by hand."""
    count, rows_in_it, longest = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if rows_in_it and longest * (rows_in_it + 1) <= budget:
            rows_in_it += 1
        else:
            count, rows_in_it, longest = count + 1, 1, length
    assert len(split_by_budget(lengths, shards=1, max_tokens=budget)[0]) == count


def test_the_load_is_balanced() -> None:
    split = split_by_budget([8, 7, 6, 5, 4, 3, 2, 1], shards=2, max_tokens=8)
    #  8 | 7 | 6 | 5 | 4 3 | 2 1: the largest of each round to whoever has least
    assert split == [[[0], [3], [4, 5]], [[1], [2], [6, 7]]]


def test_a_sequence_over_the_budget_is_alone() -> None:
    assert split_by_budget([3, 50, 3], shards=1, max_tokens=8) == [[[1], [0, 2]]]


# --- micro-batches ----------------------------------------------------------------------------------------------------


@given(lengths=Lengths, shards=Shards, budget=Budget)
def test_rows_are_the_samples_right_padded(lengths: list[int], shards: int, budget: int) -> None:
    samples = make_samples(lengths)
    for batch in chain.from_iterable(pack_samples(samples, shards=shards, max_tokens=budget)):
        for b in range(len(batch.order)):
            if batch.order[b] < 0:
                continue
            sample, length = samples[batch.order[b]], batch.lengths[b]
            assert length == len(sample.tokens)
            for packed, plain in (
                (batch.tokens, sample.tokens),
                (batch.mask, sample.mask),
                (batch.rollout_logprobs, sample.rollout_logprobs),
            ):
                np.testing.assert_array_equal(packed[b, :length], plain)
                assert packed.dtype == plain.dtype
                assert not packed[b, length:].any()
        if rows(batch):
            assert batch.tokens.shape == (len(batch.order), max(batch.lengths))  # no padding beyond the longest
        assert batch.old_logprobs is batch.ref_logprobs is batch.advantages is None


@given(lengths=Lengths, shards=Shards, budget=Budget)
def test_unpacking_is_the_inverse(lengths: list[int], shards: int, budget: int) -> None:
    samples = make_samples(lengths)
    into: list[Float32Array | None] = [None] * len(samples)
    for batches in pack_samples(samples, shards=shards, max_tokens=budget):
        results = [batch.tokens.astype(np.float32) + 0.5 for batch in batches]
        unpack_rows(batches, results, into)
    for sample, found in zip(samples, into, strict=True):
        assert found is not None
        np.testing.assert_array_equal(found, sample.tokens + np.float32(0.5))


def test_a_row_that_only_keeps_ranks_in_step() -> None:
    samples = to_train(make_samples([5]))
    (first,), (second,) = pack_updates(samples, updates=1, epochs=1, shards=2, max_tokens=8, seed=(0,))
    assert [rows(batch) for batch in first.micro_batches] == [[0]]
    (empty,) = second.micro_batches
    assert empty.order.tolist() == [-1]
    assert empty.tokens.shape == (1, 2)  # a next token to predict, so that a forward pass is possible
    assert empty.lengths.tolist() == [1]
    assert not empty.mask.any()
    for array in (empty.old_logprobs, empty.ref_logprobs, empty.advantages, empty.rollout_logprobs):
        assert array is not None
        assert array.shape == (1, 2)
        assert not array.any()


# --- optimizer steps --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=3, max_size=20),
    updates=st.integers(1, 3),
    epochs=st.integers(1, 3),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_each_epoch_partitions_the_samples_into_updates(
    lengths: list[int], updates: int, epochs: int, shards: int, seed: int
) -> None:
    samples = make_samples(lengths)
    packed = pack_updates(to_train(samples), updates=updates, epochs=epochs, shards=shards, max_tokens=40, seed=(seed,))
    assert len(packed) == shards
    assert {len(shard) for shard in packed} == {updates * epochs}
    for epoch in range(epochs):
        parts = []
        for k in range(epoch * updates, (epoch + 1) * updates):
            steps = [shard[k] for shard in packed]
            part = [i for step in steps for batch in step.micro_batches for i in rows(batch)]
            assert len({len(step.micro_batches) for step in steps}) == 1
            for step in steps:  # every rank knows the totals of the whole step
                assert step.total_tokens == sum(int(samples[i].mask.sum()) for i in part)
                assert step.total_sequences == sum(bool(samples[i].mask.any()) for i in part)
            parts.append(part)
        assert sorted(chain.from_iterable(parts)) == list(range(len(lengths)))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def content(packed: list[list[OptimizerStep]]) -> list[list[int]]:
    return [[i for batch in step.micro_batches for i in rows(batch)] for shard in packed for step in shard]


def test_the_seed_decides_the_partition() -> None:
    samples = to_train(make_samples([4] * 32))

    def packed(*seed: int) -> list[list[int]]:
        return content(pack_updates(samples, updates=4, epochs=2, shards=1, max_tokens=64, seed=seed))

    assert packed(1) == packed(1)
    assert packed(1) != packed(2)
    first, second = packed(1)[:4], packed(1)[4:]
    assert first != second  # each epoch in an order of its own


def test_one_update_keeps_the_order() -> None:
    samples = to_train(make_samples([4] * 6))
    assert (
        content(pack_updates(samples, updates=1, epochs=2, shards=1, max_tokens=64, seed=(0,)))
        == [[0, 1, 2, 3, 4, 5]] * 2
    )


def test_order_names_the_sample_also_in_a_shuffled_update() -> None:
    samples = to_train(make_samples([3, 5, 4, 6, 2, 7]))
    seen = []
    for step in pack_updates(samples, updates=3, epochs=1, shards=1, max_tokens=64, seed=(5,))[0]:
        for batch in step.micro_batches:
            for b, i in enumerate(batch.order):
                seen.append(int(i))
                np.testing.assert_array_equal(batch.tokens[b, : batch.lengths[b]], samples[i].sample.tokens)
                assert batch.old_logprobs is not None
                assert batch.ref_logprobs is not None
                assert batch.advantages is not None
                plain = samples[i].annotated
                np.testing.assert_array_equal(batch.old_logprobs[b, : batch.lengths[b]], plain.old_logprobs)
                np.testing.assert_array_equal(batch.ref_logprobs[b, : batch.lengths[b]], plain.ref_logprobs)
                np.testing.assert_array_equal(batch.advantages[b, : batch.lengths[b]], samples[i].advantages)
    assert sorted(seen) == list(range(6))


def test_quantities_that_a_run_does_not_need_are_absent() -> None:
    packed = pack_updates(
        to_train(make_samples([3, 4]), old=False, ref=False), updates=1, epochs=1, shards=3, max_tokens=8, seed=(0,)
    )
    for batch in chain.from_iterable(step.micro_batches for shard in packed for step in shard):
        assert batch.old_logprobs is batch.ref_logprobs is None
        assert batch.advantages is not None


def test_what_the_teacher_said_stays_with_the_chosen_tokens() -> None:
    """Row by row in the order of the mask's True places; nothing for a row that only keeps ranks in step."""
    samples = []
    for number, train in enumerate(to_train(make_samples([6, 3, 5]))):
        n = int(train.sample.mask.sum())
        ids = (100 * number + np.arange(2 * n)).astype(np.int32).reshape(n, 2)
        taught = TopLogprobs(ids, -ids.astype(np.float32))
        samples.append(replace(train, annotated=replace(train.annotated, teacher_top_logprobs=taught)))
    packed = pack_updates(samples, updates=1, epochs=1, shards=4, max_tokens=8, seed=(0,))
    seen = 0
    for steps in packed:
        for batch in steps[0].micro_batches:
            assert batch.teacher_top_logprobs is not None
            own = [samples[i].annotated.teacher_top_logprobs for i in batch.order if i >= 0]
            expected = [row for taught in own if taught is not None for row in taught.ids.tolist()]
            assert batch.teacher_top_logprobs.ids.tolist() == expected
            np.testing.assert_array_equal(batch.teacher_top_logprobs.logprobs, -batch.teacher_top_logprobs.ids)
            assert batch.teacher_top_logprobs.ids.shape == (int(batch.mask.sum()), 2)
            seen += len(expected)
    assert seen == sum(int(s.sample.mask.sum()) for s in samples)
    mixed = [samples[0], replace(samples[1], annotated=replace(samples[1].annotated, teacher_top_logprobs=None))]
    with pytest.raises(ValueError, match="that others lack"):
        pack_updates(mixed, updates=1, epochs=1, shards=1, max_tokens=100, seed=(0,))


def test_a_sample_without_a_chosen_token_counts_as_no_sequence() -> None:
    samples = to_train([make_sample(0, 4, chosen=0), make_sample(1, 4, chosen=3)])
    ((step,),) = pack_updates(samples, updates=1, epochs=1, shards=1, max_tokens=64, seed=(0,))
    assert (step.total_tokens, step.total_sequences) == (3, 1)


def test_what_cannot_be_packed_is_refused() -> None:
    samples = to_train(make_samples([3, 4]))
    with pytest.raises(ValueError, match="2 samples cannot be cut into 3 updates"):
        pack_updates(samples, updates=3, epochs=1, shards=1, max_tokens=8, seed=(0,))
    mixed = [*to_train(make_samples([3])), *to_train(make_samples([3]), old=False)]
    with pytest.raises(ValueError, match="some samples have a quantity that others lack"):
        pack_updates(mixed, updates=1, epochs=1, shards=1, max_tokens=8, seed=(0,))
