"""From train samples to micro-batches: who computes what, within a token budget, the same gradient for every split.

Pure numpy. A step's samples are cut into optimizer steps (`updates_per_step` × `epochs_per_step`), each of those
over ranks, each rank's share over micro-batches. Padding lives only inside a micro-batch. Every rank gets the same
number of micro-batches (ZeRO-3 gathers in lockstep); an empty one has no sequences' tokens in its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from trainers.types import BoolArray, Float32Array, Int32Array, Sample, TopLogprobs, TrainSample

_Scalar = TypeVar("_Scalar", bound=np.generic)
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Right-padded sequences for one forward pass: B rows, T columns, aligned with `tokens`.

    `order[b]` is the row's position in the list that was packed, −1 for a row that only keeps ranks in step.
    """

    order: npt.NDArray[np.int64]  # [B]
    tokens: Int32Array  # [B, T], 0 where padded
    lengths: Int32Array  # [B]
    mask: BoolArray  # [B, T]
    rollout_logprobs: Float32Array  # [B, T]
    old_logprobs: Float32Array | None = None  # [B, T]
    ref_logprobs: Float32Array | None = None  # [B, T]
    old_values: Float32Array | None = None  # [B, T]
    advantages: Float32Array | None = None  # [B, T]
    returns: Float32Array | None = None  # [B, T]
    teacher_top_logprobs: TopLogprobs | None = None  # of the mask's n True places, row by row


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """One rank's share of one optimizer step, with the denominators of the whole step over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    total_tokens: int
    total_sequences: int


def split_by_budget(lengths: Sequence[int], *, shards: int, max_tokens: int) -> list[list[list[int]]]:
    """Indices of each micro-batch of each shard: `result[shard][micro_batch] → indices`.

    Sequences are sorted by length (so that padding is small), cut into micro-batches whose padded size
    (rows × longest) stays within `max_tokens` (a single longer sequence gets one of its own), and dealt out so that
    all shards have the same number, the tokens balanced. A shard may end with an empty micro-batch.

    >>> split_by_budget([4, 2, 3, 1], shards=1, max_tokens=8)
    [[[0, 2], [1, 3]]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cuts: list[list[int]] = []
    for i in order:
        if cuts and lengths[cuts[-1][0]] * (len(cuts[-1]) + 1) <= max_tokens:
            cuts[-1].append(i)
        else:
            cuts.append([i])
    _split_until_every_shard_has_work(cuts, shards=min(shards, len(lengths)))
    rounds = -(-len(cuts) // shards)
    result: list[list[list[int]]] = [[] for _ in range(shards)]
    load = [0] * shards
    for start in range(0, rounds * shards, shards):
        free = sorted(range(shards), key=lambda s: (load[s], s))
        for shard, cut in zip(free, cuts[start : start + shards] + [[]] * shards, strict=False):
            result[shard].append(cut)
            load[shard] += sum(lengths[i] for i in cut)
    return result


def _split_until_every_shard_has_work(cuts: list[list[int]], *, shards: int) -> None:
    while len(cuts) < shards:
        largest = max(range(len(cuts)), key=lambda c: len(cuts[c]))
        whole = cuts[largest]
        cuts[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]


def pack_samples(samples: Sequence[Sample], *, shards: int, max_tokens: int) -> list[tuple[MicroBatch, ...]]:
    """Micro-batches of each shard for a forward pass over samples that have no advantages yet."""
    split = split_by_budget([len(s.tokens) for s in samples], shards=shards, max_tokens=max_tokens)
    return [tuple(_sample_batch([samples[i] for i in cut], cut) for cut in shard) for shard in split]


def unpack_rows(batches: Sequence[MicroBatch], rows: Sequence[Float32Array], into: list[Float32Array | None]) -> None:
    """Write row b of each `[B, T]` result to its place in `into`, the padding cut off (inverse of packing)."""
    for batch, values in zip(batches, rows, strict=True):
        for b, index in enumerate(batch.order):
            if index >= 0:
                into[index] = np.ascontiguousarray(values[b, : batch.lengths[b]])


def pack_updates(
    samples: Sequence[TrainSample], *, updates: int, epochs: int, shards: int, max_tokens: int, seed: Sequence[int]
) -> list[list[OptimizerStep]]:
    """`result[shard][k]`: that rank's share of the k-th optimizer step, `updates × epochs` in all.

    With several updates the samples are shuffled by `seed` and epoch, each update a near-equal part; with one
    update the order is kept (it makes no difference to the gradient).
    """
    if len(samples) < updates:
        raise ValueError(f"{len(samples)} samples cannot be cut into {updates} updates")
    result: list[list[OptimizerStep]] = [[] for _ in range(shards)]
    for epoch in range(epochs):
        order = np.arange(len(samples))
        if updates > 1:
            order = np.random.default_rng([*seed, epoch]).permutation(len(samples))
        for part in np.array_split(order, updates):
            chosen = [samples[i] for i in part]
            split = split_by_budget([len(s.sample.tokens) for s in chosen], shards=shards, max_tokens=max_tokens)
            tokens = sum(int(s.sample.mask.sum()) for s in chosen)
            sequences = sum(bool(s.sample.mask.any()) for s in chosen)
            for shard, cuts in enumerate(split):
                batches = tuple(_train_batch(samples, [int(part[i]) for i in indices]) for indices in cuts)
                result[shard].append(
                    OptimizerStep(micro_batches=batches, total_tokens=tokens, total_sequences=sequences)
                )
    return result


def _sample_batch(chosen: Sequence[Sample], indices: Sequence[int]) -> MicroBatch:
    return MicroBatch(
        order=np.array(indices or [-1], dtype=np.int64),
        lengths=np.array([len(s.tokens) for s in chosen] or [1], dtype=np.int32),
        tokens=_pad([s.tokens for s in chosen], np.int32),
        mask=_pad([s.mask for s in chosen], np.bool_),
        rollout_logprobs=_pad([s.rollout_logprobs for s in chosen], np.float32),
    )


def _train_batch(samples: Sequence[TrainSample], indices: Sequence[int]) -> MicroBatch:
    chosen = [samples[i] for i in indices]
    plain = _sample_batch([s.sample for s in chosen], indices)
    return MicroBatch(
        order=plain.order,
        tokens=plain.tokens,
        lengths=plain.lengths,
        mask=plain.mask,
        rollout_logprobs=plain.rollout_logprobs,
        old_logprobs=_pad_optional([s.annotated.old_logprobs for s in chosen], like=samples[0].annotated.old_logprobs),
        ref_logprobs=_pad_optional([s.annotated.ref_logprobs for s in chosen], like=samples[0].annotated.ref_logprobs),
        old_values=_pad_optional([s.annotated.values for s in chosen], like=samples[0].annotated.values),
        advantages=_pad([s.advantages for s in chosen], np.float32),
        returns=_pad_optional([s.returns for s in chosen], like=samples[0].returns),
        teacher_top_logprobs=_join(
            [s.annotated.teacher_top_logprobs for s in chosen], like=samples[0].annotated.teacher_top_logprobs
        ),
    )


def _pad(rows: Sequence[npt.NDArray[_Scalar]], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
    width = max((len(r) for r in rows), default=2)  # an empty micro-batch still has a next token to predict
    out = np.zeros((max(len(rows), 1), width), dtype=dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _pad_optional(rows: Sequence[Float32Array | None], *, like: Float32Array | None) -> Float32Array | None:
    """`like` tells whether the quantity exists in this run: an empty micro-batch has no row to tell it."""
    if like is None:
        return None
    return _pad(_all_present(rows), np.float32)


def _join(rows: Sequence[TopLogprobs | None], *, like: TopLogprobs | None) -> TopLogprobs | None:
    """`like` as for `_pad_optional`; its first 0 places stand for an empty micro-batch."""
    if like is None:
        return None
    parts = [TopLogprobs(like.ids[:0], like.logprobs[:0]), *_all_present(rows)]
    return TopLogprobs(np.concatenate([p.ids for p in parts]), np.concatenate([p.logprobs for p in parts]))


def _all_present(rows: Sequence[_Row | None]) -> list[_Row]:
    present = [row for row in rows if row is not None]
    if len(present) != len(rows):
        raise ValueError("some samples have a quantity that others lack")
    return present
