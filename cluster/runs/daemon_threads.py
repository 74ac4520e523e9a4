"""Work that may block for ever, in threads that hold up neither the caller nor the end of the process.

A hung file system blocks a thread inside the kernel, where nothing can interrupt it. Python joins the threads of
`asyncio.to_thread` and `ThreadPoolExecutor` before it exits; the ones here are left behind.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from cluster.runs.atomic_files import RunDirectoryError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def start(work: Callable[[], _Result]) -> Future[_Result]:
    """The result of `work`, which runs in a daemon thread of its own.

    >>> start(lambda: 6 * 7).result(timeout=10)
    42
    """
    outcome: Future[_Result] = Future()
    outcome.set_running_or_notify_cancel()  # from here on a waiter can leave, and cannot cancel

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


async def run_within(work: Callable[[], _Result], *, save_s: float, late: str) -> _Result:
    """What `work` on a run's files returns. RunDirectoryError with `late`, what has not happened, after `save_s`
    seconds (timeouts.save_s); the thread is left behind."""
    outcome = asyncio.wrap_future(start(work))
    try:
        async with asyncio.timeout(save_s):
            return await outcome
    except TimeoutError:
        if outcome.done() and not outcome.cancelled():
            raise  # its own
        raise RunDirectoryError(f"{late} within {save_s:g} s (timeouts.save_s); is its file system hung?") from None


def map_concurrently(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """`work` of every item, in order, computed by as many threads as there are CPUs; the first error is raised.

    >>> map_concurrently(str.upper, ["a", "b"])
    ['A', 'B']
    """
    waiting = list(items)
    outcomes: list[Future[_Result]] = [Future() for _ in waiting]
    order = iter(zip(waiting, outcomes, strict=True))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                pair = next(order, None)
            if pair is None:
                return
            item, outcome = pair
            try:
                outcome.set_result(work(item))
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                outcome.set_exception(error)

    for _ in range(min(len(waiting), os.cpu_count() or 1)):
        start(worker)
    return [outcome.result() for outcome in outcomes]
