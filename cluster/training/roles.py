"""The composition root: every role of a run, started, connected, and gone again when the run ends.

The one place that names concrete roles; everything above it sees `actors/protocols.py`. What to start is in the
`RunSpec`: no config is read here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.generator.actor import Generator
from actors.generator.group import GeneratorGroup, generator_seats
from actors.learner.actor import Learner
from actors.learner.group import LearnerGroup, learner_seats
from actors.messages import EngineSpec, LearnerSpec
from actors.protocols import Roles
from actors.rewards.config import reward_names
from actors.rewards.scorer import Scorer
from actors.runtime.actor_group import ActorGroup, Seat, launch
from actors.runtime.gpu_sharing import ColocatedGpus, DedicatedGpus
from actors.runtime.placement import reserve
from actors.weights.synchronizer import Canaries, WeightSynchronizer
from actors.weights.transfer import Route
from actors.weights.transports import TRANSPORTS
from cluster.training.driver import Data
from cluster.training.recording import Recording
from cluster.training.run_spec import CanarySpec, RunSpec
from trainers.types import TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRoles(Roles):
    """The roles on Ray; beside what the driver sees, what they cost."""

    groups: Sequence[ActorGroup]

    async def peak_memory(self) -> dict[str, int]:
        """Peak host memory of each process, in bytes."""
        peaks: dict[str, int] = {}
        for group in self.groups:
            found = await group.each("measure", lambda a, _: a.peak_memory.remote(), deadline_s=60.0)
            peaks |= {f"{group.role} {rank}": peak for rank, peak in enumerate(found)}
        return peaks


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """The roles' processes, before they load anything."""

    spec: RunSpec
    generators: GeneratorGroup
    teacher: GeneratorGroup | None
    learners: LearnerGroup
    scorer: Scorer
    progress: Recording

    async def start(self) -> None:
        """All roles at once; on shared GPUs the learners first, so that vLLM sees what memory they leave; and before
        the generators too if these serve a base that the learners write."""
        spec = self.spec
        if spec.merge is not None:
            with self.progress.part("merging the adapter"):
                await self.learners.merge(spec.merge.policy, spec.merge.adapter, spec.merge.directory)
        async with asyncio.TaskGroup() as tasks:
            if spec.rewards:
                scoring = self.scorer.start(deadline_s=spec.deadlines.start)
                tasks.create_task(self._part(f"starting rewards ({', '.join(reward_names(spec.rewards))})", scoring))
            learning = self._part(f"loading {_named(self.learners.actors)}", self.learners.start())
            if spec.shares_gpus or spec.base is not None:
                await learning
            else:
                tasks.create_task(learning)
            if spec.base is not None:
                await self._part("writing the de-quantized base", self.learners.write_base(str(spec.base)))
            if spec.shares_gpus:
                deadline = spec.deadlines.start
                await self.learners.actors.each("offload", lambda a, _: a.offload.remote(), deadline_s=deadline)
            for generators in filter(None, (self.generators, self.teacher)):
                name = f"loading {_named(generators.actors)} (vLLM)"
                tasks.create_task(self._part(name, generators.start()))
        if self.teacher is not None:  # its weights are those that it was loaded with
            actors = self.teacher.actors
            await actors.each("resume", lambda a, _: a.resume.remote(0), deadline_s=spec.deadlines.sync)

    async def _part(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        with self.progress.part(name):
            await work

    async def connect(self, data: Data) -> RunningRoles:
        """Open the way of the weights."""
        spec, generators, learners = self.spec, self.generators.actors, self.learners.actors
        weights = WeightSynchronizer(
            learners,
            generators,
            self.learners.logprobs,
            canaries=canaries(spec.canaries, data),
            deadlines=spec.deadlines,
        )
        await weights.connect(await _route(spec, learners))
        shared = ColocatedGpus(learners, generators, spec.deadlines) if spec.shares_gpus else DedicatedGpus()
        return RunningRoles(
            generators=self.generators,
            teacher=self.teacher,
            learners=self.learners,
            weights=weights,
            scorer=self.scorer,
            gpu_sharing=shared,
            groups=(generators, learners, *([self.teacher.actors] if self.teacher else [])),
        )


@asynccontextmanager
async def open_roles(
    spec: RunSpec, data: Data, *, progress: Recording, own_cluster: bool
) -> AsyncIterator[RunningRoles]:
    """All roles of a spec, started and connected; gone again when the block ends, however it ends.

    On a cluster of the run's own the reward service is left to end with it.
    """
    with progress.part("finding room on the cluster"):
        group = await asyncio.to_thread(reserve, spec.layout, deadline_s=spec.place_s)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ray.util.remove_placement_group, group)
        engine = spec.policy_engine
        seats = generator_seats(spec.layout, group, engine.generators, spec.logs)
        generators = GeneratorGroup(launch_generators("generator", engine, seats), spec.deadlines)
        stack.callback(generators.actors.kill)
        teacher = None
        if (engine_of_teacher := spec.teacher_engine) is not None:
            seats = generator_seats(spec.layout, group, engine_of_teacher.generators, spec.logs, teacher=True)
            teacher = GeneratorGroup(launch_generators("teacher", engine_of_teacher, seats), spec.deadlines)
            stack.callback(teacher.actors.kill)
        ranks = spec.learner.learners
        seats = learner_seats(spec.layout, group, ranks, spec.logs)
        learners = LearnerGroup(
            launch_learners(spec.learner, seats),
            spec.learner.train,
            spec.deadlines,
            data_parallel_size=ranks.data_parallel_size,
        )
        stack.callback(learners.actors.kill)
        scorer = Scorer(spec.rewards, base_dir=Path.cwd(), run_id=spec.run_id)
        stack.push_async_callback(scorer.close, end_service=not own_cluster)
        launched = Launched(
            spec=spec, generators=generators, teacher=teacher, learners=learners, scorer=scorer, progress=progress
        )
        await launched.start()
        yield await launched.connect(data)


def _named(group: ActorGroup) -> str:
    """As a person counts its actors: "learner 0", or "4 learners"."""
    count = len(group.actors)
    return f"{group.role} 0" if count == 1 else f"{count} {group.role}s"


def launch_generators(role: str, spec: EngineSpec, seats: Sequence[Seat]) -> ActorGroup:
    """Generators, not yet started."""
    return ActorGroup(role, [launch(Generator, seat, spec) for seat in seats], [seat.log for seat in seats])


def launch_learners(spec: LearnerSpec, seats: Sequence[Seat]) -> ActorGroup:
    """The learners, not yet started."""
    actors = [launch(Learner, seat, spec, rank=rank, world_size=len(seats)) for rank, seat in enumerate(seats)]
    return ActorGroup("learner", actors, [seat.log for seat in seats])


async def _route(spec: RunSpec, learners: ActorGroup) -> Route:
    deadline = spec.deadlines.sync
    if not TRANSPORTS[spec.transport].rendezvous:
        return Route(transport=spec.transport, deadline_s=deadline)
    host = await learners.one(0, "connect", lambda a: a.node_ip.remote(), deadline_s=deadline)
    port = await learners.one(0, "connect", lambda a: a.free_port.remote(), deadline_s=deadline)
    return Route(transport=spec.transport, deadline_s=deadline, host=host, port=port, world_size=spec.transfer_world)


def canaries(spec: CanarySpec, data: Data) -> Canaries:
    """The first prompts of the data, whose log-probabilities are compared after each sync."""
    state = data.stream.state()
    taken = data.stream.take(spec.prompts)
    data.stream.restore(state)
    prompts = [
        TokenPrompt(id=f"canary-{i}", prompt=p, tokens=np.asarray(data.encoder.encode(p), dtype=np.int32))
        for i, (_, p) in enumerate(taken)
    ]
    return Canaries(prompts=prompts, sampling=spec.sampling, limits=spec.limits)
