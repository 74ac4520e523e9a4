"""One process for every test of the engine: a generator on Ray whose engines come and go, and that can misbehave.

Importing vLLM takes its process ten seconds, making an engine of a tiny model one or two; so the tests share the
process, and each asks for the engine that it needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from actors.generator.actor import Generator
from actors.messages import EngineSpec
from actors.runtime.actor_group import ActorGroup, launch
from tests.support import tiny

if TYPE_CHECKING:
    from actors.generator.vllm_engine import VllmEngine

_T = TypeVar("_T")

LOADING_S = 200


class EngineHost(Generator):
    """A generator that outlives its engines, runs a test's functions beside them, and fails when it is asked to."""

    def __init__(self) -> None:
        super().__init__(tiny.engine_spec(Path("not prepared")))
        self._running: EngineSpec | None = None  # what the engine was made of, unless a test has spoiled it
        self._open = False
        self.changed = False  # other weights have come
        self._fault = ""
        self._old: Sequence[dict[str, Any]] = ()
        self._new: Sequence[dict[str, Any]] = ()
        self._claimed: Sequence[dict[str, str]] = ()

    @property
    def engine(self) -> VllmEngine:
        return self._engine

    async def use(self, spec: EngineSpec, *, any_weights: bool = False) -> None:
        """Have an engine of `spec`, not paused, that does as it should: the one that runs, or a new one.

        It has the weights of its folder, unless `any_weights` will do.
        """
        if self._running != spec or (self.changed and not any_weights):
            await self.prepare(spec)
            await self.start()
        self._fault = ""
        await self.resume(0)

    async def prepare(self, spec: EngineSpec) -> None:
        """End the engine that runs; `start` is to come, as for a new generator."""
        if self._open:
            await self.close()
        self._spec = spec

    async def start(self) -> None:
        self._open, self.changed = True, False
        self._old, self._new = (), ()
        await super().start()
        self._running = self._spec

    async def run(self, function: Callable[..., _T], *args: Any) -> _T:
        """`function(host, *args)` in a thread of this process."""
        return await asyncio.to_thread(function, self, *args)

    def spoil(self) -> None:
        """The engine no longer matches its spec: the next `use` makes a new one."""
        self._running = None

    async def close(self) -> None:
        self._running, self._open = None, False
        await super().close()

    async def misbehave(self, fault: str) -> None:
        """From now on fail in an update ("no memory"), hang in it ("hang"), or undo each one secretly ("stale")."""
        self._fault = fault

    async def start_weight_update(self) -> None:
        if self._fault == "hang":
            await asyncio.Event().wait()
        self.changed = True
        self._old, self._new = self._new, []
        await super().start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        if self._fault == "no memory":
            self.spoil()
            raise MemoryError("the device is full")
        self._new = [*self._new, update_info]
        await super().update_weights(update_info)

    async def finish_weight_update(self) -> None:
        await super().finish_weight_update()
        if self._fault == "stale":
            self._claimed = await super().received_digests()
            await super().start_weight_update()
            for chunk in self._old:
                await super().update_weights(chunk)
            await super().finish_weight_update()

    async def received_digests(self) -> list[dict[str, str]]:
        return list(self._claimed) if self._fault == "stale" else await super().received_digests()


tiny.by_value(__name__)


@contextmanager
def engine_host(logs: Path) -> Iterator[ActorGroup]:
    """The host as a group of one generator; it has no engine yet."""
    with (
        tiny.seats(generators=1, logs=logs) as (taken, _),
        tiny.launched("generator", taken, lambda seat, _: launch(EngineHost, seat)) as group,
    ):
        yield group


class Engine:
    """The host as the tests of the engine use it."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def use(self, spec: EngineSpec, *, any_weights: bool = False) -> None:
        """See `EngineHost`."""
        ray.get(self._host.use.remote(spec, any_weights=any_weights), timeout=LOADING_S)

    def __call__(self, function: Callable[..., _T], *args: Any) -> _T:
        """`function(host, *args)` in the host's process."""
        return ray.get(self._host.run.remote(function, *args), timeout=LOADING_S)
