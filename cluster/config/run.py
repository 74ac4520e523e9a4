"""The complete config of a run: every layer's sections composed, read from YAML, checked as one.

It knows pydantic and the layers' config modules, no engine: importing it loads no torch and no ray.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from actors.config import GeneratorConfig, LearnerConfig, Placement, PolicyConfig, SyncConfig
from actors.rewards.config import RewardConfig
from cluster.config.field_errors import FieldError, field_errors
from cluster.config.schema import Node, Schema
from cluster.config.tree import Tree, apply_overrides, leaves, read_yaml, set_path, strings_at
from trainers.algorithms.config import AlgorithmConfig
from trainers.config import Config, SamplingConfig, TrainConfig
from trainers.data.config import DataConfig
from trainers.errors import Problem, UserError
from trainers.model_folder import is_path


class CheckpointConfig(Config):
    """What is kept to resume from."""

    every: int = Field(default=20, ge=0)
    """Steps between checkpoints; 0 = only at the end and on interruption."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class EvalConfig(Config):
    """Measuring on held-out prompts; without `data.eval_prompts` there is none."""

    every: int = Field(default=10, ge=0)
    """Steps between evaluations, besides those before the first step and after the last; 0 = only these."""
    n: int = Field(default=4, ge=1)
    """Completions for each prompt, sampled as in training."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use only so many of the prompts, the first ones; null = all."""


class LoggingConfig(Config):
    """What is written beside `metrics.jsonl`."""

    tensorboard: bool = True
    """Write the metrics for TensorBoard too."""
    samples_every: int = Field(default=1, ge=0)
    """Steps between Parquet files that hold every sample of a step; 0 = none."""

    @property
    def sinks(self) -> tuple[str, ...]:
        """The names of the metrics sinks; everything else reads `metrics.jsonl`."""
        return ("jsonl", "tensorboard") if self.tensorboard else ("jsonl",)


class TimeoutsConfig(Config):
    """Deadlines: a phase that takes longer ends the run with the phase's name, instead of a hang."""

    start_s: float = Field(default=1800, gt=0)
    """Seconds for all roles to start, model loading included."""
    generate_s: float = Field(default=1800, gt=0)
    """Seconds for the completions of one prompt, the wait for an engine included."""
    reward_s: float = Field(default=1800, gt=0)
    """Seconds for the scores of one prompt's completions by all rewards, their tries and waits included."""
    update_s: float = Field(default=3600, gt=0)
    """Seconds for the log-probabilities of one step, and again for its updates."""
    sync_s: float = Field(default=600, gt=0)
    """Seconds for the new weights to reach every generator and be proved."""
    save_s: float = Field(default=1800, gt=0)
    """Seconds to write or read a checkpoint or the model."""


class RunConfig(Config):
    """The complete config of a run."""

    name: str = Field(default="run", max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the run is called; the run's id begins with it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides everything that is drawn: order of prompts, sampling, dropout."""
    root: str = Field(default="runs", min_length=1)
    """Folder of all runs' directories; a relative one counts from where the command is run."""
    policy: PolicyConfig
    """The model that is trained."""
    data: DataConfig
    """The prompts."""
    rewards: tuple[RewardConfig, ...] = ()
    """What judges the completions; the weighted sum of all is trained on. gkd needs none, and watches those given."""
    algorithm: AlgorithmConfig
    """How the policy learns from the scores."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    train: TrainConfig = TrainConfig()
    """Steps, batches, optimizer."""
    generators: GeneratorConfig = GeneratorConfig()
    """The engines that write completions."""
    learners: LearnerConfig = LearnerConfig()
    """The ranks that train."""
    placement: Placement = "split"
    """Generators and learners on GPUs of their own, or in turn on the same ones."""
    sync: SyncConfig = SyncConfig()
    """How weights get from learners to generators, and the proof of it."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept to resume from."""
    eval: EvalConfig = EvalConfig()
    """Measuring on held-out prompts."""
    logging: LoggingConfig = LoggingConfig()
    """What is written beside metrics.jsonl."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """Deadlines of the phases."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence of an engine, in tokens."""
        return self.generators.max_model_len or self.data.max_prompt_tokens + self.sampling.max_tokens

    @property
    def serves_teacher(self) -> bool:
        """Whether the teacher needs an engine: to write the completions of some steps (unless the data's responses
        replace them), or to give its log-probabilities."""
        uses = self.algorithm.capabilities
        writes = uses.policy_share < 1 and not self.data.strip_responses
        return uses.teacher is not None and (uses.teacher.served or writes)

    @property
    def scored_rewards(self) -> tuple[RewardConfig, ...]:
        """The rewards as they are asked for: an algorithm that does not learn from rewards monitors all."""
        if self.algorithm.capabilities.learns_from_rewards:
            return self.rewards
        return tuple(reward.model_copy(update={"weight": 0.0}) for reward in self.rewards)

    @property
    def served_top_k(self) -> int | None:
        """How many of the likeliest tokens the teacher's engine gives; None if the learners hold the teacher."""
        teacher = self.algorithm.capabilities.teacher
        return teacher.top_k if teacher is not None and teacher.served else None

    @property
    def learns_from_data(self) -> bool:
        """Whether the data's responses are the completions in the steps that the policy does not write."""
        return self.algorithm.capabilities.policy_share < 1 and self.data.strip_responses

    @property
    def critic_steps(self) -> int:
        """Steps at the beginning in which only the critic learns."""
        critic = self.algorithm.capabilities.critic
        return 0 if critic is None else critic.warmup_steps

    @property
    def policy_updates(self) -> int:
        """Optimizer steps of the policy in the complete run; its schedules are made for so many."""
        train = self.train
        return max(train.steps - self.critic_steps, 0) * train.updates_per_step * train.epochs_per_step

    @property
    def replaceable_groups(self) -> int:
        """Groups at most for which a step may write others, because their rewards are all equal."""
        return self.algorithm.capabilities.replaceable_groups * self.train.prompts_per_step


REFUSED_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Sampling options of other systems that are refused with the reason, not only as unknown."""

FILES = ("data.prompts", "data.eval_prompts")
MODELS = ("policy.model", "rewards.*.model", "algorithm.critic.model", "algorithm.teacher.model")
FUNCTIONS = ("rewards.*.path",)
"""Keys that hold paths: of files; of model folders unless a hub id; of functions, `file.py:name`."""


@cache
def run_schema() -> Schema:
    """The schema of RunConfig."""
    return Schema(RunConfig.model_json_schema())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a YAML file and `key.path=value` overrides make; UserError carries every problem.

    Relative paths in the file count from the file's folder, those in overrides from the working directory.
    """
    file = Path(path)
    tree = resolve_paths(_read_tree(file), file.parent)
    return parse_config(resolve_paths(apply_overrides(tree, overrides), Path.cwd()))


def _read_tree(file: Path) -> Tree:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError([Problem(str(file), "no such file; give the path of a config file")]) from None
    except IsADirectoryError:
        raise UserError([Problem(str(file), "is a folder; give the path of a config file in it")]) from None
    except UnicodeDecodeError as error:
        raise UserError([Problem(str(file), f"is not UTF-8 text (byte {error.start}); save it as UTF-8")]) from None
    except OSError as error:
        raise UserError([Problem(str(file), f"cannot be read: {error.strerror}")]) from None
    tree = read_yaml(text, source=str(file))
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_found(tree)}"
        raise UserError([Problem(str(file), f"{found}; expected the sections policy, data, rewards, algorithm, …")])
    return tree


def resolve_paths(tree: Mapping[str, Any], base: Path) -> Tree:
    """The tree with its relative paths made absolute from `base`.

    A model's name that is not a path (`trainers.model_folder.is_path`) stays, as the id of a model on the hub.
    """

    def file(value: str) -> str:
        return value if value == "-" or "://" in value else os.path.abspath(base / Path(value).expanduser())

    def model(value: str) -> str:
        return file(value) if is_path(value, base) else value

    def function(value: str) -> str:
        path, colon, name = value.rpartition(":")
        return f"{file(path)}:{name}" if colon and path else value

    new: Tree = dict(tree)
    for patterns, change in ((FILES, file), (MODELS, model), (FUNCTIONS, function)):
        for where, value in [found for pattern in patterns for found in strings_at(tree, pattern) if found[1]]:
            new = set_path(new, where, change(value))
    return new


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """The config that a tree of plain values (from YAML or JSON) means; UserError carries every problem.

    Strict: "5" and true are not integers; a list may stand for a tuple and an integer for a float.
    """
    problems = [
        Problem(path, f"expected a finite number, found {value}")
        for path, value in leaves(tree)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    try:
        config = RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        known = {problem.where for problem in problems}
        raise UserError([*problems, *(p for p in _problems(error) if p.where not in known)]) from None
    if problems:
        raise UserError(problems)
    return config


def _problems(error: ValidationError) -> list[Problem]:
    """One problem for each place, in words, in the order of the schema."""
    found: dict[str, str] = {}
    for item in field_errors(error.errors(include_url=False)):
        where, node = run_schema().locate(item.location)
        if item.kind == "too_short" and item.given:
            continue  # its elements are wrong, and have problems of their own
        if item.kind in ("union_tag_invalid", "union_tag_not_found"):
            found.setdefault(f"{where}.type", _wrong_tag(item, node))
        elif item.kind == "extra_forbidden":
            found.setdefault(where, _unknown_key(where))
        elif item.kind == "value_error":
            found.setdefault(where, item.message.removeprefix("Value error, "))
        else:
            found.setdefault(where, _wrong_value(item, where, node))
    return [Problem(where, message) for where, message in found.items()]


def _unknown_key(where: str) -> str:
    word = where.rpartition(".")[2]
    if word in REFUSED_SAMPLING:
        return (
            f"{word} is refused: the generator would sample from another distribution than the one whose "
            "log-probabilities the trainer computes, and every update would be biased; use sampling.temperature"
        )
    nearest = run_schema().nearest(where)
    return f"unknown key; did you mean {' or '.join(nearest)}?" if nearest else "unknown key; `rlhf plan` lists all"


def _wrong_tag(item: FieldError, node: Node | None) -> str:
    tags = ", ".join(run_schema().alternatives(node) if node is not None else ())
    given = item.given.get("type") if isinstance(item.given, dict) else None
    return (
        f"required, but missing; expected one of {tags}"
        if given is None
        else f"expected one of {tags}, found {_found(given)}"
    )


def _wrong_value(item: FieldError, where: str, node: Node | None) -> str:
    expected = run_schema().describe(node) if node is not None else item.message
    if item.kind == "missing" and where.rpartition(".")[2] == item.location[-1]:
        return f"required, but missing; expected {expected}"
    if item.kind == "string_pattern_mismatch":
        allowed = "letters, digits, '.', '_' and '-', a letter or digit first"
        return f"expected {allowed}, found {_found(item.given)}"
    if item.kind in ("too_short", "string_too_short"):
        return f"is empty; expected {expected}"
    return f"expected {expected}, found {_found(item.given)}"


def _found(value: Any) -> str:
    """A value as a user would name it."""
    if isinstance(value, Mapping):
        return f"a section ({', '.join(map(str, value))})" if value else "an empty section"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    kind = "the text " if isinstance(value, str) else "the list " if isinstance(value, list) else ""
    text = json.dumps(value, ensure_ascii=False)
    return f"{kind}{text[:60]}{'…' if len(text) > 60 else ''}"


def problems_as_json(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """As the HTTP API's error details have them."""
    return [{"path": problem.where, "message": problem.message} for problem in problems]
