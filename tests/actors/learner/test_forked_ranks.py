"""The ranks that the learners' oracles run on: forks that answer, fail, hang and die like actors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.runtime.actor_group import ActorGroup, RoleError
from tests.support import tiny
from tests.support.forked_ranks import ForkedRank, ForkServer, RankError

pytestmark = pytest.mark.integration
tiny.by_value(__name__)


class Worker:
    """Does what it is asked to."""

    def add(self, a: int, *, b: int) -> int:
        return a + b

    def divide(self, a: int) -> float:
        return a / 0

    def hang(self) -> None:
        threading.Event().wait()

    def wait_for(self, file: Path) -> str:
        with file.open() as pipe:
            return pipe.read()

    def die(self) -> None:
        os._exit(3)


@pytest.fixture
def pair(fork_server: ForkServer, tmp_path: Path) -> Iterator[ActorGroup]:
    with fork_server.group([Worker, Worker], [tmp_path / f"{rank}.log" for rank in range(2)]) as group:
        yield group


async def test_results_come_in_the_order_of_the_ranks(pair: ActorGroup) -> None:
    assert await pair.each("sum", lambda a, rank: a.add.remote(10, b=rank), deadline_s=60) == [10, 11]
    assert await pair.one(1, "sum", lambda a: a.add.remote(1, b=1), deadline_s=60) == 2


async def test_an_exception_comes_with_its_traceback(pair: ActorGroup) -> None:
    with pytest.raises(RankError, match=r"(?s)in divide.*ZeroDivisionError: division by zero"):
        await pair.each("divide", lambda a, r: a.divide.remote(1) if r else a.hang.remote(), deadline_s=600)
    assert await pair.one(1, "sum", lambda a: a.add.remote(1, b=1), deadline_s=60) == 2


async def test_a_call_has_a_deadline_and_its_late_result_is_dropped(pair: ActorGroup, tmp_path: Path) -> None:
    late = tmp_path / "late"
    os.mkfifo(late)
    with pytest.raises(RoleError, match=r"learner 0 failed in phase 'wait': Timeout: no answer within 0.1 s"):
        await pair.one(0, "wait", lambda a: a.wait_for.remote(late), deadline_s=0.1)
    late.write_text("late")
    assert await pair.one(0, "sum", lambda a: a.add.remote(1, b=1), deadline_s=60) == 2


async def test_a_dead_rank_is_noticed_at_once(pair: ActorGroup) -> None:
    with pytest.raises(RankError, match=r"rank \d+ has died"):
        await pair.each("step", lambda a, r: a.die.remote() if r else a.hang.remote(), deadline_s=600)


def test_every_rank_is_a_process_of_its_own(fork_server: ForkServer, tmp_path: Path) -> None:
    ranks: list[ForkedRank] = [fork_server.fork(Worker, tmp_path / "log") for _ in range(2)]
    assert len({rank.pid for rank in ranks} | {os.getpid()}) == 3
    for rank in ranks:
        rank.kill()
