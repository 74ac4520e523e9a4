"""The generator: the rollout role, an inference engine behind an async actor.

A plain class, testable in-process; `group.py` makes a Ray actor of it. It knows the engine by its protocol only. Groups
stream back one at a time, each call of `generate` being one. Weight-transfer calls (with the method names that
`transfer.GeneratorClient` uses) run between two engine steps, generation paused from the first to `resume`. A generator
that has not received weights writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actors.generator.engine import Engine, make_engine
from actors.messages import EngineSpec, GenerateRequest, TopLogprobsRequest
from trainers.types import Completion, TopLogprobs

if TYPE_CHECKING:
    from actors.generator.weight_receivers import Receiver


class Generator:
    """One replica. `start` comes first, then `resume` with the version of the weights it was given."""

    def __init__(self, spec: EngineSpec, *, make_engine: Callable[[EngineSpec], Engine] = make_engine) -> None:
        self._spec = spec
        self._make_engine = make_engine
        self._engine: Engine
        self._receiver: Receiver

    async def start(self) -> None:
        """Load the engine."""
        from actors.generator.weight_receivers import make_receiver  # importing torch is not for the driver

        self._engine = self._make_engine(self._spec)
        self._receiver = make_receiver(self._engine, self._spec)
        await asyncio.wrap_future(self._engine.ready)
        await asyncio.wrap_future(self._engine.pause())

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """All completions of one group, in the order of their seeds."""
        return tuple(await asyncio.gather(*map(asyncio.wrap_future, self._engine.draw(request))))

    async def top_logprobs(self, request: TopLogprobsRequest) -> TopLogprobs:
        """The likeliest tokens at the requested places of a sequence."""
        return await asyncio.wrap_future(self._engine.top_logprobs(request))

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Rendezvous with the learners, if the transport has one."""
        await self._receiver.init(init_info)

    async def start_weight_update(self) -> None:
        """Pause, and make ready for new weights."""
        await asyncio.wrap_future(self._engine.pause())
        await self._receiver.start()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk."""
        await self._receiver.update(update_info)

    async def finish_weight_update(self) -> None:
        """Use the new weights; generation stays paused until `resume`."""
        await self._receiver.finish()

    async def received_digests(self) -> list[dict[str, str]]:
        """Digests of what the last transfer loaded, for each worker of the engine."""
        return await self._receiver.digests()

    async def resume(self, policy_version: int) -> None:
        """Write with the weights that are loaded, which are of that version."""
        await asyncio.wrap_future(self._engine.resume(policy_version))

    async def sleep(self) -> None:
        """Leave the GPU to a colocated learner: weights to host memory, key-value cache dropped."""
        await asyncio.wrap_future(self._engine.pause())
        await asyncio.wrap_future(self._engine.sleep())

    async def wake_up(self) -> None:
        """Take the GPU back; generation stays paused until `resume`."""
        await asyncio.wrap_future(self._engine.wake_up())

    async def close(self) -> None:
        """End the engine and its workers."""
        await asyncio.to_thread(self._engine.close)
