"""The generators as the driver uses them: one group of completions at a time, by the replica that is least busy.

Implements `protocols.Generators` and `protocols.Teacher` over Ray actors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from ray.util.placement_group import PlacementGroup

from actors.config import GeneratorConfig
from actors.generator.engine import engine_environment
from actors.messages import GenerateRequest, TopLogprobsRequest
from actors.runtime.actor_group import ActorGroup, Seat
from actors.runtime.layout import ROLE_CPUS, Deadlines, Layout, cores
from trainers.config import SamplingConfig
from trainers.types import Completion, Sample, TokenPrompt, TopLogprobs


def generator_seats(
    plan: Layout, group: PlacementGroup, config: GeneratorConfig, logs: Path, *, teacher: bool = False
) -> list[Seat]:
    """A seat for each replica (or for the teacher's engine) with a fixed number of threads, since generators and
    learners take turns on the cores."""
    env = engine_environment(threads=config.threads or cores())
    role, bundles = ("teacher", plan.teacher) if teacher else ("generator", plan.generators)
    gpus = float(config.tensor_parallel) if teacher and plan.generator_gpus else plan.generator_gpus
    return [
        Seat(group=group, bundle=b, cpus=ROLE_CPUS, gpus=gpus, env=env, log=logs / f"{role}-{i}.log")
        for i, b in enumerate(bundles)
    ]


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
        request = TopLogprobsRequest(
            id=f"{sample.id}#{next(self._calls)}", tokens=sample.tokens, places=np.flatnonzero(sample.mask), top_k=k
        )
        teacher_top_logprobs: TopLogprobs = await self.actors.one(
            0, "top log-probabilities", lambda a: a.top_logprobs.remote(request), deadline_s=self._deadlines.generate
        )
        return teacher_top_logprobs
