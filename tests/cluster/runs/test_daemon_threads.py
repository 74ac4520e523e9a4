"""Threads that hold up neither the caller nor the end of the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.daemon_threads import map_concurrently, run_within, start


def test_results_come_in_the_order_of_the_items() -> None:
    assert map_concurrently(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert map_concurrently(str, []) == []
    assert map_concurrently(lambda item: item, [None, 1]) == [None, 1]


def test_the_first_error_is_raised_to_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        map_concurrently(lambda n: 1 // n, [1, 0, 2])
    with pytest.raises(KeyError):
        start(lambda: {}["absent"]).result(timeout=10)


async def test_work_that_ends_in_time_gives_its_result_or_its_own_error() -> None:
    assert await run_within(lambda: 42, save_s=60, late="it was not done") == 42

    def late_itself() -> None:
        raise TimeoutError("of the work")

    with pytest.raises(TimeoutError, match="of the work"):
        await run_within(late_itself, save_s=60, late="it was not done")


async def test_work_that_does_not_end_is_named() -> None:
    hung = threading.Event()
    try:
        with pytest.raises(RunDirectoryError, match=r"it was not done within 0.05 s \(timeouts.save_s\)"):
            await run_within(hung.wait, save_s=0.05, late="it was not done")
    finally:
        hung.set()


PROGRAM = """
import asyncio, threading
from cluster.runs.daemon_threads import map_concurrently, run_within, start
hung = threading.Event()
start(lambda: map_concurrently(lambda _: hung.wait(), range(4)))
try:
    asyncio.run(run_within(hung.wait, save_s=0.05, late="it was not done"))
except RuntimeError as error:
    print(error, flush=True)
"""


def test_a_process_ends_whatever_its_threads_wait_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False, cwd=Path.cwd()
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("it was not done within 0.05 s")
