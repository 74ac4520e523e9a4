"""The composition root: every role of a run, started, connected, and gone again when the run ends.

The one place that names concrete roles; everything above it sees `actors/protocols.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from actors.config import Transport
from actors.generator.actor import Generator
from actors.generator.group import GeneratorGroup, generator_seats
from actors.learner.actor import Learner
from actors.learner.group import LearnerGroup, learner_seats
from actors.messages import EngineSpec, LearnerSpec
from actors.modeling.policy_source import Origin, find_origin
from actors.protocols import Roles
from actors.rewards.scorer import Scorer
from actors.runtime.actor_group import ActorGroup, Deadlines, Seat, launch
from actors.runtime.gpu_sharing import ColocatedGpus, DedicatedGpus
from actors.runtime.placement import layout, reserve
from actors.weights.synchronizer import Canaries, WeightSynchronizer
from actors.weights.transfer import Route
from cluster.config.run import RunConfig
from cluster.runs.directory import RunDirectory
from cluster.training.driver import Data
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


@asynccontextmanager
async def open_roles(
    config: RunConfig, data: Data, run: RunDirectory, *, own_cluster: bool
) -> AsyncIterator[RunningRoles]:
    """All roles started and connected; gone again when the block ends, however it ends.

    On a cluster of the run's own the reward service is left to end with it.
    """
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    origin = find_origin(config.policy)
    config = config.model_copy(update={"policy": origin.in_run(run.merged)})
    plan = layout(config.placement, config.generators, config.learners, gpus=gpus, teacher=config.serves_teacher)
    group = await asyncio.to_thread(reserve, plan, deadline_s=min(config.timeouts.start_s, 120.0))
    transport = choose_transport(config, gpus=gpus)
    deadlines = _deadlines(config)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ray.util.remove_placement_group, group)
        seats = generator_seats(plan, group, config.generators, run.logs)
        generator_actors = launch_generators("generator", policy_engine(config, run, transport), seats)
        stack.callback(generator_actors.kill)
        teacher = None
        if config.serves_teacher:
            seats = generator_seats(plan, group, config.generators, run.logs, teacher=True)
            teacher = GeneratorGroup(launch_generators("teacher", teacher_engine(config), seats), deadlines)
            stack.callback(teacher.actors.kill)
        learner_actors = launch_learners(config, origin, learner_seats(plan, group, config.learners, run.logs))
        stack.callback(learner_actors.kill)
        scorer = Scorer(config.scored_rewards, base_dir=Path.cwd(), run_id=run.path.name)
        stack.push_async_callback(scorer.close, end_service=not own_cluster)
        generators = GeneratorGroup(generator_actors, deadlines)
        learners = LearnerGroup(learner_actors, config.train, deadlines)
        shared = gpus and config.placement == "colocated"
        gpu_sharing = ColocatedGpus(learner_actors, generator_actors, deadlines) if shared else DedicatedGpus()
        if origin.merged is not None:
            await learners.merge(origin.policy, origin.merged, config.policy.model)
        starting = _Starting(learners, [g for g in (generators, teacher) if g], scorer, deadlines)
        await starting.all(shared=shared, base=base_of(run) if is_quantized(config) else None)
        if teacher is not None:  # its weights are those that it was loaded with
            await teacher.actors.each("resume", lambda a, _: a.resume.remote(0), deadline_s=deadlines.sync)
        weights = WeightSynchronizer(
            learner_actors,
            generator_actors,
            learners.logprobs,
            canaries=canaries(config, data),
            deadlines=deadlines,
        )
        await weights.connect(await _route(config, learners, transport))
        yield RunningRoles(
            generators=generators,
            teacher=teacher,
            learners=learners,
            weights=weights,
            scorer=scorer,
            gpu_sharing=gpu_sharing,
            groups=(generator_actors, learner_actors, *([teacher.actors] if teacher else [])),
        )


@dataclass(frozen=True, slots=True)
class _Starting:
    """The roles that start together."""

    learners: LearnerGroup
    generators: Sequence[GeneratorGroup]
    scorer: Scorer
    deadlines: Deadlines

    async def all(self, *, shared: bool, base: Path | None) -> None:
        """All roles at once; on shared GPUs the learners first, so that vLLM sees what memory they leave; and before
        the generators too where these serve a base that the learners write."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.scorer.start(deadline_s=self.deadlines.start))
            if shared or base is not None:
                await self.learners.start()
            else:
                tasks.create_task(self.learners.start())
            if base is not None:
                await self.learners.write_base(str(base))
            if shared:
                deadline = self.deadlines.start
                await self.learners.actors.each("offload", lambda a, _: a.offload.remote(), deadline_s=deadline)
            for generators in self.generators:
                tasks.create_task(generators.start())


def _deadlines(config: RunConfig) -> Deadlines:
    timeouts = config.timeouts
    return Deadlines(
        start=timeouts.start_s,
        generate=timeouts.generate_s,
        update=timeouts.update_s,
        sync=timeouts.sync_s,
        save=timeouts.save_s,
    )


def policy_engine(config: RunConfig, run: RunDirectory, transport: Transport) -> EngineSpec:
    """What writes for the policy: the whole model, or the base that its adapter is served on."""
    return EngineSpec(
        model=str(base_of(run)) if is_quantized(config) else config.policy.model,
        dtype=config.policy.dtype,
        generators=config.generators,
        max_model_len=config.max_model_len,
        transport=transport,
        adapter=None if config.policy.train_type == "full" else config.policy,
    )


def teacher_engine(config: RunConfig) -> EngineSpec:
    """The teacher: one engine whose weights never change."""
    teacher = config.algorithm.capabilities.teacher
    assert teacher is not None, "this run has no teacher"
    return EngineSpec(
        model=teacher.model,
        top_logprobs=config.served_top_k or 1,
        dtype=config.policy.dtype,
        generators=config.generators,
        max_model_len=config.max_model_len,
    )


def is_quantized(config: RunConfig) -> bool:
    """Whether the learners hold 4-bit weights, which the generators serve de-quantized."""
    return config.policy.train_type == "qlora"


def base_of(run: RunDirectory) -> Path:
    """Where the learners write the de-quantized base."""
    return run.base


def launch_generators(role: str, spec: EngineSpec, seats: Sequence[Seat]) -> ActorGroup:
    """Generators, not yet started."""
    return ActorGroup(role, [launch(Generator, seat, spec) for seat in seats], [seat.log for seat in seats])


def launch_learners(config: RunConfig, origin: Origin, seats: Sequence[Seat]) -> ActorGroup:
    """The learners, not yet started."""
    train = config.train
    spec = LearnerSpec(
        policy=config.policy,
        learners=config.learners,
        algorithm=config.algorithm,
        train=train,
        temperature=config.sampling.temperature,
        max_completion_tokens=config.sampling.max_tokens,
        total_optimizer_steps=config.policy_updates,
        critic_optimizer_steps=train.steps * train.updates_per_step * train.epochs_per_step,
        seed=config.seed,
        collective_timeout_s=config.timeouts.update_s,
        adapter=origin.continued,
    )
    actors = [launch(Learner, seat, spec, rank=rank, world_size=len(seats)) for rank, seat in enumerate(seats)]
    return ActorGroup("learner", actors, [seat.log for seat in seats])


def choose_transport(config: RunConfig, *, gpus: bool) -> Transport:
    """How weights travel where the config leaves it open; an adapter is small enough for the object store."""
    if config.policy.train_type != "full":
        return "ray"
    if config.sync.transport != "auto":
        return config.sync.transport
    if not gpus:
        return "ray"
    return "ipc" if config.placement == "colocated" else "nccl"


async def _route(config: RunConfig, learners: LearnerGroup, transport: Transport) -> Route:
    deadline = config.timeouts.sync_s
    if transport != "nccl":
        return Route(transport=transport, deadline_s=deadline)
    host = await learners.actors.one(0, "connect", lambda a: a.node_ip.remote(), deadline_s=deadline)
    port = await learners.actors.one(0, "connect", lambda a: a.free_port.remote(), deadline_s=deadline)
    workers = config.generators.replicas * config.generators.tensor_parallel
    return Route(transport="nccl", deadline_s=deadline, host=host, port=port, world_size=1 + workers)


def canaries(config: RunConfig, data: Data) -> Canaries:
    """The first prompts of the data, whose log-probabilities are compared after each sync."""
    state = data.stream.state()
    taken = data.stream.take(config.sync.canary_prompts)
    data.stream.restore(state)
    prompts = [
        TokenPrompt(id=f"canary-{i}", prompt=p, tokens=np.asarray(data.encoder.encode(p), dtype=np.int32))
        for i, (_, p) in enumerate(taken)
    ]
    return Canaries(prompts=prompts, sampling=config.sampling, max_gap=config.sync.allowed_gap(config.policy.dtype))
