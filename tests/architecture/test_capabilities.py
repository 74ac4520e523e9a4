"""Nothing outside of its own package asks which algorithm or reward a config belongs to, only what it uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.rewards.catalog import SOURCES
from trainers.algorithms.catalog import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "trainers/algorithms": {"GRPOConfig", "PPOConfig", "GKDConfig"},
    "actors/rewards": {"ModelReward", "FunctionReward", "HttpReward"},
}
NAMES = {"trainers/algorithms": set(ALGORITHMS), "actors/rewards": set(SOURCES)}


def offences(source: str, classes: set[str], names: set[str]) -> Iterator[int]:
    """Lines that import one of the config classes, or compare something with one of the names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & classes:
            yield node.lineno
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [part for side in sides for part in (side.elts if isinstance(side, ast.Tuple) else [side])]
            if any(isinstance(part, ast.Constant) and part.value in names for part in parts):
                yield node.lineno


@pytest.mark.parametrize("own", CLASSES)
def test_no_module_asks_for_a_class_or_a_name(own: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("trainers", "actors", "cluster")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ROOT / own not in path.parents
        for line in offences(
            path.read_text(), CLASSES[own], NAMES[own] - {"model", "http"}
        )  # words with other meanings
    ]
    assert found == []


@pytest.mark.parametrize("name", ["scorer.py", "checks.py", "ray_serve.py"])
def test_what_serves_all_rewards_names_none(name: str) -> None:
    source = (ROOT / "actors" / "rewards" / name).read_text()
    assert list(offences(source, CLASSES["actors/rewards"], NAMES["actors/rewards"])) == []


def test_offences_are_seen() -> None:
    source = 'from trainers.algorithms.config import KLConfig, PPOConfig\nif config.type in ("gkd", "ppo"):\n    pass\n'
    assert list(offences(source, {"PPOConfig"}, {"ppo"})) == [1, 2]
