"""Samples are cut into one share for each data-parallel part, which need not be one for each rank. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest

from actors.learner.group import LearnerGroup
from actors.messages import AnnotatedRows, UpdateOptions, UpdateReport
from actors.runtime.actor_group import ActorGroup
from actors.runtime.layout import Deadlines
from trainers.algorithms.base import Mean
from trainers.config import TrainConfig
from trainers.packing import MicroBatch, OptimizerStep
from trainers.types import AnnotatedSample, Sample, TrainSample

DEADLINES = Deadlines(start=1, generate=1, update=1, sync=1, save=1)
TRAIN = TrainConfig(prompts_per_step=4, updates_per_step=2)


class Call:
    """A method of an actor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class Rank:
    """Answers with the tokens that it was given; its loss is the number of them."""

    def __init__(self) -> None:
        self.annotate, self.update = Call(self._annotate), Call(self._update)
        self.seen: list[tuple[int, ...]] = []

    def _annotate(self, batches: Sequence[MicroBatch], needs: object) -> list[AnnotatedRows]:
        self.seen = [tuple(batch.order.tolist()) for batch in batches]
        return [
            AnnotatedRows(old_logprobs=b.tokens.astype(np.float32), ref_logprobs=None, values=None) for b in batches
        ]

    def _update(self, steps: Sequence[OptimizerStep], order: UpdateOptions) -> UpdateReport:
        self.seen = [tuple(b.order.tolist()) for step in steps for b in step.micro_batches]
        report = UpdateReport(losses=[float(sum(b.mask.sum() for b in step.micro_batches)) for step in steps])
        report.add("tokens", Mean(sum(report.losses), 1.0))
        return report


class Ranks:
    """`ActorGroup` in this process."""

    def __init__(self, count: int) -> None:
        self.actors = [Rank() for _ in range(count)]

    async def each(self, phase: str, call: Callable[[Rank, int], Any], *, deadline_s: float) -> list[Any]:
        return [call(actor, rank) for rank, actor in enumerate(self.actors)]


def learners(ranks: Ranks, shares: int | None) -> LearnerGroup:
    return LearnerGroup(cast("ActorGroup", ranks), TRAIN, DEADLINES, data_parallel_size=shares)


def samples(count: int) -> list[Sample]:
    return [
        Sample(
            id=f"s{i}",
            group=i,
            tokens=np.full(2 + i % 3, i, dtype=np.int32),
            mask=np.array([False] + [True] * (1 + i % 3)),
            rollout_logprobs=np.zeros(2 + i % 3, dtype=np.float32),
            reward=0.0,
            valid=True,
            policy_version=0,
        )
        for i in range(count)
    ]


async def test_ranks_of_one_share_get_the_same_samples() -> None:
    ranks, given = Ranks(4), samples(8)
    found = await learners(ranks, 2).annotate(given, frozenset({"old_logprobs"}))
    for sample, annotated in zip(given, found, strict=True):
        assert annotated.old_logprobs is not None
        assert annotated.old_logprobs.tolist() == sample.tokens.tolist()
    first, second, third, fourth = (rank.seen for rank in ranks.actors)
    assert first == second
    assert third == fourth
    assert sorted(i for share in (first, third) for batch in share for i in batch if i >= 0) == list(range(8))


@pytest.mark.parametrize(("ranks", "shares"), [(4, 2), (4, None), (1, 1), (3, 1)])
async def test_each_token_counts_once(ranks: int, shares: int | None) -> None:
    trained = [
        TrainSample(annotated=AnnotatedSample(sample=s), advantages=np.zeros(len(s.tokens), dtype=np.float32))
        for s in samples(8)
    ]
    order = UpdateOptions(kl_coef=0.0)
    report = await learners(Ranks(ranks), shares).update(trained, order, seed=(0,))
    tokens = sum(int(s.sample.mask.sum()) for s in trained)
    assert report.metrics["tokens"].total == tokens
    assert report.loss == tokens / 2  # the mean of two optimizer steps


def test_shares_that_ranks_cannot_have_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="4 ranks cannot share 3 parts"):
        learners(Ranks(4), 3)
