"""The roles as the driver uses them: learners as one, generators as one, and the weight sync between the two.

Implements `protocols.py` over Ray actors. Work is cut here (which rank computes what, which replica writes what)
and put together here; the mathematics of it is in `trainers/packing.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from actors.config import PolicyConfig
from actors.messages import AnnotatedRows, GenerateRequest, Proof, StepReport, TeachRequest, UpdateOrder, UpdateReport
from actors.runtime.actor_group import ActorGroup
from actors.weights.transfer import Route, SentWeights, WeightSyncError, compare_digests
from trainers.adapter_folder import AdapterFolder
from trainers.algorithms.base import Mean, Need
from trainers.config import SamplingConfig, TrainConfig
from trainers.packing import pack_samples, pack_updates, unpack_rows
from trainers.types import (
    AnnotatedSample,
    Completion,
    Float32Array,
    Sample,
    TokenPrompt,
    TopLogprobs,
    TrainSample,
    to_sample,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each remote phase may take, in seconds."""

    start: float
    generate: float
    update: float
    sync: float
    save: float


class LearnerGroup:
    """Implements `protocols.Learners`."""

    def __init__(self, actors: ActorGroup, train: TrainConfig, deadlines: Deadlines) -> None:
        self.actors = actors
        self._train = train
        self._deadlines = deadlines

    async def start(self) -> None:
        """Join the ranks and load the models."""
        deadline = self._deadlines.start
        host = await self.actors.one(0, "start", lambda a: a.node_ip.remote(), deadline_s=deadline)
        port = await self.actors.one(0, "start", lambda a: a.free_port.remote(), deadline_s=deadline)
        url = f"tcp://{host}:{port}"
        await self.actors.each("start", lambda a, _: a.start.remote(url), deadline_s=deadline)

    async def merge(self, policy: PolicyConfig, adapter: AdapterFolder, directory: str) -> None:
        """The policy with an adapter merged into it, written for all roles to load; before `start`."""
        await self.actors.one(
            0, "merge", lambda a: a.merge.remote(policy, adapter, directory), deadline_s=self._deadlines.start
        )

    async def annotate(self, samples: Sequence[Sample], needs: frozenset[Need]) -> list[AnnotatedSample]:
        """See `protocols.Learners`."""
        if not needs - {"divergence"}:
            return [AnnotatedSample(sample=s) for s in samples]
        shards = pack_samples(samples, shards=len(self.actors.actors), max_tokens=self._train.max_tokens_per_microbatch)
        results: list[list[AnnotatedRows]] = await self.actors.each(
            "annotate", lambda a, rank: a.annotate.remote(shards[rank], needs), deadline_s=self._deadlines.update
        )
        found: dict[str, list[Float32Array | None]] = {
            name: [None] * len(samples) for name in ("old_logprobs", "ref_logprobs", "values")
        }
        for batches, rows in zip(shards, results, strict=True):
            for name, into in found.items():
                if name in needs:
                    unpack_rows(batches, [getattr(r, name) for r in rows], into)
        return [
            AnnotatedSample(sample=sample, old_logprobs=old, ref_logprobs=reference, values=values)
            for sample, old, reference, values in zip(samples, *found.values(), strict=True)
        ]

    async def update(self, samples: Sequence[TrainSample], order: UpdateOrder, *, seed: Sequence[int]) -> StepReport:
        """See `protocols.Learners`."""
        shards = pack_updates(
            samples,
            updates=self._train.updates_per_step,
            epochs=self._train.epochs_per_step,
            shards=len(self.actors.actors),
            max_tokens=self._train.max_tokens_per_microbatch,
            seed=seed,
        )
        reports: list[UpdateReport] = await self.actors.each(
            "update", lambda a, rank: a.update.remote(shards[rank], order), deadline_s=self._deadlines.update
        )
        return _merge(reports, samples)

    async def write_base(self, directory: str) -> None:
        """The quantised base, de-quantised, for the generators to serve."""
        await self.actors.each(
            "write base", lambda a, _: a.write_base.remote(directory), deadline_s=self._deadlines.save
        )

    async def logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """The policy's log-probabilities of the samples' tokens."""
        annotated = await self.annotate(samples, frozenset({"old_logprobs"}))
        return [a.old_logprobs for a in annotated if a.old_logprobs is not None]

    async def save(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("save", lambda a, _: a.save.remote(directory), deadline_s=self._deadlines.save)

    async def load(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("load", lambda a, _: a.load.remote(directory), deadline_s=self._deadlines.save)

    async def export(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("export", lambda a, _: a.export.remote(directory), deadline_s=self._deadlines.save)


def _merge(reports: Sequence[UpdateReport], samples: Sequence[TrainSample]) -> StepReport:
    metrics: dict[str, Mean] = {}
    for report in reports:
        for name, mean in report.metrics.items():
            metrics[name] = metrics.get(name, Mean(0.0, 0.0)) + mean
    worst = max(reports, key=lambda r: r.gap_max if r.gap_max == r.gap_max else float("inf"))
    steps = len(reports[0].losses)
    norms = reports[0].grad_norms
    return StepReport(
        metrics=metrics,
        loss=sum(sum(r.losses) for r in reports) / steps,
        grad_norm=float(np.mean(norms)) if norms else None,
        learning_rate=reports[0].learning_rate,
        optimizer_steps=steps,
        gap_max=worst.gap_max,
        gap_sample=samples[worst.gap_at].sample.id if worst.gap_at >= 0 else "",
    )


class GeneratorGroup:
    """Implements `protocols.Generators`, and with an engine of the teacher `protocols.Teacher`."""

    def __init__(self, actors: ActorGroup, deadlines: Deadlines) -> None:
        self.actors = actors
        self._deadlines = deadlines
        self._load = [0] * len(actors.actors)
        self._calls = count()

    async def start(self) -> None:
        """Load the engines."""
        await self.actors.each("start", lambda a, _: a.start.remote(), deadline_s=self._deadlines.start)

    async def generate(
        self, prompt: TokenPrompt, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> tuple[Completion, ...]:
        """See `protocols.Generators`."""
        replica = min(range(len(self._load)), key=lambda r: (self._load[r], r))
        request = GenerateRequest(
            id=f"{prompt.id}#{next(self._calls)}", prompt=prompt.tokens, sampling=sampling, seeds=tuple(seeds)
        )
        self._load[replica] += len(seeds)
        try:
            completions: tuple[Completion, ...] = await self.actors.one(
                replica, "generate", lambda a: a.generate.remote(request), deadline_s=self._deadlines.generate
            )
        finally:
            self._load[replica] -= len(seeds)
        return completions

    async def top_logprobs(self, sample: Sample, k: int) -> TopLogprobs:
        """See `protocols.Teacher`; there is one engine of it."""
        request = TeachRequest(
            id=f"{sample.id}#{next(self._calls)}", tokens=sample.tokens, places=np.flatnonzero(sample.mask), top_k=k
        )
        taught: TopLogprobs = await self.actors.one(
            0, "teach", lambda a: a.top_logprobs.remote(request), deadline_s=self._deadlines.generate
        )
        return taught


class WeightSynchronizer:
    """Implements `protocols.WeightSync`: publish, compare digests, compare canary log-probabilities, then resume."""

    def __init__(
        self,
        learners: LearnerGroup,
        generators: GeneratorGroup,
        canaries: Sequence[TokenPrompt],
        *,
        sampling: SamplingConfig,
        max_gap: float,
        deadlines: Deadlines,
    ) -> None:
        self._learners = learners
        self._generators = generators
        self._canaries = canaries
        self._sampling = sampling.model_copy(update={"n": 1, "max_tokens": min(8, sampling.max_tokens)})
        self._max_gap = max_gap
        self._deadlines = deadlines

    async def connect(self, route: Route) -> None:
        """Open the transport; for nccl all parties rendezvous here."""
        handles = list(self._generators.actors.actors)
        await self._learners.actors.each(
            "connect", lambda a, _: a.connect.remote(handles, route), deadline_s=self._deadlines.sync
        )

    async def publish(self, version: int) -> Proof:
        """See `protocols.WeightSync`. Raises `WeightSyncError` naming replica and tensor, or the gap."""
        deadline = self._deadlines.sync
        sent: list[SentWeights] = await self._learners.actors.each(
            "publish weights", lambda a, _: a.publish.remote(), deadline_s=deadline
        )
        received = await self._generators.actors.each(
            "prove weights", lambda a, _: a.received_digests.remote(), deadline_s=deadline
        )
        for replica, workers in enumerate(received):
            for worker in workers:
                compare_digests(sent[0].digests, worker, replica=f"generator {replica}")
        await self._generators.actors.each("resume", lambda a, _: a.resume.remote(version), deadline_s=deadline)
        return Proof(version=version, bytes=sent[0].bytes, canary_gap=await self._canary_gap(version))

    async def _canary_gap(self, version: int) -> float:
        """Every replica writes a few tokens; the trainer must give them the same log-probabilities."""
        written = await self._generators.actors.each(
            "canary",
            lambda a, rank: _gather_canaries(a, self._requests(rank, version)),
            deadline_s=self._deadlines.sync,
        )
        samples, places = [], []
        for replica, completions in enumerate(written):
            for canary, (completion,) in zip(self._canaries, completions, strict=True):
                samples.append(to_sample(canary, completion, id=canary.id))
                places.append(f"generator {replica}, canary {canary.id}")
        expected = await self._learners.logprobs(samples)
        worst = 0.0
        for place, sample, logprobs in zip(places, samples, expected, strict=True):
            gap = float(np.abs(logprobs - sample.rollout_logprobs)[sample.mask].max(initial=0.0))
            if not gap <= self._max_gap:
                raise WeightSyncError(
                    f"{place}: log-probabilities of version {version} differ by {gap:.3g} between generator and "
                    f"trainer (allowed: {self._max_gap:.3g}); every tensor arrived as sent, so the generator does not "
                    "compute with what it was given"
                )
            worst = max(worst, gap)
        return worst

    def _requests(self, replica: int, version: int) -> list[GenerateRequest]:
        return [
            GenerateRequest(
                id=f"canary-{version}-{replica}-{c.id}", prompt=c.tokens, sampling=self._sampling, seeds=(version,)
            )
            for c in self._canaries
        ]


async def _gather_canaries(actor: Any, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
    return list(await asyncio.gather(*(actor.generate.remote(r) for r in requests)))


class OwnGPUs:
    """Implements `protocols.Turns` for split placement, and for the CPU: nobody waits for anybody."""

    shared = False

    async def learn(self) -> None:
        """Nothing to do."""

    async def generate(self) -> None:
        """Nothing to do."""


class SharedGPUs:
    """Implements `protocols.Turns` for colocated placement on GPUs."""

    shared = True

    def __init__(self, learners: LearnerGroup, generators: GeneratorGroup, deadlines: Deadlines) -> None:
        self._learners = learners.actors
        self._generators = generators.actors
        self._deadline = deadlines.sync

    async def learn(self) -> None:
        """See `protocols.Turns`."""
        await self._generators.each("sleep", lambda a, _: a.sleep.remote(), deadline_s=self._deadline)
        await self._learners.each("reload", lambda a, _: a.reload.remote(), deadline_s=self._deadline)

    async def generate(self) -> None:
        """See `protocols.Turns`."""
        await self._learners.each("offload", lambda a, _: a.offload.remote(), deadline_s=self._deadline)
        await self._generators.each("wake up", lambda a, _: a.wake_up.remote(), deadline_s=self._deadline)
