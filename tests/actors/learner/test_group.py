"""The roles as the driver uses them: the balance between replicas, and weight sync end to end with its proofs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import LearnerConfig
from actors.generator.group import GeneratorGroup
from actors.learner.actor import Learner
from actors.learner.group import LearnerGroup
from actors.messages import GenerateRequest, UpdateOptions
from actors.runtime.actor_group import ActorGroup, RoleError
from actors.weights.synchronizer import Canaries, WeightSynchronizer
from actors.weights.transfer import GeneratorClient, ObjectStoreSender, Route, WeightSyncError
from tests.support import tiny
from tests.support.engine_host import Engine
from trainers.algorithms.config import GRPOConfig, KLConfig
from trainers.config import SamplingConfig, TrainConfig
from trainers.logprob_gap import gap_limits
from trainers.types import AnnotatedSample, Completion, Sample, TrainSample, to_sample

tiny.by_value(__name__)

ROUTE = Route(transport="ray", deadline_s=60)
SAMPLING = SamplingConfig(n=4, temperature=0.7, max_tokens=12)
NO_CANARIES = Canaries(prompts=(), sampling=SAMPLING, limits=gap_limits("float32"))
VICTIM = "model.layers.1.mlp.up_proj.weight"


class Replica:
    """Stands for a generator's handle; writes when it is let."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.let = asyncio.Event()
        self.generate = self

    async def remote(self, request: GenerateRequest) -> tuple[Completion, ...]:
        self.requests.append(request)
        await self.let.wait()
        if request.seeds == (13,):
            raise OSError("bad luck")
        return ()


async def test_the_least_busy_replica_writes() -> None:
    """Groups of 4, 1, 1, 3: to replica 0, then 1 twice, then 1 (2 of its own against 4); then all are free again."""
    replicas = [Replica(), Replica()]
    group = GeneratorGroup(ActorGroup("generator", replicas, [Path("0"), Path("1")]), tiny.DEADLINES)  # type: ignore[arg-type]
    prompt = tiny.token_prompt("p", 0)
    tasks = []
    for seeds in (range(4), [7], [8], range(3)):
        tasks.append(asyncio.create_task(group.generate(prompt, SAMPLING, seeds)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    for replica in replicas:
        replica.let.set()
    await asyncio.gather(*tasks)
    assert [[r.seeds for r in replica.requests] for replica in replicas] == [[(0, 1, 2, 3)], [(7,), (8,), (0, 1, 2)]]
    assert len({r.id for replica in replicas for r in replica.requests}) == 4
    with pytest.raises(OSError, match="bad luck"):  # an error frees the replica too
        await group.generate(prompt, SAMPLING, [13])
    await group.generate(prompt, SAMPLING, [1])
    assert [len(replica.requests) for replica in replicas] == [3, 3]


class TamperingClient(GeneratorClient):
    """Flips a bit of one tensor after its digest was taken."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for i, name in enumerate(update_info["names"]):
            if name == VICTIM:
                buffer = update_info["buffers"][i].copy()
                buffer[17] ^= 1
                update_info["buffers"][i] = buffer
        super().update_weights(update_info)


class Tampered(Learner):
    """A learner that can be made to corrupt what it sends."""

    def tamper(self, generators: Sequence[Any]) -> None:
        client = TamperingClient(generators, deadline_s=60)
        self._sender = ObjectStoreSender(self._models.policy.exported_weights(), client, rank=0)


@dataclass(frozen=True)
class Stage:
    model: Path
    learners: LearnerGroup
    generators: GeneratorGroup
    sync: WeightSynchronizer
    versions: Iterator[int] = field(default_factory=count)

    def publish(self) -> Any:
        return tiny.run(self.sync.publish(next(self.versions)))

    def tell_generator(self, fault: str) -> None:
        tiny.run(self.generators.actors.each("test", lambda a, _: a.misbehave.remote(fault), deadline_s=60))

    def tell_learner(self) -> None:
        handles = list(self.generators.actors.actors)
        tiny.run(self.learners.actors.each("test", lambda a, _: a.tamper.remote(handles), deadline_s=60))


@pytest.fixture(scope="module")
def stage(engines: ActorGroup, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    spec = tiny.learner_spec(
        tied,
        train=TrainConfig(learning_rate=0.01, max_tokens_per_microbatch=200),
        learners=LearnerConfig(zero_stage=3),
        algorithm=GRPOConfig(type="grpo", kl=KLConfig(coef=0)),
        temperature=SAMPLING.temperature,
    )
    canaries = [tiny.token_prompt(f"canary{i}", 100 + i) for i in range(3)]
    with tiny.learner_group(spec, tmp_path_factory.mktemp("logs"), forks=None, cls=Tampered) as learners:
        generators = GeneratorGroup(engines, tiny.DEADLINES)
        proof = Canaries(prompts=canaries, sampling=SAMPLING, limits=gap_limits("float32"))
        sync = WeightSynchronizer(learners.actors, engines, learners.logprobs, canaries=proof, deadlines=tiny.DEADLINES)
        yield Stage(tied, learners, generators, sync)


@pytest.fixture
def connected(stage: Stage, engine: Engine) -> Stage:
    """Over a line in good order, to a generator of the same model."""
    engine.use(tiny.engine_spec(stage.model), any_weights=True)
    tiny.run(stage.sync.connect(ROUTE))
    return stage


def rollouts(stage: Stage) -> list[Sample]:
    prompt = tiny.token_prompt("p", 5)
    group = tiny.run(stage.generators.generate(prompt, SAMPLING, range(4)))
    return [to_sample(prompt, c, id=f"p/{i}", reward=1.0) for i, c in enumerate(group)]


def learn(stage: Stage) -> None:
    """One step with a large learning rate."""
    samples = [
        TrainSample(annotated=AnnotatedSample(sample=s), advantages=s.mask * np.float32((-1) ** i))
        for i, s in enumerate(rollouts(stage))
    ]
    tiny.run(stage.learners.update(samples, UpdateOptions(kl_coef=0.0), seed=(0,)))


def largest_gap(stage: Stage, samples: list[Sample]) -> float:
    expected = tiny.run(stage.learners.logprobs(samples))
    return max(float(np.abs(e - s.rollout_logprobs)[s.mask].max()) for e, s in zip(expected, samples, strict=True))


@pytest.mark.integration
def test_publishing_brings_generator_and_trainer_together(connected: Stage) -> None:
    """Before and after an update that moves log-probabilities by more than 0.1."""
    stage = connected
    proof = stage.publish()
    samples = rollouts(stage)
    parameters = tiny.load_plain(stage.model).parameters()
    assert proof.bytes == sum(4 * p.numel() for p in parameters)
    assert 0 < proof.canary_gap < 1e-4
    assert largest_gap(stage, samples) < 1e-4
    assert {s.policy_version for s in samples} == {proof.version}
    learn(stage)
    assert largest_gap(stage, samples) > 0.1
    later = stage.publish()
    assert later.version == proof.version + 1
    assert later.canary_gap < 1e-4
    samples = rollouts(stage)
    assert largest_gap(stage, samples) < 1e-4
    assert {s.policy_version for s in samples} == {later.version}


@pytest.mark.integration
def test_a_tensor_that_changes_on_the_way_is_named(connected: Stage) -> None:
    connected.tell_learner()
    with pytest.raises(WeightSyncError, match=f"generator 0 loaded a tensor '{VICTIM}' that differs"):
        connected.publish()
    tiny.run(connected.sync.connect(ROUTE))
    assert connected.publish().canary_gap < 1e-4


@pytest.mark.integration
def test_a_generator_that_ignores_an_update_is_caught_by_its_canaries(connected: Stage) -> None:
    """Every tensor arrives as sent, but the generator does not compute with it."""
    connected.publish()
    learn(connected)
    connected.tell_generator("stale")
    with pytest.raises(WeightSyncError, match=r"generator 0, canary canary\d: .* differ by \d.*allowed: 0.001"):
        connected.publish()


@pytest.mark.integration
def test_a_generator_that_fails_in_an_update_is_reported(connected: Stage) -> None:
    connected.tell_generator("no memory")
    with pytest.raises(RoleError, match="the device is full") as caught:
        connected.publish()
    failed = caught.value  # not learner 0, which waited for it
    assert (failed.role, failed.rank, failed.phase, failed.kind) == ("generator", 0, "load weights", "MemoryError")
    assert failed.log == str(connected.generators.actors.logs[0])


@pytest.mark.integration
def test_a_generator_that_hangs_in_an_update_is_named(connected: Stage) -> None:
    """The learner waits for it and would run out of time too: the inner deadline is the shorter one."""
    connected.tell_generator("hang")
    learning, generating = connected.learners.actors, connected.generators.actors
    deadlines = replace(tiny.DEADLINES, sync=10)
    sync = WeightSynchronizer(
        learning, generating, connected.learners.logprobs, canaries=NO_CANARIES, deadlines=deadlines
    )
    tiny.run(sync.connect(replace(ROUTE, deadline_s=10)))
    with pytest.raises(
        RoleError, match=r"generator 0 failed in phase 'start weight update': Timeout: no answer within 9 s"
    ):
        tiny.run(sync.publish(99))
