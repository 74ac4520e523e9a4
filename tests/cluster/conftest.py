"""Shared fixtures: a service over a folder of runs, and `rlhf` commands that several tests look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.config.run import parse_config
from cluster.runs.directory import RunDirectory
from cluster.service.settings import Settings
from tests.support.demo_run import DemoRun, run_demo
from tests.support.served import TREE, serving
from tests.support.warm_rlhf import WarmRlhf


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path.resolve()


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> Settings:
    for name in ("models", "rewards", "data"):
        (tmp_path / name).mkdir()
    return Settings(
        root=root,
        model_roots=((tmp_path / "models").resolve(),),
        reward_roots=((tmp_path / "rewards").resolve(),),
        data_roots=(str((tmp_path / "data").resolve()), "s3://bucket/prompts"),
        page=tmp_path / "no-page",
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with serving(settings) as client:
        yield client


@pytest.fixture
def make_run(root: Path) -> Callable[..., RunDirectory]:
    """A run as the command line leaves it; `metrics` are its steps."""

    def make(name: str = "run", *, metrics: list[dict[str, Any]] | None = None, **changes: Any) -> RunDirectory:
        config = parse_config({**TREE, "name": name, "root": str(root), **changes})
        run = RunDirectory.create(root, name, config)
        if metrics:
            run.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return run

    return make


@pytest.fixture(scope="session")
def warm_rlhf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRlhf]:
    """Runs `rlhf` commands on one Ray and one Ray Serve."""
    warm = WarmRlhf(tmp_path_factory.mktemp("warm_rlhf"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`rlhf demo`, as a user starts it."""
    return run_demo(tmp_path_factory.mktemp("demo") / "runs")
