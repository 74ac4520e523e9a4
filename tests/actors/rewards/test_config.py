"""The rewards' config: names, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from actors.rewards.config import RewardConfig, reward_names
from trainers.errors import UserError


def reward(**fields: Any) -> RewardConfig:
    return TypeAdapter(RewardConfig).validate_python(fields)


def test_default_names() -> None:
    configs = [
        reward(type="model", model="models/judge-1.5b/"),
        reward(type="model", model="org/helpful"),
        reward(type="function", path="rules/math.py:is_right"),
        reward(type="http", url="https://judge.example:8443/score"),
        reward(type="function", path="rules/math.py:is_right", name="watched", weight=0),
    ]
    assert reward_names(configs) == ("judge-1.5b", "helpful", "is_right", "judge.example", "watched")


def test_two_of_one_name_are_refused() -> None:
    configs = [reward(type="function", path=f"{file}.py:score") for file in "ab"]
    with pytest.raises(UserError, match=r"rewards\.1\.name: two rewards are called 'score'"):
        reward_names(configs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "function", "path": "rules.py"}, "expected file.py:name"),
        ({"type": "function", "path": "rules.txt:f"}, "expected file.py:name"),
        ({"type": "function", "path": "rules.py:not a name"}, "expected file.py:name"),
        ({"type": "http", "url": "judge:80"}, "expected http"),
        ({"type": "http", "url": "ftp://judge"}, "expected http"),
        ({"type": "http", "url": "http://judge:99999/"}, "range"),
        ({"type": "http", "url": "http://jud ge/"}, "expected http"),
        ({"type": "model", "model": "m", "max_tokens": 9, "max_batch_tokens": 8}, "one chat must fit"),
        ({"type": "model", "model": "m", "clip": (1, 1)}, "not below"),
        ({"type": "model", "model": "m", "timeout_s": 0}, "greater than 0"),
        ({"type": "model", "model": "m", "weight": float("nan")}, "finite"),
        ({"type": "model", "model": "m", "url": "http://judge"}, "Extra inputs"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        reward(**fields)


def test_every_key_has_its_help() -> None:
    schema = TypeAdapter(RewardConfig).json_schema()
    for kind in schema["$defs"].values():
        assert all("description" in field for field in kind["properties"].values()), kind["title"]


def test_reading_it_loads_nothing_heavy() -> None:
    code = "import sys, actors.rewards.config, actors.rewards.checks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "torch", "transformers", "httpx", "numpy"} & set(loaded)
