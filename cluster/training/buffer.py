"""The rollout buffer: prompts in the stream's order, written and scored ahead of the learner, staleness bounded.

It has a budget of `(max_staleness + 1) × prompts_per_step` slots. A slot is taken when a prompt is started and freed
when the generators have new weights (`release`), so no completion can be older than `max_staleness` versions when it
is trained on. With `max_staleness` 0 this is synchronous training. Groups are taken in the order of the stream, not
of completion, so that a run does not depend on timing. A group that is passed over gives its slot to a further
prompt at once. It knows asyncio, and no role.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from trainers.types import Prompt, Rollout


class Stream(Protocol):
    """Where prompts come from."""

    def take(self, n: int) -> list[tuple[str, Prompt]]:
        """The next prompts, each with an id that is unique in the run."""
        ...

    def state(self) -> dict[str, Any]:
        """The cursor."""
        ...


@dataclass(frozen=True, slots=True)
class _Slot:
    cursor: dict[str, Any]  # the stream's state before this slot's prompt was taken
    task: asyncio.Task[Rollout]


class RolloutBuffer:
    """See the module's docstring. `produce` writes and scores one group."""

    def __init__(
        self,
        stream: Stream,
        produce: Callable[[str, Prompt], Awaitable[Rollout]],
        *,
        slots: int,
        prompts_left: int,
    ) -> None:
        self._stream = stream
        self._produce = produce
        self._free = slots
        self._prompts_left = prompts_left
        self._slots: deque[_Slot] = deque()

    def fill(self) -> None:
        """Start a prompt in every free slot, as long as the run has prompts left."""
        while self._free > 0 and self._prompts_left > 0:
            cursor = self._stream.state()
            ((id, prompt),) = self._stream.take(1)
            self._slots.append(_Slot(cursor, asyncio.ensure_future(self._produce(id, prompt))))
            self._free -= 1
            self._prompts_left -= 1

    async def take(
        self, n: int, *, keep: Callable[[Rollout], bool] = lambda _: True, replace: int = 0
    ) -> tuple[list[Rollout], list[Rollout]]:
        """The oldest `n` groups to keep, when they are done, and those passed over on the way, `replace` at most.

        For each that is passed over a further prompt is started in its slot. Staleness stays bounded: what is started
        now stands behind fewer groups than there are slots, of which every step takes its prompts or more. Raises the
        first failure of any group that is under way. A take that is given up takes nothing.
        """
        kept: list[Rollout] = []
        passed: list[Rollout] = []
        while len(kept) < n:
            seen = len(kept) + len(passed)
            count = 1 if len(passed) < replace else n - len(kept)
            for rollout in (await self._oldest(seen + count))[seen:]:
                if len(passed) == replace or keep(rollout):
                    kept.append(rollout)
                    continue
                passed.append(rollout)
                self._free += 1
                self._prompts_left += 1
                self.fill()
        for _ in (*kept, *passed):
            self._slots.popleft()
        return kept, passed

    async def _oldest(self, n: int) -> list[Rollout]:
        """The oldest `n` groups, when they are done; they stay."""
        assert n <= len(self._slots), "fill() must have started what take() waits for"
        oldest = list(self._slots)[:n]
        wanted = {slot.task for slot in oldest}
        while wanted:
            running = {slot.task for slot in self._slots if not slot.task.done()}
            for slot in self._slots:
                if slot.task.done():
                    slot.task.result()  # raises what the group failed with
            wanted &= running
            if wanted:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return [slot.task.result() for slot in oldest]

    def release(self, n: int) -> None:
        """The generators have new weights: free the slots of `n` groups that were kept."""
        self._free += n

    def cursor(self) -> dict[str, Any]:
        """The stream's state from which a resumed run continues: before the oldest group that was not taken."""
        return self._slots[0].cursor if self._slots else self._stream.state()

    async def close(self) -> None:
        """Cancel what is under way."""
        for slot in self._slots:
            slot.task.cancel()
        await asyncio.gather(*(slot.task for slot in self._slots), return_exceptions=True)
        self._slots.clear()
