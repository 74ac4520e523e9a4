"""The service's connection to its cluster: a service that stops never waits for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.jobs.ray_cluster import RayCluster

STOP_S = 5.0


class Unreachable(RayCluster):
    """A cluster that says, when it is let to, that it cannot be reached."""

    def __init__(self, private: Path) -> None:
        super().__init__(private, None)
        self._loop, self.asked, self.answer = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def _connect(self) -> None:
        self._loop.call_soon_threadsafe(self.asked.set)
        self.answer.wait(STOP_S)
        raise RuntimeError("connection refused")


@pytest.mark.parametrize("turns", range(8))
def test_a_cancellation_counts_however_near_the_answer_it_comes(turns: int, tmp_path: Path) -> None:
    """After some turns of the loop since the answer was there: the waiting code has seen it, or is about to."""

    async def stop() -> bool:
        cluster, only = Unreachable(tmp_path), ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(only)
        staying = asyncio.create_task(cluster.stay_connected())
        await cluster.asked.wait()
        cluster.answer.set()
        only.submit(lambda: None).result(STOP_S)  # the one thread is free again: the answer lies in the loop
        for _ in range(turns):
            await asyncio.sleep(0)
        staying.cancel()
        _, waiting = await asyncio.wait({staying}, timeout=STOP_S)
        for task in waiting:
            task.cancel()
        return not waiting

    assert asyncio.run(stop())
