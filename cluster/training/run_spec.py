"""What the roles of a run are built from: one frozen object, derived once from the config before anything starts.

`derive_spec` is a pure function that imports neither Ray nor an engine; `roles.open_roles` starts what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.config import PolicyConfig, Transport
from actors.messages import EngineSpec, LearnerSpec
from actors.modeling.policy_source import Origin
from actors.rewards.config import RewardConfig
from actors.runtime.layout import Deadlines, Layout, layout
from actors.weights.transports import choose_transport
from cluster.config.run import RunConfig
from cluster.runs.directory import RunDirectory
from trainers.adapter_folder import AdapterFolder
from trainers.config import SamplingConfig
from trainers.logprob_gap import GapLimits

_PLACE_S = 120.0  # longest wait for room on the cluster: what is not free by then is used by somebody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """An adapter that is merged into its base before any role loads the policy."""

    policy: PolicyConfig  # with the base as its model
    adapter: AdapterFolder
    directory: str  # of the result


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySpec:
    """The check after each weight sync: how many prompts, drawn how, and the allowed gap."""

    prompts: int
    sampling: SamplingConfig
    limits: GapLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Everything that `open_roles` starts, and nothing that it would have to look up."""

    run_id: str
    logs: Path
    layout: Layout
    shares_gpus: bool  # learners and generators take turns on the same GPUs
    policy_engine: EngineSpec
    teacher_engine: EngineSpec | None
    learner: LearnerSpec
    merge: Merge | None
    base: Path | None  # where the learners write the de-quantized base that the generators serve
    rewards: Sequence[RewardConfig]
    canaries: CanarySpec
    deadlines: Deadlines
    place_s: float
    transport: Transport
    transfer_world: int  # of a rendezvous: learner rank 0 and every worker of every generator


def derive_spec(config: RunConfig, origin: Origin, run: RunDirectory, *, gpus: bool) -> RunSpec:
    """The spec of a run whose models are all local; `origin`: what its policy begins as."""
    config = config.model_copy(update={"policy": origin.in_run(run.merged)})
    quantized = config.policy.train_type == "qlora"
    adapter = config.policy.train_type != "full"
    transport = choose_transport(config.sync.transport, placement=config.placement, gpus=gpus, adapter=adapter)
    deadlines = _deadlines(config)
    return RunSpec(
        run_id=run.path.name,
        logs=run.logs,
        layout=layout(config.placement, config.generators, config.learners, gpus=gpus, teacher=config.serves_teacher),
        shares_gpus=gpus and config.placement == "colocated",
        policy_engine=EngineSpec(
            model=str(run.base) if quantized else config.policy.model,
            dtype=config.policy.dtype,
            generators=config.generators,
            max_model_len=config.max_model_len,
            transport=transport,
            adapter=config.policy if adapter else None,
        ),
        teacher_engine=_teacher_engine(config) if config.serves_teacher else None,
        learner=_learner(config, origin),
        merge=None
        if origin.merged is None
        else Merge(policy=origin.policy, adapter=origin.merged, directory=config.policy.model),
        base=run.base if quantized else None,
        rewards=config.scored_rewards,
        canaries=CanarySpec(
            prompts=config.sync.canary_prompts,
            sampling=config.sampling,
            limits=config.sync.allowed_gap(config.policy.dtype),
        ),
        deadlines=deadlines,
        place_s=min(deadlines.start, _PLACE_S),
        transport=transport,
        transfer_world=1 + config.generators.replicas * config.generators.tensor_parallel,
    )


def _teacher_engine(config: RunConfig) -> EngineSpec:
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


def _learner(config: RunConfig, origin: Origin) -> LearnerSpec:
    train = config.train
    return LearnerSpec(
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


def _deadlines(config: RunConfig) -> Deadlines:
    timeouts = config.timeouts
    return Deadlines(
        start=timeouts.start_s,
        generate=timeouts.generate_s,
        update=timeouts.update_s,
        sync=timeouts.sync_s,
        save=timeouts.save_s,
    )
