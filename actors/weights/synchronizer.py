"""From the learners to the generators: publish the weights, prove that they arrived, let the generators write.

Implements `protocols.WeightSync` over the actors of both; it knows neither's engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from actors.messages import GenerateRequest, Proof
from actors.runtime.actor_group import ActorGroup, RoleError
from actors.runtime.layout import Deadlines
from actors.weights.transfer import Route, SentWeights, WeightSyncError, compare_digests
from trainers.config import SamplingConfig
from trainers.logprob_gap import GapLimits
from trainers.types import Completion, Float32Array, Sample, TokenPrompt, to_sample

Logprobs: TypeAlias = Callable[[Sequence[Sample]], Awaitable[list[Float32Array]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Prompts of which every generator writes a few tokens after each sync, and how far the trainer may disagree."""

    prompts: Sequence[TokenPrompt]
    sampling: SamplingConfig
    limits: GapLimits


class WeightSynchronizer:
    """Implements `protocols.WeightSync`: publish, compare digests, compare canary log-probabilities, then resume."""

    def __init__(
        self,
        learners: ActorGroup,
        generators: ActorGroup,
        logprobs: Logprobs,
        *,
        canaries: Canaries,
        deadlines: Deadlines,
    ) -> None:
        self._learners = learners
        self._generators = generators
        self._logprobs = logprobs  # of the trainer
        self._canaries = canaries
        sampling = canaries.sampling
        self._sampling = sampling.model_copy(update={"n": 1, "max_tokens": min(8, sampling.max_tokens)})
        self._deadlines = deadlines

    async def connect(self, route: Route) -> None:
        """Open the transport; for nccl all parties rendezvous here."""
        handles = list(self._generators.actors)
        with self._named_generators():
            await self._learners.each(
                "connect", lambda a, _: a.connect.remote(handles, route), deadline_s=self._deadlines.sync
            )

    async def publish(self, version: int) -> Proof:
        """See `protocols.WeightSync`. Raises `WeightSyncError` naming replica and tensor, or the gap."""
        deadline = self._deadlines.sync
        with self._named_generators():
            sent: list[SentWeights] = await self._learners.each(
                "publish weights", lambda a, _: a.publish.remote(), deadline_s=deadline
            )
        received = await self._generators.each(
            "prove weights", lambda a, _: a.received_digests.remote(), deadline_s=deadline
        )
        for replica, workers in enumerate(received):
            for worker in workers:
                compare_digests(sent[0].digests, worker, replica=f"generator {replica}")
        await self._generators.each("resume", lambda a, _: a.resume.remote(version), deadline_s=deadline)
        return Proof(version=version, bytes=sent[0].bytes, canary_gap=await self._canary_gap(version))

    @contextmanager
    def _named_generators(self) -> Iterator[None]:
        """A generator that failed while a learner waited for it, with its log file, which the learner does not know."""
        try:
            yield
        except RoleError as error:
            if error.role != self._generators.role or error.log is not None:
                raise
            raise error.with_log(self._generators.logs[error.rank]) from None

    async def _canary_gap(self, version: int) -> float:
        """Every replica writes a few tokens; the trainer must give them the same log-probabilities."""
        written = await self._generators.each(
            "canary",
            lambda a, rank: _gather_canaries(a, self._requests(rank, version)),
            deadline_s=self._deadlines.sync,
        )
        samples, places = [], []
        for replica, completions in enumerate(written):
            for canary, (completion,) in zip(self._canaries.prompts, completions, strict=True):
                samples.append(to_sample(canary, completion, id=canary.id))
                places.append(f"generator {replica}, canary {canary.id}")
        expected = await self._logprobs(samples)
        worst = 0.0
        for place, sample, logprobs in zip(places, samples, expected, strict=True):
            # A canary has so few tokens that their quantile is the largest, and their mean that of chance.
            gap = float(np.abs(logprobs - sample.rollout_logprobs)[sample.mask].max(initial=0.0))
            if not gap <= self._canaries.limits.quantile:
                raise WeightSyncError(
                    f"{place}: log-probabilities of version {version} differ by {gap:.3g} between generator and "
                    f"trainer (allowed: {self._canaries.limits.quantile:.3g}); all tensor digests match, so the "
                    "generator is not using the weights it received"
                )
            worst = max(worst, gap)
        return worst

    def _requests(self, replica: int, version: int) -> list[GenerateRequest]:
        return [
            GenerateRequest(
                id=f"canary-{version}-{replica}-{c.id}", prompt=c.tokens, sampling=self._sampling, seeds=(version,)
            )
            for c in self._canaries.prompts
        ]


async def _gather_canaries(actor: Any, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
    return list(await asyncio.gather(*(actor.generate.remote(r) for r in requests)))
