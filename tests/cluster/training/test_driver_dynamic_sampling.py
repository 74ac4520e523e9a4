"""Groups that teach nothing are replaced by further prompts; the driver against the fakes.

With one token a completion and two completions a group, many groups get equal rewards by chance alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.training.rollouts import RewardsFailedError
from tests.support.fake_runs import PER_STEP, STEPS, KilledError, Run, new_run, raising

DYNAMIC = {"algorithm": {"dynamic_sampling": 3}, "sampling": {"n": 2, "max_tokens": 1}}


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each prompt."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["sample_id"].rpartition("/")[0], []).append(row)
    return found


def flat(rows: list[dict[str, Any]]) -> bool:
    return len({row["reward"] for row in rows}) == 1


def written(run: Run) -> list[str]:
    return [str(event.what) for event in run.world.events if event.kind == "generate"]


async def test_flat_groups_are_replaced_within_the_budget_and_nothing_is_lost(tmp_path: Path) -> None:
    """Taken by hand in the stream's order: a flat group is replaced as long as the step's budget lasts."""
    run = await new_run(tmp_path, **DYNAMIC).run()
    taken = 0
    for step, line in enumerate(run.metrics, start=1):
        found = groups(run.rollouts(step))
        order = written(run)[taken : taken + len(found)]
        taken += len(found)
        assert sorted(order) == sorted(found)
        kept: list[str] = []
        replaced: list[str] = []
        for id in order:
            (replaced if flat(found[id]) and len(replaced) < 3 * PER_STEP else kept).append(id)
        assert len(kept) == PER_STEP
        assert list(found) == kept + replaced
        assert {id for id in found if found[id][0]["advantage"] is not None} == set(kept)
        assert line["advantage/replaced_groups"] == len(replaced)
        assert line["rollout/samples"] == 2 * len(found)
        assert line["reward/mean"] == pytest.approx(
            sum(r["reward"] for g in found.values() for r in g) / (2 * len(found))
        )
        assert line["advantage/zero_groups"] == sum(flat(found[id]) for id in kept) / PER_STEP
    assert taken == len(written(run)) > STEPS * PER_STEP
    assert sum(run.column("advantage/replaced_groups")) == taken - STEPS * PER_STEP


async def test_replaced_groups_do_not_hide_that_nothing_is_left_to_train_on(tmp_path: Path) -> None:
    """The one prompt that nobody can score is kept; those before it are flat, scored, and replaced."""
    always = {"algorithm": {"dynamic_sampling": 12}, "sampling": {"n": 1, "max_tokens": 1}}
    run = new_run(tmp_path, train={"prompts_per_step": 1, "max_failed_fraction": 0.5}, **always)
    run.scorer.cause_of = lambda request, _: "the judge fell ill" if request.prompt.line == 2 else None
    with pytest.raises(RewardsFailedError, match=r"1 of 1 samples of step 1 .* the judge fell ill"):
        await run.run()
    assert 1 < len(written(run)) <= 13


async def test_when_every_group_is_flat_the_budget_ends_the_search(tmp_path: Path) -> None:
    run = new_run(tmp_path, train={"steps": 2}, **DYNAMIC)
    run.world.weight = 50.0  # it always writes "b"
    await run.run()
    assert run.column("advantage/replaced_groups") == [3 * PER_STEP] * 2
    assert run.column("advantage/zero_groups") == [1.0, 1.0]
    assert len(written(run)) == 2 * (3 + 1) * PER_STEP


async def test_without_it_nothing_is_replaced(tmp_path: Path) -> None:
    run = await new_run(tmp_path, sampling=DYNAMIC["sampling"]).run()
    assert len(written(run)) == STEPS * PER_STEP
    assert all("advantage/replaced_groups" not in line for line in run.metrics)
    assert max(run.column("advantage/zero_groups")) > 0


async def test_a_run_that_is_killed_goes_on_with_the_same_prompts(tmp_path: Path) -> None:
    whole = await new_run(tmp_path, "whole", **DYNAMIC).run()
    killed = new_run(tmp_path, "killed", checkpoint={"every": 2}, **DYNAMIC)
    killed.at("update", 4, raising(KilledError()))
    with pytest.raises(KilledError):
        await killed.run()
    resumed = await new_run(tmp_path, "killed", checkpoint={"every": 2}, **DYNAMIC).run()
    assert resumed.recorded() == whole.recorded()
