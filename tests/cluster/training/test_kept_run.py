"""A run directory, checkpoint and config of an earlier version (`tests/fixtures/README.md`) load and resume."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run import RunConfig, load_config
from cluster.runs.checkpoint import DriverState, verify
from cluster.runs.directory import RunDirectory
from cluster.runs.resume import find_resumable
from cluster.runs.summary import details, find_run
from cluster.training.launch import choose_run
from tests.support.fake_runs import Run
from trainers.config import Config
from trainers.errors import UserError

KEPT = Path(__file__).parents[2] / "fixtures" / "kept_run"
STEP, STEPS = 4, 6


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of what was kept, as it would be if it had been made there."""
    copy = tmp_path / "kept"
    shutil.copytree(KEPT, copy)
    (saved,) = copy.glob("runs/*/config.yaml")
    text = saved.read_text(encoding="utf-8")
    for name in ("prompts.jsonl", "share.py:share"):
        text = text.replace(f": {name}\n", f": {copy / name}\n")
    saved.write_text(text, encoding="utf-8")
    return copy


def config_of(kept: Path) -> RunConfig:
    return load_config(kept / "config.yaml", [f"root={kept / 'runs'}"])


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the clock, of the steps after the checkpoint."""
    timed = ("time", "throughput/", "weights/sync_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if row["step"] > STEP]


def test_a_kept_run_is_shown(kept: Path) -> None:
    shown = details(find_run(kept / "runs", "20261128-172818-kept"))
    assert shown.run.state == "running"  # it was killed
    assert (shown.steps_recorded, shown.checkpoints, shown.metrics_problem) == (STEP, [STEP], None)


def test_a_kept_checkpoint_is_whole_and_its_state_is_read(kept: Path) -> None:
    run = find_run(kept / "runs", "2026")
    path = RunDirectory(run.path).checkpoints / "step-000004"
    assert verify(path).step == STEP
    run_again = Run(run.path, config_of(kept), normalize=True)
    state = run_again.state()
    assert isinstance(state, DriverState)
    assert (state.step, state.policy_version, state.kl) == (STEP, STEP, {"coef": 0.05})


@pytest.mark.parametrize("asked", ["auto", "by its directory"])
def test_a_kept_run_resumes_and_ends_as_one_that_began_today(kept: Path, asked: str) -> None:
    config = config_of(kept)
    (path,) = (kept / "runs").iterdir()
    found, resumed = choose_run(config, "auto" if asked == "auto" else str(path))
    assert (found.path, resumed) == (path, True)
    run = asyncio.run(Run(path, config, normalize=True).run())
    assert run.world.events[0].kind == "load"
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    fresh_path = kept / "fresh"
    fresh_path.mkdir()
    fresh = asyncio.run(Run(fresh_path, config, normalize=True).run())
    assert comparable(run.metrics) == comparable(fresh.metrics)
    assert run.world.weight == fresh.world.weight
    assert run.state() == fresh.state()


class Averaging(Config):
    decay: float = 0.999


class NextRunConfig(RunConfig):
    """As a later release may have it."""

    averaging: Averaging | None = None
    deterministic: bool = True


def test_a_later_release_with_more_keys_resumes_it(kept: Path) -> None:
    config = NextRunConfig.model_validate(config_of(kept).model_dump())
    found = find_resumable(kept / "runs", config)
    assert found is not None


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.learning_rate=0.25", "train.learning_rate: 0.5 in the saved run, 0.25 now"),
        ("algorithm.kl.coef=0", "algorithm.kl.coef: 0.05 in the saved run, 0.0 now"),
        ("train.steps=5", "train.steps: 6 in the saved run, 5 now"),
    ],
)
def test_a_real_difference_is_still_refused_by_name(
    kept: Path, caplog: pytest.LogCaptureFixture, override: str, difference: str
) -> None:
    config = load_config(kept / "config.yaml", [f"root={kept / 'runs'}", override])
    (path,) = (kept / "runs").iterdir()
    with pytest.raises(UserError, match=difference):
        choose_run(config, str(path))
    assert find_resumable(kept / "runs", config) is None
    assert difference in caplog.text
