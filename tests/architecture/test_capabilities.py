"""Nothing outside of `trainers/algorithms` asks which algorithm a config belongs to, only what the algorithm uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from trainers.algorithms.catalog import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "trainers" / "algorithms"
CLASSES = {"GRPOConfig", "PPOConfig", "GKDConfig"}


def offences(source: str) -> Iterator[int]:
    """Lines that import an algorithm's config class, or compare something with an algorithm's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & CLASSES:
            yield node.lineno
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [part for side in sides for part in (side.elts if isinstance(side, ast.Tuple) else [side])]
            if any(isinstance(part, ast.Constant) and part.value in ALGORITHMS for part in parts):
                yield node.lineno


def test_no_module_asks_for_an_algorithm_by_its_class_or_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("trainers", "actors", "cluster")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if OWN not in path.parents
        for line in offences(path.read_text())
    ]
    assert found == []


def test_offences_are_seen() -> None:
    source = 'from trainers.algorithms.config import KLConfig, PPOConfig\nif config.type in ("gkd", "ppo"):\n    pass\n'
    assert list(offences(source)) == [1, 2]
