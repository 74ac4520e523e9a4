"""Which class implements which `rewards.*.type`. A new kind of reward is a file, its config and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.rewards.config import RewardConfig
from actors.rewards.function_source import FunctionSource
from actors.rewards.http_source import HttpSource
from actors.rewards.model_source import ModelSource
from actors.rewards.source import RewardSource

SOURCES: dict[str, Callable[[Any, str, Path], RewardSource]] = {
    "model": ModelSource,
    "function": FunctionSource,
    "http": HttpSource,
}


def make_source(config: RewardConfig, *, name: str, base_dir: Path) -> RewardSource:
    """The source of a reward called `name`, not yet started; relative paths count from `base_dir`."""
    return SOURCES[config.type](config, name, base_dir)
