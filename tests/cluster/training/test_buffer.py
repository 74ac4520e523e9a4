"""The rollout buffer: slots, order, staleness, cursor, failures; groups finish in whatever order hypothesis wants."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.training.buffer import RolloutBuffer
from trainers.types import Completion, Prompt, Rollout, TokenPrompt


def rollout(id: str, prompt: Prompt, *, version: int = 0) -> Rollout:
    completion = Completion(
        tokens=np.array([1], dtype=np.int32),
        logprobs=np.zeros(1, dtype=np.float32),
        text="x",
        finish_reason="stop",
        policy_version=version,
    )
    tokens = TokenPrompt(id=id, prompt=prompt, tokens=np.array([1], dtype=np.int32))
    return Rollout(prompt=tokens, completions=(completion,), rewards={}, reward=(1.0,))


class Counting:
    """A stream of numbered prompts."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, n: int) -> list[tuple[str, Prompt]]:
        first, self.taken = self.taken, self.taken + n
        return [(str(i), Prompt(messages=(), source="s", line=i)) for i in range(first, self.taken)]

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}


@dataclass
class Writers:
    """Groups that are finished one by one, when the test says so."""

    version: int = 0
    gates: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def produce(self, id: str, prompt: Prompt) -> Rollout:
        self.started.append(id)
        version = self.version  # of the first token, the oldest
        gate = self.gates[id] = asyncio.get_running_loop().create_future()
        try:
            await gate
        except asyncio.CancelledError:
            self.cancelled.append(id)
            raise
        return rollout(id, prompt, version=version)

    def waiting(self) -> list[str]:
        return [id for id, gate in self.gates.items() if not gate.done()]

    async def finish(self, *ids: str) -> None:
        for id in ids:
            self.gates[id].set_result(None)
        await ticks()


async def ticks() -> None:
    """Let everything run that can run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def filled(slots: int, *, prompts_left: int = 100) -> tuple[RolloutBuffer, Writers]:
    writers = Writers()
    buffer = RolloutBuffer(Counting(), writers.produce, slots=slots, prompts_left=prompts_left)
    buffer.fill()
    await ticks()
    return buffer, writers


def ids(rollouts: list[Rollout]) -> list[str]:
    return [r.prompt.id for r in rollouts]


@settings(max_examples=60, deadline=None)
@given(
    max_staleness=st.integers(0, 2),
    per_step=st.integers(1, 4),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    passed_share=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_slots_order_and_staleness_are_bounded(
    max_staleness: int, per_step: int, steps: int, seed: int, passed_share: float
) -> None:
    """The driver's loop with a version counter, groups finishing in random order at random moments."""
    chance = random.Random(seed)
    slots = (max_staleness + 1) * per_step
    writers = Writers()
    released = 0

    async def finish_at_random() -> None:
        while True:
            for id in chance.sample(waiting := writers.waiting(), chance.randint(0, len(waiting))):
                writers.gates[id].set_result(None)
            await asyncio.sleep(0)

    async def loop() -> None:
        nonlocal released
        buffer = RolloutBuffer(Counting(), writers.produce, slots=slots, prompts_left=steps * per_step)
        finishing = asyncio.ensure_future(finish_at_random())
        order: list[str] = []
        for _ in range(steps):
            buffer.fill()
            kept, passed = await buffer.take(per_step, keep=lambda _: chance.random() > passed_share, replace=5)
            taken = sorted([*kept, *passed], key=lambda group: int(group.prompt.id))
            assert len(kept) == per_step
            assert len(passed) <= 5
            order += ids(taken)
            released += len(passed)
            assert len(writers.started) - released <= slots
            assert buffer.cursor() == {"taken": len(order)}
            for group in taken:
                assert 0 <= writers.version - group.completions[0].policy_version <= max_staleness
            for _ in range(chance.randint(0, 3)):  # an update takes its time
                await asyncio.sleep(0)
            writers.version += 1
            buffer.release(per_step)
            released += per_step
        finishing.cancel()
        assert order == [str(i) for i in range(released)] == writers.started

    asyncio.run(loop())


async def test_synchronous_means_that_nothing_starts_before_release() -> None:
    buffer, writers = await filled(2)
    await writers.finish("0", "1")
    assert ids((await buffer.take(2))[0]) == ["0", "1"]
    buffer.fill()
    await ticks()
    assert writers.started == ["0", "1"]
    buffer.release(2)
    buffer.fill()
    await ticks()
    assert writers.started == ["0", "1", "2", "3"]
    await buffer.close()


async def test_with_more_slots_the_next_groups_are_written_while_the_learner_works() -> None:
    buffer, writers = await filled(4)
    assert writers.started == ["0", "1", "2", "3"]
    await writers.finish("3", "0", "1")
    assert ids((await buffer.take(2))[0]) == ["0", "1"]
    assert buffer.cursor() == {"taken": 2}  # groups 2 and 3 are written again after a resume
    await writers.finish("2")
    assert ids((await buffer.take(2))[0]) == ["2", "3"]


async def test_take_waits_for_the_oldest_whatever_else_is_done() -> None:
    buffer, writers = await filled(3)
    take = asyncio.ensure_future(buffer.take(2))
    await writers.finish("2", "1")
    assert not take.done()
    assert buffer.cursor() == {"taken": 0}
    await writers.finish("0")
    assert ids((await take)[0]) == ["0", "1"]
    await buffer.close()


async def test_a_take_that_is_given_up_takes_nothing() -> None:
    buffer, writers = await filled(2)
    take = asyncio.ensure_future(buffer.take(2))
    await writers.finish("0")
    take.cancel()
    await ticks()
    assert buffer.cursor() == {"taken": 0}
    await writers.finish("1")
    assert ids((await buffer.take(2))[0]) == ["0", "1"]


async def test_what_is_passed_over_is_not_lost_when_a_take_is_given_up() -> None:
    buffer, writers = await filled(2)
    take = asyncio.ensure_future(buffer.take(2, keep=lambda group: group.prompt.id != "0", replace=1))
    await writers.finish("0", "1")
    assert writers.started == ["0", "1", "2"]
    take.cancel()
    await ticks()
    assert buffer.cursor() == {"taken": 0}
    await buffer.close()


async def test_no_more_prompts_are_taken_than_the_run_has_left() -> None:
    buffer, writers = await filled(4, prompts_left=3)
    assert writers.started == ["0", "1", "2"]
    await buffer.close()


@pytest.mark.parametrize("failing", ["0", "1", "3"])
async def test_the_failure_of_any_group_under_way_ends_the_take(failing: str) -> None:
    buffer, writers = await filled(4)
    take = asyncio.ensure_future(buffer.take(2))
    await ticks()
    error = RuntimeError("engine died")
    writers.gates[failing].set_exception(error)
    with pytest.raises(RuntimeError) as caught:
        await take
    assert caught.value is error
    await buffer.close()
    assert writers.cancelled == [id for id in "0123" if id != failing]


async def test_a_failure_between_two_takes_is_not_lost() -> None:
    buffer, writers = await filled(4)
    await writers.finish("0", "1", "2")
    await buffer.take(2)
    writers.gates["3"].set_exception(RuntimeError("engine died"))
    await ticks()
    with pytest.raises(RuntimeError, match="engine died"):
        await buffer.take(1)  # group 2 is done, but the run cannot go on
    await buffer.close()


async def test_close_cancels_and_waits() -> None:
    buffer, writers = await filled(3)
    await writers.finish("1")
    await buffer.close()
    assert writers.cancelled == ["0", "2"]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await buffer.close()  # a second time nothing happens
