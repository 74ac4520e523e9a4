"""`rlhf plan`: what a run will do, in words and numbers, and everything that is wrong with it, before it starts.

It reads files (prompts, the models' configs and tokenizers) and starts nothing; what needs transformers is imported
when a plan is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actors.modeling.policy_source import Origin, find_origin
from actors.rewards.checks import validate_rewards
from cluster.config.checks import cross_checks
from cluster.config.run import RunConfig, problems_as_json
from cluster.config.warnings import advise
from cluster.models.engine_limits import engine_problems
from cluster.models.inspect import (
    ModelInfo,
    context_problems,
    critic_problems,
    quantization_problems,
    read_model,
    target_problems,
    vocabulary_problems,
)
from cluster.models.remote import outlined
from cluster.planning.memory import GIB, MemoryEstimate, generator_memory, learner_memory
from cluster.planning.prompts_report import prompts_problems
from trainers.algorithms.config import CriticConfig
from trainers.errors import Problem, UserError

SCORER_CPUS = 0.1  # what Ray sets aside for a replica of a reward; its threads are set apart


@dataclass(frozen=True, slots=True)
class Role:
    """Processes of one kind and what each takes."""

    name: str
    count: int
    gpus: float  # of each; 0 on the CPU
    cpus: float  # of each
    node: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it starts."""

    config: RunConfig
    arithmetic: tuple[str, ...]
    gpus: bool  # planned for GPUs, not CPUs
    roles: tuple[Role, ...]
    memory: tuple[MemoryEstimate, ...]  # of one process of each role; empty where the model's size is not known
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]  # what is allowed and was probably not meant


@dataclass(frozen=True, slots=True)
class _Findings:
    config: RunConfig  # models that lie in stores are folders here
    origin: Origin | None
    model: ModelInfo | None
    teacher: ModelInfo | None
    prompts: int | None
    problems: list[Problem]


def make_plan(config: RunConfig, *, gpus: bool | None = None) -> Plan:
    """The plan of a run on GPUs or CPUs; None: as this machine is."""
    on_gpus = _machine_has_gpus() if gpus is None else gpus
    found = _inspect(config, gpus=on_gpus)
    estimates: list[MemoryEstimate | None] = []
    if found.model is not None and found.origin is not None:
        settled = found.config.model_copy(update={"policy": found.origin.policy})
        estimates = [
            generator_memory(settled, found.model, gpus=on_gpus),
            learner_memory(settled, found.model, teacher=found.teacher),
        ]
    return Plan(
        config=config,
        arithmetic=tuple(batch_arithmetic(config, prompts=found.prompts)),
        gpus=on_gpus,
        roles=tuple(roles(config, gpus=on_gpus)),
        memory=tuple(estimate for estimate in estimates if estimate is not None),
        problems=tuple(found.problems),
        warnings=tuple(advise(config, parameters=None if found.model is None else found.model.parameters)),
    )


def find_problems(config: RunConfig) -> list[Problem]:
    """Everything that can be known to be wrong before a run starts; `rlhf train` refuses it."""
    return _inspect(config, gpus=None).problems


def _machine_has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _inspect(config: RunConfig, *, gpus: bool | None) -> _Findings:
    try:
        here = outlined(config)
    except UserError as error:
        prompts, problems = prompts_problems(config, tokenize=False)
        return _Findings(config, None, None, None, prompts, [*cross_checks(config), *error.problems, *problems])
    found = _inspect_folders(here.config, gpus=gpus)
    return replace(found, problems=here.named(found.problems))


def _inspect_folders(config: RunConfig, *, gpus: bool | None) -> _Findings:
    problems = cross_checks(config) + validate_rewards(config.rewards, Path.cwd())
    origin, model = None, None
    try:
        origin = find_origin(config.policy)
        model = read_model(origin.policy.model, where="policy.model")
    except UserError as error:
        problems += error.problems
    if model is not None and model.context is not None and model.context < config.max_model_len:
        problems.append(
            Problem(
                "data.max_prompt_tokens",
                f"with sampling.max_tokens {config.max_model_len} tokens in all, but the model's context has "
                f"{model.context}; lower one of them",
            )
        )
    teacher = None
    if origin is not None and model is not None:
        problems += engine_problems(model, config.policy, gpus=gpus)
        teacher, companions = _companion_problems(config, origin)
        problems += companions
    prompts, data_problems = prompts_problems(config, tokenize=model is not None)
    return _Findings(config, origin, model, teacher, prompts, problems + data_problems)


def _companion_problems(config: RunConfig, origin: Origin) -> tuple[ModelInfo | None, list[Problem]]:
    """The teacher, and what is wrong with the models beside the policy and with where its adapter is to stand."""
    problems: list[Problem] = []
    teacher = None
    uses, policy = config.algorithm.capabilities, config.policy
    if uses.teacher is not None:
        try:
            where = "algorithm.teacher.model"
            teacher = read_model(uses.teacher.model, where=where)
            problems += context_problems(teacher, config.max_model_len, where=where)
            if (k := config.served_top_k) and teacher.vocabulary and k > teacher.vocabulary:
                message = f"{k}, but the teacher's vocabulary has {teacher.vocabulary} tokens; lower it"
                problems.append(Problem("algorithm.top_k", message))
            problems += vocabulary_problems(policy.model, uses.teacher.model, where=where)
        except UserError as error:
            problems += error.problems
    if uses.critic is not None:
        problems += _critic_problems(config, uses.critic, origin)
    if policy.train_type == "qlora":
        problems += quantization_problems("policy.train_type")
    elif uses.critic is not None and uses.critic.train_type == "qlora":
        problems += quantization_problems("algorithm.critic.train_type")
    if policy.lora.target_modules != "all-linear":
        for whose, name in _adapted_models(config, origin):
            problems += target_problems(name, policy.lora.target_modules, whose=whose)
    return teacher, problems


def _critic_problems(config: RunConfig, critic: CriticConfig, origin: Origin) -> list[Problem]:
    if critic.model is not None:
        try:
            return critic_problems(critic.model, config.policy.model, longest=config.max_model_len)
        except UserError as error:
            return list(error.problems)
    if origin.continued is None or critic.train_type != "qlora":
        return []
    message = "a copy of a policy that continues its adapter cannot be quantized; set lora, or policy.adapter: merge"
    return [Problem("algorithm.critic.train_type", message)]


def _adapted_models(config: RunConfig, origin: Origin) -> Iterator[tuple[str, str]]:
    """(what it is called, path) of each model that gets an adapter."""
    critic, policy = config.algorithm.capabilities.critic, config.policy
    if policy.train_type != "full":
        yield "the model", origin.policy.model
    if critic is not None and critic.train_type != "full":
        yield "the critic's model", critic.model or origin.policy.model


def roles(config: RunConfig, *, gpus: bool) -> list[Role]:
    """The processes of a run and what each asks of the cluster."""
    from actors.runtime.layout import layout

    seats = layout(config.placement, config.generators, config.learners, gpus=gpus)
    packed = "any, as few nodes as fit"
    found = [
        Role("driver", 1, 0, 0, "where the command runs"),
        Role("generator", config.generators.replicas, seats.generator_gpus, 1, packed),
        Role("learner", config.learners.workers, seats.learner_gpus, 1, packed),
    ]
    if config.serves_teacher:
        engine = config.generators.tensor_parallel if gpus else 0
        found.append(Role("teacher (engine)", 1, engine, 1, packed))
    for index, reward in enumerate(config.rewards):
        name = f"reward {reward.name or index}"
        if (needed := reward.resources) is not None:
            found.append(Role(f"{name} ({reward.type})", needed.replicas, needed.gpus, SCORER_CPUS, "any"))
    return found


def batch_arithmetic(config: RunConfig, *, prompts: int | None) -> list[str]:
    """What a step and the run consist of, in words; `prompts` is the number of usable ones, where known."""
    train, n = config.train, config.sampling.n
    samples = train.prompts_per_step * n
    updates = train.updates_per_step * train.epochs_per_step
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    sizes = sorted({samples // train.updates_per_step, -(-samples // train.updates_per_step)})
    each = " or ".join(map(str, sizes))
    lines = [
        f"{_count(train.prompts_per_step, 'prompt')} × {_count(n, 'completion')} = {_count(samples, 'sample')} a step",
    ]
    if extra := config.replaceable_groups:
        lines.append(f"up to {_count(extra, 'further prompt')} a step, for groups whose rewards are all equal")
    if updates == 1:
        lines.append(f"1 update of {_count(samples, 'sample')} a step: exactly on-policy")
    else:
        passes = f"{_count(train.epochs_per_step, 'pass', 'passes')} × {_count(train.updates_per_step, 'update')}"
        lines.append(f"{passes} = {updates} updates a step, each of {each} samples; the later ones are off-policy")
    budget = train.max_tokens_per_microbatch
    fit = (
        f"{budget // longest} of the longest samples" if budget >= longest else "fewer than one of the longest samples"
    )
    lines += [
        f"each update over {_count(config.learners.workers, 'rank')}, in micro-batches of at most {budget} tokens with "
        f"padding ({fit} of {config.data.max_prompt_tokens} + {config.sampling.max_tokens} = {longest} tokens); "
        "the cut does not change the result",
        f"at most {samples * config.sampling.max_tokens} tokens generated a step by "
        f"{_count(config.generators.replicas, 'engine')}",
    ]
    seen = train.steps * train.prompts_per_step
    epochs = "" if prompts is None else f" = {seen / prompts:.4g} epochs of {prompts}"
    lines.append(f"{_count(train.steps, 'step')} see {_count(seen, 'prompt')}{epochs}")
    lines.append(
        f"{_count(train.steps, 'step')} × {updates} = {_count(train.steps * updates, 'optimizer step')} in all"
    )
    if config.data.eval_prompts is not None:
        between = f", every {config.eval.every} steps" if config.eval.every else ""
        lines.append(f"evaluation with {_count(config.eval.n, 'completion')} a prompt: before{between}, and after")
    return lines


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: config, arithmetic, roles, memory (bytes), problems, warnings."""
    return {
        "config": plan.config.model_dump(mode="json"),
        "arithmetic": list(plan.arithmetic),
        "gpus": plan.gpus,
        "roles": [asdict(role) for role in plan.roles],
        "memory": [asdict(estimate) for estimate in plan.memory],
        "problems": problems_as_json(plan.problems),
        "warnings": problems_as_json(plan.warnings),
    }


def render(plan: Plan) -> Group:
    """The plan as a person reads it."""
    shown: list[RenderableType] = [Text("The batches", style="bold"), *(Text(f"  {line}") for line in plan.arithmetic)]
    table = Table("role", "count", "GPUs of each", "CPUs of each", "where")
    for role in plan.roles:
        table.add_row(role.name, str(role.count), f"{role.gpus:g}", f"{role.cpus:g}", role.node)
    shown += ["", table]
    if plan.memory:
        shown.append(_memory_table(plan.memory, device="GPU" if plan.gpus else "host"))
    tree = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    shown += ["", Text("The complete config", style="bold"), Text(tree)]
    if plan.problems:
        shown.append(Text(f"Problems ({len(plan.problems)})", style="bold red"))
        shown += [Text(f"  {problem.where}: {problem.message}") for problem in plan.problems]
    else:
        shown.append(Text("No problems found", style="bold green"))
    if plan.warnings:
        shown.append(Text(f"Warnings ({len(plan.warnings)}), non-blocking", style="bold yellow"))
        shown += [Text(f"  {warning.where}: {warning.message}", style="yellow") for warning in plan.warnings]
    return Group(*shown)


def _memory_table(estimates: Sequence[MemoryEstimate], *, device: str) -> Table:
    table = Table(
        "one process of", "memory of", "total", "parts", title="Memory (a rough estimate)", title_justify="left"
    )
    for estimate in estimates:
        for where, parts in ((device, estimate.device), ("host", estimate.host)):
            if parts:
                named = ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in parts.items())
                table.add_row(estimate.role, where, _size(sum(parts.values())), named)
    return table


def _size(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 2 else f"{size / 2**20:,.1f} MiB"
