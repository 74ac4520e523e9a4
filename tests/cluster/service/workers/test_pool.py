"""Work in a process of its own: answers, errors, deadlines, and what is left when somebody leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import psutil
import pytest

from cluster.service.exceptions import DeadlineError, InternalError
from cluster.service.workers.messages import CheckWork, RowsWork
from cluster.service.workers.pool import Helper
from tests.support.processes import descendants_running
from trainers.errors import UserError


@pytest.fixture
async def helper() -> AsyncIterator[Helper]:
    found = Helper()
    yield found
    await found.close()


@pytest.fixture
def prompts(tmp_path: Path) -> RowsWork:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return RowsWork(path=str(path), count=1, offset=1)


@pytest.fixture
def endless(tmp_path: Path) -> RowsWork:
    """A file that nobody writes: whoever opens it waits."""
    path = tmp_path / "endless.jsonl"
    os.mkfifo(path)
    return RowsWork(path=str(path), count=1, offset=0)


def children() -> list[int]:
    return descendants_running("cluster.service.workers.main")


async def test_it_answers_and_stays_for_the_next(helper: Helper, prompts: RowsWork) -> None:
    first = await helper.call(prompts, deadline_s=60)
    (pid,) = children()
    assert [row["messages"][0]["content"] for row in first] == ["b"]
    assert await helper.call(prompts, deadline_s=60) == first
    assert children() == [pid]
    await helper.close()
    assert children() == []


async def test_a_users_mistake_comes_back_as_one(helper: Helper, tmp_path: Path) -> None:
    missing = RowsWork(path=str(tmp_path / "none.jsonl"), count=1, offset=0)
    with pytest.raises(UserError, match="cannot be shown"):
        await helper.call(missing, deadline_s=60)
    assert len(children()) == 1


class Unknown(RowsWork):
    """Work that the worker does not know."""

    work: Literal["unknown"] = "unknown"  # type: ignore[assignment]


async def test_our_own_mistake_is_logged_and_not_shown(helper: Helper, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalError) as caught:
        await helper.call(Unknown(path="", count=0, offset=0), deadline_s=60)
    assert "ValidationError" not in caught.value.message
    assert "ValidationError" in caplog.text


async def test_a_deadline_ends_the_process_and_the_next_request_has_another(
    helper: Helper, prompts: RowsWork, endless: RowsWork
) -> None:
    with pytest.raises(DeadlineError):
        await helper.call(endless, deadline_s=0.5)
    assert children() == []
    assert len(await helper.call(prompts, deadline_s=60)) == 1


ONE_PIECE = """
import sys
sys.stdin.readline()
print('{"kind": "piece", "value": 1}', flush=True)
sys.stdin.readline()
"""


async def test_a_deadline_never_cancels_what_the_caller_awaits_between_two_pieces() -> None:
    """A client that is slow to take a piece: the deadline passes meanwhile, and the next piece is answered with 503."""
    helper = Helper((sys.executable, "-c", ONE_PIECE))
    seen = []

    async def take_slowly() -> None:
        async with contextlib.aclosing(helper.stream(CheckWork(path=""), deadline_s=1.0)) as pieces:
            async for piece in pieces:
                await asyncio.sleep(1.5)  # beyond the deadline
                seen.append(piece)

    with pytest.raises(DeadlineError):
        await take_slowly()
    assert seen == [("piece", 1)]
    assert not helper.busy


async def test_whoever_leaves_ends_the_work(helper: Helper, endless: RowsWork) -> None:
    asked = asyncio.create_task(helper.call(endless, deadline_s=60))
    while not children():  # noqa: ASYNC110 - a process can only be looked for
        await asyncio.sleep(0.01)
    assert helper.busy
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    assert not helper.busy
    assert children() == []


async def test_the_wait_for_others_work_has_a_deadline_and_leaves_it_alone(
    helper: Helper, prompts: RowsWork, endless: RowsWork
) -> None:
    first = asyncio.create_task(helper.call(endless, deadline_s=60))
    while not children():  # noqa: ASYNC110 - a process can only be looked for
        await asyncio.sleep(0.01)
    before = children()
    with pytest.raises(DeadlineError, match="waited longer than"):
        await helper.call(prompts, deadline_s=0.1)
    assert children() == before
    assert helper.busy
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert len(await helper.call(prompts, deadline_s=60)) == 1


async def test_a_process_that_dies_is_an_error_and_not_an_endless_wait(
    helper: Helper, prompts: RowsWork, endless: RowsWork
) -> None:
    await helper.call(prompts, deadline_s=60)
    asked = asyncio.create_task(helper.call(endless, deadline_s=60))
    await asyncio.sleep(0)
    psutil.Process(children()[0]).kill()
    with pytest.raises(DeadlineError, match="without an answer"):
        await asked
