"""What is wrong between keys of a config that are each right by themselves. It starts and reads nothing."""

from __future__ import annotations

from collections.abc import Iterator

from actors.weights.transports import transport_problem
from cluster.config.run import RunConfig
from trainers.errors import Problem


def cross_checks(config: RunConfig) -> list[Problem]:
    """What is wrong between keys that are each right by themselves."""
    return [
        *_batch_problems(config),
        *_algorithm_problems(config),
        *_adapter_problems(config),
        *_engine_problems(config),
    ]


def _batch_problems(config: RunConfig) -> Iterator[Problem]:
    train, n = config.train, config.sampling.n
    samples = train.prompts_per_step * n
    if samples < config.learners.data_parallel_size:
        yield Problem(
            "learners.workers",
            f"{config.learners.workers} ranks, but a step has only {samples} samples (train.prompts_per_step × "
            "sampling.n); use fewer ranks or more samples",
        )
    if train.updates_per_step > samples:
        yield Problem(
            "train.updates_per_step",
            f"{train.updates_per_step} updates cannot be cut from {samples} samples (train.prompts_per_step × "
            "sampling.n)",
        )
    updates = config.policy_updates
    if train.warmup_steps > updates:
        yield Problem(
            "train.warmup_steps",
            f"the warm-up of {train.warmup_steps} optimizer steps is longer than the run, which has {updates} of the "
            "policy",
        )
    kl = config.algorithm.kl
    if kl.controller == "adaptive" and samples > 5 * kl.horizon:
        yield Problem(
            "algorithm.kl.horizon",
            f"{samples} samples a step are more than five horizons, so that one step could turn the coefficient "
            f"negative; use at least {-(-samples // 5)}",
        )
    prompts = config.data.prompts
    if "-" in ([prompts] if isinstance(prompts, str) else prompts):
        yield Problem("data.prompts", "standard input cannot be trained on, as it is read once; give a file")


def _algorithm_problems(config: RunConfig) -> Iterator[Problem]:
    algorithm = config.algorithm
    if algorithm.capabilities.learns_from_rewards:
        if not config.rewards:
            yield Problem("rewards", f"is empty, but {algorithm.type} learns from scores; give a model or a function")
        elif all(reward.weight == 0 for reward in config.rewards):
            yield Problem("rewards", "every weight is 0, so there is nothing to learn from; give one reward a weight")
    yield from algorithm.problems(config.sampling, config.train)


def _adapter_problems(config: RunConfig) -> Iterator[Problem]:
    policy = config.policy
    if policy.train_type == "adalora":
        updates = config.policy_updates
        tinit, tfinal = policy.lora.schedule(updates)
        if tinit + tfinal >= updates:
            yield Problem(
                "policy.lora.tfinal",
                f"ranks stay for the first {tinit} (tinit) and the last {tfinal} (tfinal) of {updates} optimizer "
                "steps, so that none is left in which they fall; lower them, or train longer",
            )


def _engine_problems(config: RunConfig) -> Iterator[Problem]:
    learners, generators = config.learners, config.generators
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    if generators.max_model_len is not None and generators.max_model_len < longest:
        yield Problem(
            "generators.max_model_len",
            f"{generators.max_model_len} is less than data.max_prompt_tokens + sampling.max_tokens = "
            f"{config.data.max_prompt_tokens} + {config.sampling.max_tokens} = {longest}; raise it or leave it out",
        )
    if learners.offload == "all" and learners.zero_stage != 3:
        yield Problem(
            "learners.offload",
            "offload: all requires learners.zero_stage: 3; use offload: optimizer with stages 1 and 2",
        )
    if config.policy.dtype == "bfloat16" and learners.zero_stage == 0:
        yield Problem(
            "learners.zero_stage", "zero_stage: 0 requires policy.dtype: float32; use 1, 2 or 3 with bfloat16"
        )
    if learners.offload == "optimizer" and learners.zero_stage == 0:
        yield Problem("learners.offload", "offload: optimizer requires learners.zero_stage: 1, 2 or 3")
    adapter = config.policy.train_type != "full"
    if wrong := transport_problem(config.sync.transport, placement=config.placement, adapter=adapter):
        yield Problem("sync.transport", wrong)
    if config.placement == "colocated" and generators.tensor_parallel > 1:
        yield Problem(
            "generators.tensor_parallel", "placement: colocated requires tensor_parallel: 1; use 1, or placement: split"
        )
    elif config.placement == "colocated" and generators.replicas > learners.workers:
        yield Problem(
            "generators.replicas",
            f"colocated, each engine shares the GPU of one rank, but there are {generators.replicas} engines and "
            f"{learners.workers} ranks (learners.workers); use fewer engines, more ranks, or placement: split",
        )
