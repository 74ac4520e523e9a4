"""The config of the rewards, distinguished by `type`. It knows pydantic only, so that the command line's help, the plan
and the service can read it without an engine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trainers.config import Config
from trainers.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class Resources:
    """What a reward asks of the cluster: replicas, and the GPUs of each."""

    replicas: int = 1
    gpus: float = 0


class RewardSection(Config):
    """What the config of every kind of reward has."""

    type: str
    """Selects the kind of reward."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum that is trained on; 0 = monitored, not trained on."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """What its metric is called (`reward/<name>`); null = the model's folder, the function or the host."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest wait for one answer: one call of a function, one group from a model or over HTTP."""
    retries: int = Field(default=2, ge=0)
    """Further tries after a failure that may pass: a replica died, HTTP 429 or 5xx, connection refused."""
    clip: tuple[float, float] | None = None
    """Lowest and highest score that enters the sum, after `normalize`; null = no limits."""
    normalize: bool = False
    """Subtract the running mean and divide by the running standard deviation of all scores before the current step."""

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"the lower limit {clip[0]} is not below the upper limit {clip[1]}")
        return clip

    @property
    def default_name(self) -> str:
        """The name of a reward whose config gives none."""
        return self.type

    @property
    def resources(self) -> Resources | None:
        """What it asks of the cluster; None: nothing."""
        return None

    @property
    def learned_max_tokens(self) -> int | None:
        """Longest chat of a trained model, whose scores a policy can exploit; None: scores come from elsewhere."""
        return None


class ModelReward(RewardSection):
    """A sequence-classification model with one label scores the complete chat."""

    type: Literal["model"]
    """Selects this kind of reward."""
    model: str = Field(min_length=1)
    """Path, address in a store or hub id of a sequence-classification model with one label, with its tokenizer."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; groups are spread over them."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one replica (a fraction shares one); 0 = on the CPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one replica; null = half of this machine's cores, since generators write at the same time."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of weights and arithmetic."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest chat that is scored; a longer one cannot be scored, it is never cut."""
    max_batch_tokens: int = Field(default=32768, ge=1)
    """Token budget of one forward pass, padding included."""
    max_wait_ms: float = Field(default=2, ge=0)
    """How long a batch that is not full waits for more."""

    @model_validator(mode="after")
    def _longest_fits_a_batch(self) -> ModelReward:
        if self.max_batch_tokens < self.max_tokens:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_tokens {self.max_tokens}; "
                "one chat must fit into a batch"
            )
        return self

    @property
    def default_name(self) -> str:
        """The last part of the model's path or id."""
        return PurePath(self.model).name or self.model

    @property
    def resources(self) -> Resources:
        """The replicas of the model."""
        return Resources(self.replicas, self.gpus)

    @property
    def learned_max_tokens(self) -> int:
        """See `RewardSection`."""
        return self.max_tokens


class FunctionReward(RewardSection):
    """A Python function scores each completion, in processes of its own."""

    type: Literal["function"]
    """Selects this kind of reward."""
    path: str
    """The function as `file.py:name`; the path counts from the config file's folder."""
    workers: int = Field(default=1, ge=1)
    """Processes that call the function."""

    @field_validator("path")
    @classmethod
    def _file_and_name(cls, path: str) -> str:
        file, _, name = path.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError(f"expected file.py:name, found {path!r}")
        return path

    @property
    def file(self) -> str:
        """The file's path, as written."""
        return self.path.rpartition(":")[0]

    @property
    def function(self) -> str:
        """The function's name."""
        return self.path.rpartition(":")[2]

    @property
    def default_name(self) -> str:
        """The function's name."""
        return self.function

    @property
    def resources(self) -> Resources:
        """One replica, which starts the processes."""
        return Resources()


class HttpReward(RewardSection):
    """A server scores each group: POST {prompts, completions, columns} answers {"rewards": [number or null, …]}."""

    type: Literal["http"]
    """Selects this kind of reward."""
    url: str
    """Where the server takes POST requests."""

    @field_validator("url")
    @classmethod
    def _http_url(cls, url: str) -> str:
        parts = urlsplit(url)  # ValueError of its own for a bad IPv6 address
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
            raise ValueError(f"expected http://host… or https://host…, found {url!r}")
        _ = parts.port  # ValueError if it is not a number in range
        return url

    @property
    def default_name(self) -> str:
        """The server's host."""
        return urlsplit(self.url).hostname or self.url


RewardConfig: TypeAlias = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="type")]


def reward_names(configs: Sequence[RewardConfig]) -> tuple[str, ...]:
    """The name of each reward, by which its metrics and scores go.

    >>> reward_names([FunctionReward(type="function", path="rules.py:is_right"), HttpReward(type="http", url="http://judge:80/s")])
    ('is_right', 'judge')

    Raises:
        UserError: two rewards would share a name.
    """
    names = tuple(config.name or config.default_name for config in configs)
    problems = [
        Problem(f"rewards.{i}.name", f"two rewards are called {name!r}; give each a `name` of its own")
        for i, name in enumerate(names)
        if Counter(names[: i + 1])[name] > 1
    ]
    if problems:
        raise UserError(problems)
    return names
