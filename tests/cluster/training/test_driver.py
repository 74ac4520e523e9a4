"""The driver against the fakes: what happens in which order, what is recorded, what a failure leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.fakes import Event
from actors.messages import UpdateOptions
from actors.runtime.actor_group import RoleError
from cluster.config.run import RunConfig
from cluster.runs.checkpoint import checkpoint_steps
from cluster.training import driver
from cluster.training.driver import LogprobGapError
from cluster.training.rollouts import RewardsFailedError
from tests.support.fake_runs import (
    PER_STEP,
    PROMPTS,
    SAMPLES,
    STEPS,
    KilledError,
    N,
    forever,
    new_run,
    nothing_is_under_way,
    raising,
)
from trainers.seeds import derive_seed
from trainers.types import Float32Array

# --- the order of a step ----------------------------------------------------------------------------------------------


async def test_a_step_happens_in_order(tmp_path: Path) -> None:
    run = await new_run(tmp_path, train={"steps": 2}).run()
    kinds = [event.kind for event in run.world.events]
    assert run.world.events[0] == Event("publish", 0)
    assert kinds[-1] == "save"  # at the end, whatever checkpoint.every says
    one = kinds[1 : kinds.index("publish", 1) + 1]
    assert sorted(one[:8]) == ["generate", "generate", "score", "score", "scored", "scored", "written", "written"]
    assert one[8:] == ["turn", "annotate", "update", "turn", "publish"]
    assert kinds == ["publish", *one, *one, "save"]
    assert [e.what for e in run.world.events if e.kind == "turn"] == ["learners", "generators"] * 2
    assert run.progress.phases == ["sync", *["generate", "annotate", "train", "sync"] * 2, "checkpoint"]


async def test_a_group_is_scored_while_another_is_still_written(tmp_path: Path) -> None:
    run = new_run(tmp_path, train={"steps": 1})
    first_is_scored = asyncio.Event()

    async def interfere(event: Event) -> None:
        if event.kind == "scored":
            first_is_scored.set()
        elif event.kind == "generate" and sum(e.kind == "generate" for e in run.world.events) == 1:
            await first_is_scored.wait()

    run.world.interfere = interfere
    async with asyncio.timeout(10):
        await run.run()


async def test_every_prompt_is_taken_once_in_the_streams_order(tmp_path: Path) -> None:
    run = await new_run(tmp_path).run()
    ids = [str(e.what) for e in run.world.events if e.kind == "generate"]
    assert ids == [f"e{i // PROMPTS}-{i % PROMPTS:06d}" for i in range(STEPS * PER_STEP)]
    for step in range(1, STEPS + 1):
        rows = run.rollouts(step)
        assert [row["sample_id"] for row in rows] == [
            f"{id}/{i}" for id in ids[(step - 1) * PER_STEP : step * PER_STEP] for i in range(N)
        ]
        assert {row["step"] for row in rows} == {step}


async def test_every_completion_is_of_the_version_before_the_update(tmp_path: Path) -> None:
    run = await new_run(tmp_path).run()
    assert [e.what for e in run.world.events if e.kind == "publish"] == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert {row["policy_version"] for row in run.rollouts(step)} == {step - 1}
    assert run.column("rollout/staleness_max") == [0] * STEPS
    assert run.column("policy/version") == list(range(1, STEPS + 1))
    assert max(run.column("rollout/logprob_gap_max")) < 1e-6  # the weights that wrote are those that are trained


async def test_the_result_does_not_depend_on_which_group_is_finished_first(tmp_path: Path) -> None:
    plain, slow_first = new_run(tmp_path, "plain"), new_run(tmp_path, "slow")

    async def interfere(event: Event) -> None:
        if event.kind == "generate" and sum(e.kind == "generate" for e in slow_first.world.events) % PER_STEP == 1:
            for _ in range(20):
                await asyncio.sleep(0)

    slow_first.world.interfere = interfere
    await plain.run()
    await slow_first.run()
    assert plain.recorded() == slow_first.recorded()
    assert plain.world.events != slow_first.world.events


async def test_the_policy_learns(tmp_path: Path) -> None:
    run = await new_run(tmp_path, train={"steps": 30, "prompts_per_step": 8}).run()
    rewards = run.column("reward/mean")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert run.world.weight > 1
    assert run.column("kl/mean")[0] == 0  # the reference is the policy as the run began
    assert run.column("kl/mean")[-1] > 0


# --- what the config says ---------------------------------------------------------------------------------------------


async def test_without_a_kl_term_there_is_no_reference_and_no_kl_key(tmp_path: Path) -> None:
    run = await new_run(tmp_path, algorithm={"kl": {"coef": 0}}, train={"steps": 1}).run()
    assert [e.what for e in run.world.events if e.kind == "annotate"] == [""]
    assert [key for row in run.metrics for key in row if key.startswith("kl/")] == []


@pytest.mark.parametrize("train", [{"updates_per_step": 2}, {"epochs_per_step": 2}])
async def test_old_logprobs_are_asked_for_where_an_update_is_not_on_policy(tmp_path: Path, train: Any) -> None:
    run = await new_run(tmp_path, train={"steps": 2, **train}).run()
    assert [e.what for e in run.world.events if e.kind == "annotate"] == ["old_logprobs,ref_logprobs"] * 2
    assert [e.what for e in run.world.events if e.kind == "update"] == [0, 2]
    assert run.roles.learners.seeds == [(derive_seed(3, "updates", step),) for step in (0, 1)]  # type: ignore[attr-defined]


async def test_the_adaptive_coefficient_follows_the_formula_over_a_resume(tmp_path: Path) -> None:
    kl = {"kl": {"coef": 0.1, "controller": "adaptive", "target": 0.01, "horizon": 100}}
    killed = new_run(tmp_path, algorithm=kl, checkpoint={"every": 3})
    killed.at("update", 5, raising(KilledError()))
    with pytest.raises(KilledError):
        await killed.run()
    run = await new_run(tmp_path, algorithm=kl, checkpoint={"every": 3}).run()
    expected = [0.1]
    for mean in run.column("kl/mean"):
        error = min(max(mean / 0.01 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * SAMPLES / 100))
    assert run.column("kl/coef") == pytest.approx(expected[:-1], rel=1e-12)
    assert run.state().kl == {"coef": pytest.approx(expected[-1], rel=1e-12)}
    assert len(set(expected)) == len(expected)


async def test_a_step_that_tells_nothing_of_the_kl_leaves_the_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 3: another wrote what is learnt from, and only a critic learns."""

    def order(config: RunConfig, step: int, *, kl_coef: float) -> UpdateOptions:
        return UpdateOptions(kl_coef=kl_coef, from_policy=step != 1, train_policy=step != 2)

    monkeypatch.setattr(driver, "update_options", order)
    kl = {"kl": {"coef": 0.1, "controller": "adaptive", "target": 0.01, "horizon": 100}}
    run = await new_run(tmp_path, algorithm=kl).run()
    first, second, third, fourth, fifth, *_ = run.column("kl/coef")
    assert second == third == fourth
    assert first != second
    assert fourth != fifth


async def test_checkpoints_are_made_and_kept_as_asked(tmp_path: Path) -> None:
    run = await new_run(tmp_path, checkpoint={"every": 2, "keep": 2}, train={"steps": 5}).run()
    names = [f".step-{step:06d}.partial" for step in (2, 4, 5)]
    assert [e.what for e in run.world.events if e.kind == "save"] == names
    assert checkpoint_steps(run.checkpoints.directory) == [4, 5]
    state = run.state()
    assert (state.step, state.policy_version) == (5, 5)


async def test_evaluations_at_the_beginning_every_k_steps_and_at_the_end(tmp_path: Path) -> None:
    run = await new_run(tmp_path, evaluate=3, eval={"every": 2, "n": 2}, train={"steps": 5, "learning_rate": 0}).run()
    evaluated = {row["step"]: row["eval/reward_mean"] for row in run.metrics if "eval/reward_mean" in row}
    assert list(evaluated) == [0, 2, 4, 5]
    assert len(set(evaluated.values())) == 1  # the same weights and the same seeds
    assert [row["step"] for row in run.metrics] == list(range(6))
    assert [set(row) for row in run.metrics if row["step"] == 0] == [{"step", "time", "eval/reward_mean", "eval/share"}]
    ids = [e.what for e in run.world.events if e.kind == "generate" and str(e.what).startswith("eval-")]
    assert ids == ["eval-000000", "eval-000001", "eval-000002"] * 4


# --- failures ---------------------------------------------------------------------------------------------------------


def broken(role: str) -> RoleError:
    return RoleError(role=role, rank=1, phase="p", kind="ActorDied", message="out of memory")


@pytest.mark.parametrize("kind", ["generate", "score", "turn", "annotate", "update", "publish", "save"])
async def test_the_failure_of_a_role_ends_the_run(tmp_path: Path, kind: str) -> None:
    run, error = new_run(tmp_path, checkpoint={"every": 1}), broken(kind)
    run.at(kind, 2, raising(error))
    with pytest.raises(RoleError) as caught:
        await run.run()
    assert caught.value is error
    assert await nothing_is_under_way()
    assert checkpoint_steps(run.checkpoints.directory) == ([1] if kind in ("annotate", "update", "save") else [])


async def test_groups_under_way_are_cancelled_when_one_fails(tmp_path: Path) -> None:
    run = new_run(tmp_path, train={"prompts_per_step": 4})
    cancelled: list[str | int] = []

    async def interfere(event: Event) -> None:
        if event == ("generate", "e0-000002"):
            raise broken("generator")
        if event.kind == "generate":
            try:
                await forever()
            except asyncio.CancelledError:
                cancelled.append(event.what)
                raise

    run.world.interfere = interfere
    with pytest.raises(RoleError, match="generator 1 failed in phase 'p': ActorDied: out of memory"):
        await run.run()
    assert cancelled == ["e0-000000", "e0-000001", "e0-000003"]
    assert await nothing_is_under_way()


async def test_a_reward_service_that_never_answers_is_named(tmp_path: Path) -> None:
    run = new_run(tmp_path, timeouts={"reward_s": 0.05})
    run.at("score", 2, forever)
    with pytest.raises(RewardsFailedError, match=r"no answer within .* \(timeouts.reward_s\)"):
        await run.run()
    assert run.metrics == []


def ill(line: int, *completions: int) -> Callable[[Any, int], str | None]:
    """The judge cannot score these completions of the prompt in that line."""
    return lambda request, i: f"judge fell ill at {i}" if request.prompt.line == line and i in completions else None


async def test_a_failed_score_enters_no_baseline_and_no_loss(tmp_path: Path) -> None:
    run = new_run(tmp_path, train={"steps": 2, "prompts_per_step": PROMPTS, "max_failed_fraction": 0.05})
    run.scorer.cause_of = ill(3, 1)  # one of 20: exactly what is allowed
    await run.run()
    rows = run.rollouts(1)
    (group,) = {row["group"] for row in rows if not row["valid"]}
    kept = [row for row in rows if row["group"] == group and row["valid"]]
    (lost,) = [row for row in rows if not row["valid"]]
    assert (lost["sample_id"][-2:], lost["reward"], lost["advantage"], lost["rewards"]) == (
        "/1",
        None,
        None,
        [("share", None)],
    )
    rewards = np.array([row["reward"] for row in kept])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose([row["advantage"] for row in kept], expected, rtol=1e-6)
    assert run.column("reward/failed") == [1, 1]
    assert run.column("rollout/samples") == [20, 20]
    assert run.metrics[0]["reward/mean"] == pytest.approx(np.mean([r["reward"] for r in rows if r["valid"]]))


@pytest.mark.parametrize(("allowed", "failing"), [(0.0, (2,)), (0.1, (1, 2, 3)), (1.0, (0, 1, 2, 3))])
async def test_more_failed_scores_than_allowed_stop_the_run_with_the_first_cause(
    tmp_path: Path, allowed: float, failing: tuple[int, ...]
) -> None:
    run = new_run(tmp_path, train={"prompts_per_step": 1, "max_failed_fraction": allowed})
    run.scorer.cause_of = ill(3, *failing)
    with pytest.raises(
        RewardsFailedError,
        match=f"{len(failing)} of 4 .*{allowed:.0%}.*first cause: share: judge fell ill at {failing[0]}",
    ):
        await run.run()


def off_by(error: float) -> Callable[[int, int], float]:
    return lambda seed, tokens: error


@pytest.mark.parametrize("error", [0.002, -0.002, float("nan")])
async def test_a_logprob_gap_over_the_threshold_stops_the_run(tmp_path: Path, error: float) -> None:
    run = new_run(tmp_path)

    def break_generators() -> None:
        run.roles.generators.logprob_error = off_by(error)  # type: ignore[attr-defined]

    run.at("generate", 2 * PER_STEP + 2, break_generators)  # the second group of step 3
    message = r"step 3: .* in one token of 1000 \(allowed: 0.001, .* by (0.002|nan), in sample e1-000000/\d;"
    with pytest.raises(LogprobGapError, match=message):
        await run.run()
    assert run.column("step") == [1, 2]


async def test_a_logprob_gap_below_the_threshold_is_recorded(tmp_path: Path) -> None:
    run = new_run(tmp_path, train={"steps": 1})
    run.roles.generators.logprob_error = off_by(0.0001)  # type: ignore[attr-defined]
    await run.run()
    for key in ("mean", "p999", "max"):
        assert run.column(f"rollout/logprob_gap_{key}") == pytest.approx([0.0001], abs=1e-6)


async def test_a_mean_above_its_own_limit_stops_the_run(tmp_path: Path) -> None:
    """All tokens a little off: no token is off by much."""
    run = new_run(tmp_path, sync={"max_mean_logprob_gap": 0.0001})
    run.roles.generators.logprob_error = off_by(0.0002)  # type: ignore[attr-defined]
    with pytest.raises(LogprobGapError, match=r"step 1: .* by 0.0002 on average \(allowed: 0.0001, sync.max_mean_log"):
        await run.run()


def bf16_rounding(seed: int, tokens: int) -> Float32Array:
    """Noise as it was measured on a model of 135 M parameters: mean 0.045, one token in a thousand above 0.3.

    A Laplace distribution of scale 0.0434 has mean 0.0434 and its quantile at 0.0434 · ln 1000 = 0.3.
    """
    return np.random.default_rng([seed, 1]).laplace(scale=0.0434, size=tokens).astype(np.float32)


MANY = {"sampling": {"n": 64, "max_tokens": 64}, "train": {"steps": 3, "prompts_per_step": PROMPTS}}


@pytest.mark.parametrize("given", [{}, {"max_logprob_gap": 0.5}], ids=["default", "a config of before"])
async def test_rounding_in_bfloat16_comes_through_whatever_its_maximum(tmp_path: Path, given: dict[str, Any]) -> None:
    def rounding(seed: int, tokens: int) -> Float32Array:
        noise = bf16_rounding(seed, tokens)
        if seed % 500 == 0:  # in one completion of 500 one token: published tails reach beyond 1
            noise[0] = 1.2
        return noise

    run = new_run(tmp_path, policy={"dtype": "bfloat16"}, sync=given, **MANY)
    run.roles.generators.logprob_error = rounding  # type: ignore[attr-defined]
    await run.run()
    assert len(run.metrics) == 3
    assert max(run.column("rollout/logprob_gap_max")) > 0.5
    assert run.column("rollout/logprob_gap_mean") == pytest.approx([0.0434] * 3, rel=0.1)
    assert run.column("rollout/logprob_gap_p999") == pytest.approx([0.3] * 3, rel=0.5)


def stale(seed: int, tokens: int) -> Float32Array:
    """An update that the engine ignored: every token a little off."""
    return bf16_rounding(seed, tokens) + np.float32(0.25)


def corrupted(seed: int, tokens: int) -> Float32Array:
    """A damaged row of the output head: one token in fifty is off by far."""
    noise = bf16_rounding(seed, tokens)
    noise[np.random.default_rng([seed, 2]).random(tokens) < 0.02] += np.float32(3)
    return noise


def one_bad_completion(seed: int, tokens: int) -> Float32Array:
    """One completion of about 64 is from another model."""
    return bf16_rounding(seed, tokens) + np.float32(2 * (seed % 64 == 0))


def not_a_number(seed: int, tokens: int) -> Float32Array:
    """In one completion of sixteen no token has a number."""
    return bf16_rounding(seed, tokens) + np.float32(np.nan if seed % 16 == 0 else 0)


@pytest.mark.parametrize("fault", [stale, corrupted, one_bad_completion, not_a_number])
async def test_faults_stop_a_bfloat16_run_beside_its_rounding(tmp_path: Path, fault: Any) -> None:
    run = new_run(tmp_path, policy={"dtype": "bfloat16"}, **MANY)
    run.roles.generators.logprob_error = bf16_rounding  # type: ignore[attr-defined]

    def break_generators() -> None:
        run.roles.generators.logprob_error = fault  # type: ignore[attr-defined]

    run.at("generate", PROMPTS + 1, break_generators)  # from the first group of step 2 on
    with pytest.raises(LogprobGapError, match="step 2: "):
        await run.run()
    assert run.column("step") == [1]


async def test_the_first_cause_is_the_steps_own(tmp_path: Path) -> None:
    run = new_run(tmp_path, evaluate=1, train={"prompts_per_step": PROMPTS, "max_failed_fraction": 0})
    causes = iter(["in the evaluation", "in the step"])
    run.scorer.cause_of = lambda request, i: next(causes) if request.prompt.line == 1 and i == 3 else None
    with pytest.raises(RewardsFailedError, match="first cause: share: in the step"):
        await run.run()
