"""Launching, waiting and failing over real Ray actors: always with a deadline, always with a named cause."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.runtime.actor_group import ActorGroup, RoleError, launch
from cluster.training.preloading import LIBRARIES
from tests.support import tiny

tiny.by_value(__name__)


class Worker:
    """Does what it is asked to."""

    def __init__(self, refuse: str = "") -> None:
        if refuse:
            raise OSError(refuse)
        self._peer: Any = None

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self, message: str) -> None:
        raise KeyError(message) if message else ValueError

    def give_up(self) -> None:
        raise TimeoutError("the disk did not answer")

    def hang(self) -> None:
        threading.Event().wait()

    def die(self) -> None:
        os._exit(3)

    def speak(self) -> str:
        print("printed")
        print("complained", file=sys.stderr)
        subprocess.run(["echo", "from a child"], check=True)
        os.write(1, b"from below Python\n")
        return os.environ["OMP_NUM_THREADS"]

    def libraries(self) -> tuple[set[str], int]:
        """What its process had imported before anybody asked it to, and the threads that torch would use."""
        import torch

        return set(sys.modules), torch.get_num_threads()

    def listen(self) -> int:
        self._peer = socket.create_server(("127.0.0.1", 0))
        return int(self._peer.getsockname()[1])

    def work_with(self, port: int, ending: str) -> None:
        """One end of a collective: rank 0 comes to `ending`, rank 1 waits for a word that never comes."""
        if port:
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.recv(1)
            raise RuntimeError(f"[gloo] Connection closed by peer [127.0.0.1]:{port}")
        connection, _ = self._peer.accept()
        with connection:
            if ending == "die":
                os._exit(1)
            raise ZeroDivisionError("the real cause")


@contextmanager
def workers(count: int, logs: Path, *args: Any) -> Iterator[ActorGroup]:
    with (
        tiny.seats(generators=count, logs=logs) as (seats, _),
        tiny.launched("worker", seats, lambda seat, _: launch(Worker, seat, *args)) as group,
    ):
        yield group


@pytest.fixture(scope="module")
def pair(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActorGroup]:
    with workers(2, tmp_path_factory.mktemp("pair") / "logs") as group:
        yield group


integration = pytest.mark.integration


@integration
async def test_a_worker_has_the_libraries_of_all_roles_and_threads_of_its_own(pair: ActorGroup) -> None:
    loaded, threads = await pair.one(0, "look", lambda a: a.libraries.remote(), deadline_s=60)
    assert set(LIBRARIES) <= loaded  # none failed to import, and the worker is a fork
    assert threads == 1  # as its seat says


@integration
async def test_results_come_in_the_order_of_the_ranks(pair: ActorGroup) -> None:
    assert await pair.each("sum", lambda a, rank: a.add.remote(10, rank), deadline_s=30) == [10, 11]
    assert await pair.one(1, "sum", lambda a: a.add.remote(1, 1), deadline_s=30) == 2


@integration
async def test_an_exception_is_reported_with_everything(pair: ActorGroup) -> None:
    with pytest.raises(RoleError) as caught:
        await pair.each("count", lambda a, r: a.fail.remote("beans") if r else a.add.remote(1, 1), deadline_s=30)
    error = caught.value
    assert (error.role, error.rank, error.phase, error.kind) == ("worker", 1, "count", "KeyError")
    assert error.message == "'beans'"
    assert error.log == str(pair.logs[1])
    assert str(error) == f"worker 1 failed in phase 'count': KeyError: 'beans' (log: {pair.logs[1]})"
    assert await pair.one(1, "sum", lambda a: a.add.remote(1, 1), deadline_s=30) == 2  # it lives on


@integration
async def test_an_exception_without_message_is_reported(pair: ActorGroup) -> None:
    with pytest.raises(RoleError, match=r"worker 0 failed in phase 'x': ValueError: \(no message\)"):
        await pair.one(0, "x", lambda a: a.fail.remote(""), deadline_s=30)


@integration
async def test_an_actors_own_timeout_is_not_taken_for_the_deadline(pair: ActorGroup) -> None:
    """Ray hands on an exception that has its cause's type too."""
    with pytest.raises(RoleError, match="TimeoutError: the disk did not answer"):
        await pair.one(0, "x", lambda a: a.give_up.remote(), deadline_s=30)


@integration
async def test_output_goes_to_the_log(pair: ActorGroup) -> None:
    """Whoever writes it: Python, a child process, a library underneath."""
    threads = await pair.each("speak", lambda a, _: a.speak.remote(), deadline_s=30)
    assert threads == ["1", "1"]  # the seat's environment
    for log in pair.logs:
        text = log.read_text()
        for words in ("printed", "complained", "from a child", "from below Python"):
            assert words in text


@integration
async def test_addresses_are_usable(pair: ActorGroup) -> None:
    host = await pair.one(0, "start", lambda a: a.node_ip.remote(), deadline_s=30)
    port = await pair.one(0, "start", lambda a: a.free_port.remote(), deadline_s=30)
    with socket.create_server((host, port)):
        pass


@integration
async def test_silence_is_a_timeout_within_the_deadline(ray_cluster: None, tmp_path: Path) -> None:
    with workers(2, tmp_path) as group:
        await group.each("sum", lambda a, _: a.add.remote(1, 1), deadline_s=60)
        with pytest.raises(RoleError, match=r"worker 1 failed in phase 'wait': Timeout: no answer within 0.5 s"):
            await group.each("wait", lambda a, r: a.hang.remote() if r else a.add.remote(1, 1), deadline_s=0.5)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@integration
async def test_a_dead_actor_is_reported_at_once(ray_cluster: None, tmp_path: Path) -> None:
    """Long before the deadline, though the other rank would wait for ever; nothing is left waiting."""
    with workers(2, tmp_path) as group:
        await group.each("sum", lambda a, _: a.add.remote(1, 1), deadline_s=60)
        with pytest.raises(RoleError, match=r"worker 1 failed in phase 'step': ActorDied: ") as caught:
            await group.each("step", lambda a, r: a.die.remote() if r else a.hang.remote(), deadline_s=3600)
        assert caught.value.log == str(group.logs[1])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(RoleError, match="ActorDied"):
            await group.one(1, "next", lambda a: a.add.remote(1, 1), deadline_s=60)


@integration
@pytest.mark.parametrize(("ending", "kind"), [("die", "ActorDied"), ("raise", "ZeroDivisionError")])
async def test_the_cause_is_reported_not_the_peers_broken_connection(
    ray_cluster: None, tmp_path: Path, ending: str, kind: str
) -> None:
    with workers(2, tmp_path) as group:
        port = await group.one(0, "listen", lambda a: a.listen.remote(), deadline_s=60)
        with pytest.raises(RoleError) as caught:
            await group.each("reduce", lambda a, r: a.work_with.remote(port if r else 0, ending), deadline_s=60)
    assert (caught.value.rank, caught.value.kind) == (0, kind)


@integration
async def test_a_constructor_that_fails_is_reported(ray_cluster: None, tmp_path: Path) -> None:
    with workers(1, tmp_path, "no such disk") as group, pytest.raises(RoleError, match="no such disk"):
        await group.one(0, "start", lambda a: a.add.remote(1, 1), deadline_s=60)


@integration
async def test_who_stops_waiting_leaves_nothing_waiting(pair: ActorGroup) -> None:
    """A cancelled wait (the run is interrupted, another role has failed) ends its own waits."""
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    outer = asyncio.create_task(pair.each("wait", lambda _, __: asyncio.shield(never), deadline_s=60))
    await asyncio.sleep(0)
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    assert asyncio.all_tasks() == {asyncio.current_task()}
    never.cancel()


@integration
async def test_killed_actors_are_gone(ray_cluster: None, tmp_path: Path) -> None:
    with workers(2, tmp_path) as group:
        pids = await group.each("pid", lambda a, _: a.__ray_call__.remote(lambda _: os.getpid()), deadline_s=60)
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes_of(pids), timeout=30)
    assert not alive


def processes_of(pids: list[int]) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def test_role_error_travels_between_processes() -> None:
    error = RoleError(role="learner", rank=1, phase="update", kind="ValueError", message="m", log="l.log")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "learner 1 failed in phase 'update': ValueError: m (log: l.log)"
    assert vars(copy) == vars(error)
    assert str(RoleError(role="r", rank=0, phase="p", kind="K", message="m")) == "r 0 failed in phase 'p': K: m"
