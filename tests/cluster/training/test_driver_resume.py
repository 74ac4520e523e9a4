"""The driver against the fakes: after a kill or a stop, a run goes on as if nothing had been."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.runs.checkpoint import checkpoint_steps
from cluster.training.driver import Interrupted
from tests.support.fake_runs import (
    PER_STEP,
    SAMPLES,
    STEPS,
    KilledError,
    Run,
    forever,
    new_run,
    nothing_is_under_way,
    raising,
)

# --- kills and stops --------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "evaluate": 2,
    "normalize": True,
    "eval": {"every": 2, "n": 2},
    "checkpoint": {"every": 2},
    "train": {"updates_per_step": 2},  # cut by a seed of its own in each step
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    return asyncio.run(new_run(tmp_path_factory.mktemp("whole")).run())


@pytest.fixture(scope="module")
def whole_with_everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return asyncio.run(new_run(tmp_path_factory.mktemp("whole"), **EVERYTHING).run())


@pytest.mark.parametrize(
    ("kind", "nth", "steps_kept"),
    [
        ("generate", 1, 0),  # in the first evaluation
        ("generate", 2 + 8 + 4 + 1, 4),  # in step 5, after three evaluations and four steps
        ("scored", 2 + 8 + 4 + 2, 4),
        ("annotate", 5, 4),
        ("update", 6, 4),
        ("publish", 1, 0),
        ("publish", 1 + 5, 4),
        ("save", 2, 2),  # of step 4: a checkpoint that was not finished does not exist
        ("save", 3, 4),  # of step 6, the last
    ],
)
async def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, whole_with_everything: Run, kind: str, nth: int, steps_kept: int
) -> None:
    killed = new_run(tmp_path, **EVERYTHING)
    killed.at(kind, nth, raising(KilledError()))
    with pytest.raises(KilledError):
        await killed.run()
    assert max(checkpoint_steps(killed.checkpoints.directory), default=0) == steps_kept
    resumed = await new_run(tmp_path, **EVERYTHING).run()
    assert resumed.world.events[0].kind == ("load" if steps_kept else "publish")
    assert resumed.recorded() == whole_with_everything.recorded()
    assert resumed.world.weight == whole_with_everything.world.weight
    assert resumed.state() == whole_with_everything.state()


async def test_a_stop_during_generation_gives_the_step_up_and_saves_the_last_one(tmp_path: Path, whole: Run) -> None:
    stopped = new_run(tmp_path)

    async def stop_and_hang() -> None:
        stopped.driver.stop()
        await forever()

    stopped.at("generate", 3 * PER_STEP + 1, stop_and_hang)
    with pytest.raises(Interrupted) as caught:
        await stopped.run()
    assert caught.value.step == stopped.driver.step == 3
    assert checkpoint_steps(stopped.checkpoints.directory) == [3]
    assert stopped.column("step") == [1, 2, 3]
    assert await nothing_is_under_way()
    resumed = await new_run(tmp_path).run()
    assert resumed.recorded() == whole.recorded()


@pytest.mark.parametrize(("kind", "nth"), [("turn", 5), ("annotate", 3), ("update", 3), ("turn", 6), ("publish", 4)])
async def test_a_stop_after_generation_finishes_the_step(tmp_path: Path, whole: Run, kind: str, nth: int) -> None:
    stopped = new_run(tmp_path)
    stopped.at(kind, nth, stopped.driver.stop)
    with pytest.raises(Interrupted, match="after step 3"):
        await stopped.run()
    assert checkpoint_steps(stopped.checkpoints.directory) == [3]
    assert stopped.column("step") == [1, 2, 3]
    assert len(stopped.rollouts(3)) == SAMPLES
    resumed = await new_run(tmp_path).run()
    assert resumed.recorded() == whole.recorded()


async def test_a_stop_during_an_evaluation_loses_nothing_of_its_step(
    tmp_path: Path, whole_with_everything: Run
) -> None:
    stopped = new_run(tmp_path, **EVERYTHING)
    stopped.at("generate", 2 + 2 * PER_STEP + 1, stopped.driver.stop)  # the evaluation after step 2
    with pytest.raises(Interrupted, match="after step 2"):
        await stopped.run()
    assert stopped.column("step") == [0, 1, 2]
    assert "eval/reward_mean" in stopped.metrics[-1]
    resumed = await new_run(tmp_path, **EVERYTHING).run()
    assert resumed.recorded() == whole_with_everything.recorded()


async def test_a_stop_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path, evaluate=1)
    run.at("generate", 1, run.driver.stop)
    run.driver.stop()
    with pytest.raises(Interrupted, match="after step 0"):
        await run.run()
    assert run.metrics == []
    assert run.checkpoints.latest() is None


async def test_a_stop_in_the_last_step_comes_too_late(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.at("update", STEPS, run.driver.stop)
    await run.run()
    assert run.column("step") == list(range(1, STEPS + 1))


async def test_a_finished_run_has_nothing_left_to_do(whole: Run) -> None:
    before = whole.recorded()
    again = await new_run(whole.directory.parent).run()
    assert [e.kind for e in again.world.events] == ["load", "publish"]
    assert again.recorded() == before


# --- the reward normalizer's statistics -------------------------------------------------------------------------------


async def test_scores_enter_the_running_statistics_once_a_step(tmp_path: Path) -> None:
    run = await new_run(tmp_path, **EVERYTHING).run()
    assert run.state().scorer["statistics"]["count"] == STEPS * SAMPLES  # those of the evaluations do not
    first = [row["reward"] for row in run.rollouts(1)]
    shares = [dict(row["rewards"])["share"] for step in (1, 2) for row in run.rollouts(step)]
    assert first == shares[:SAMPLES]  # nothing was seen before
    mean, std = np.mean(first), np.std(first, ddof=1)
    second = [row["reward"] for row in run.rollouts(2)]
    assert second == pytest.approx((np.array(shares[SAMPLES:]) - mean) / std, rel=1e-9)


async def test_a_stop_during_generation_leaves_the_scores_of_its_step_out(tmp_path: Path) -> None:
    stopped = new_run(tmp_path, normalize=True)

    async def stop_and_hang() -> None:
        stopped.driver.stop()
        await forever()

    stopped.at("generate", 3 * PER_STEP + 2, stop_and_hang)  # the other group of step 4 is scored
    with pytest.raises(Interrupted):
        await stopped.run()
    assert [e.kind for e in stopped.world.events].count("scored") == 3 * PER_STEP + 1
    assert stopped.state().scorer["statistics"]["count"] == 3 * SAMPLES
