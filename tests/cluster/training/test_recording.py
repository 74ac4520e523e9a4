"""The phase that a run is in, what it waits for, and the seconds of both."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from actors.runtime.actor_group import RoleError
from cluster.config.run import parse_config
from cluster.runs.directory import RunDirectory, RunError
from cluster.training.launch import recorded_error
from cluster.training.progress import Lines
from cluster.training.recording import Recording
from tests.support.fake_runs import Silent


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    sections = {"policy": {"model": "m"}, "data": {"prompts": "p"}, "algorithm": {"type": "grpo"}}
    return RunDirectory.create(tmp_path, "run", parse_config(sections))


class Waits(Silent):
    """Remembers what was waited for, without the times."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[list[str]] = []

    def waiting(self, since: Mapping[str, float]) -> None:
        self.waits.append(sorted(since))


def test_parts_overlap_and_end_one_by_one_also_when_one_fails(run: RunDirectory) -> None:
    seen = Waits()
    recording = Recording(seen, run)
    with recording.part("learner"), pytest.raises(ZeroDivisionError), recording.part("generator"):
        raise ZeroDivisionError
    assert seen.waits == [["learner"], ["generator", "learner"], ["learner"], []]
    assert set(recording.parts) == {"learner", "generator"}
    assert recording.parts["learner"] >= recording.parts["generator"]


def test_the_seconds_of_the_start_are_shown_when_the_loop_begins(run: RunDirectory) -> None:
    output = io.StringIO()
    times = iter([100.0, 100.0, 101.0, 105.5, 107.25, 107.5])  # made, phase, part, its end, loop, end
    lines = Lines(Console(file=output, width=200))
    recording = Recording(lines, run, spent={"check config": 1.25}, clock=lambda: next(times))
    recording.phase("start roles")
    with recording.part("loading learner 0"):
        pass
    recording.start(steps=5, done=0)
    recording.close()
    assert output.getvalue().splitlines() == [
        "start roles …",
        "ready after 8.5 s: check config 1.2 s, start roles 7.2 s",
        "of these at the same time: loading learner 0 4.5 s",
        "training: 5 steps",
    ]


def test_a_failure_has_the_phase_that_the_run_is_in(run: RunDirectory) -> None:
    recording = Recording(Silent(), run)
    assert recording.current == "start"
    for phase in ("fetch models", "checkpoint", "export"):
        recording.phase(phase)
        recorded = recorded_error(OSError("no space"), phase=recording.current)
        assert recorded == RunError(role="driver", phase=phase, type="OSError", message="no space")


def test_a_role_knows_its_own_phase() -> None:
    error = RoleError(role="learner", rank=1, phase="update", kind="ValueError", message="NaN", log="l.log")
    assert recorded_error(error, phase="train") == RunError(
        role="learner", rank=1, phase="update", type="ValueError", message="NaN", log="l.log"
    )
