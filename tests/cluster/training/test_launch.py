"""Which run a command works in, and how a failure ends it; nothing here starts Ray."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config.run import RunConfig, parse_config
from cluster.runs.directory import RunDirectory
from cluster.training import launch
from trainers.errors import UserError


def config_of(root: Path, *, steps: int) -> RunConfig:
    return parse_config(
        {
            "root": str(root),
            "policy": {"model": "memory://models/none"},
            "data": {"prompts": "p.jsonl"},
            "rewards": [{"type": "http", "url": "http://judge/score"}],
            "algorithm": {"type": "grpo"},
            "train": {"steps": steps},
        }
    )


def files(run: RunDirectory) -> dict[str, bytes]:
    return {name: (run.path / name).read_bytes() for name in ("config.yaml", "run.json")}


def test_a_run_that_another_process_runs_is_left_as_it_is(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "run", config_of(tmp_path, steps=5))
    run.update(state="running", step=3)
    before = files(run)
    more = config_of(tmp_path, steps=9)
    with run.locked():
        with pytest.raises(UserError, match="is running this run"):
            launch.train(more, resume=str(run.path), console=Console(file=io.StringIO()))
        assert files(run) == before


def test_a_run_that_is_free_takes_over_what_a_resume_may_change(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "run", config_of(tmp_path, steps=5))
    with pytest.raises(UserError, match=r"policy\.model"):  # which no store has
        launch.train(config_of(tmp_path, steps=9), resume=str(run.path), console=Console(file=io.StringIO()))
    assert run.config()["train"]["steps"] == 9
    record = json.loads((run.path / "run.json").read_text())
    assert (record["steps"], record["state"]) == (9, "failed")
    assert (record["error"]["type"], record["error"]["phase"]) == ("UserError", "fetch models")


def test_the_first_failure_within_groups_of_them() -> None:
    groups = ExceptionGroup("outer", [ExceptionGroup("inner", [ValueError("first")]), KeyError("second")])
    assert [type(error) for error in launch.flattened(groups)] == [ValueError, KeyError]
