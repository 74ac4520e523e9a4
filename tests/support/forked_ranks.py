"""Learners whose ranks are forks of one process that has the imports done; `LearnerGroup` sees an `ActorGroup`.

What is under test is the same: `LearnerGroup` with its deadlines, `Learner`, DeepSpeed, gloo over the loopback. What is
not there is Ray, which one cut of every file keeps.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import ray

from actors.config import LearnerConfig
from actors.learner.actor import Learner
from actors.learner.group import learner_seats
from actors.messages import LearnerSpec
from actors.runtime.actor_group import ActorGroup
from actors.runtime.layout import Layout

START_S = 120.0


class RankError(RuntimeError):
    """What a rank raised, with its traceback; or that it is gone."""


class Loopback:
    """Beside every rank: where the others find it."""

    def node_ip(self) -> str:
        return "127.0.0.1"

    def free_port(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return int(listener.getsockname()[1])


class ForkedRank:
    """A rank as the test holds it: `rank.method.remote(...)` is awaitable, as of Ray's handles."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection = connection
        self.pid = pid
        self._calls = 0

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(partial(self._call, method))

    def _call(self, method: str, *arguments: Any, **keywords: Any) -> asyncio.Future[Any]:
        """One call at a time; a result that is no longer waited for is dropped."""
        self._calls += 1
        number, loop = self._calls, asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def read() -> None:
            try:
                answered, result, error = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                answered, result, error = number, None, f"rank {self.pid} has died"
            if answered != number:
                return
            loop.remove_reader(self._connection.fileno())
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(RankError(error))

        loop.add_reader(self._connection.fileno(), read)
        self._connection.send_bytes(ray.cloudpickle.dumps((number, method, arguments, keywords)))
        return future

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._connection.close()


class _Method:
    def __init__(self, remote: Callable[..., asyncio.Future[Any]]) -> None:
        self.remote = remote


class ForkedGroup(ActorGroup):
    """An `ActorGroup` of such ranks."""

    def kill(self) -> None:
        for rank in self.actors:
            cast("ForkedRank", rank).kill()


class ForkServer:
    """The process that ranks are forked from; it has the environment of a learner's seat with one thread."""

    def __init__(self) -> None:
        one = Layout(bundles=[], generators=[], learners=[0], generator_gpus=0.0, learner_gpus=0.0)
        [seat] = learner_seats(one, cast("Any", None), LearnerConfig(threads=1), Path())
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                env=os.environ | dict(seat.env),
                pass_fds=[theirs.fileno()],
            )
        self._control.settimeout(START_S)
        self._ready = False

    def fork(self, make: Callable[[], Any], log: Path) -> ForkedRank:
        """A process with the object that `make` makes; the first waits until the imports are done."""
        if not self._ready:
            self._ready = self._control.recv(16) == b"ready"
        if not self._ready:
            raise RankError("the fork server has not started")
        mine, theirs = Pipe()
        with theirs:
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        mine.send_bytes(ray.cloudpickle.dumps((make, str(log))))
        if not mine.poll(START_S):
            raise RankError(f"no rank within {START_S:g} s")
        return ForkedRank(mine, pickle.loads(mine.recv_bytes()))

    def learners(self, cls: type[Learner], spec: LearnerSpec, logs: Path) -> AbstractContextManager[ForkedGroup]:
        """A learner for each rank, not started."""
        world_size = spec.learners.workers
        learner = type(cls.__name__, (cls, Loopback), {})
        return self.group(
            [partial(learner, spec, rank=rank, world_size=world_size) for rank in range(world_size)],
            [logs / f"learner-{rank}.log" for rank in range(world_size)],
        )

    @contextmanager
    def group(self, makers: Sequence[Callable[[], Any]], logs: Sequence[Path]) -> Iterator[ForkedGroup]:
        """What each of them makes, in a process of its own; ended at the end."""
        ranks: list[ForkedRank] = []
        try:
            for make, log in zip(makers, logs, strict=True):
                ranks.append(self.fork(make, log))
            yield ForkedGroup("learner", cast("Any", ranks), logs)
        finally:
            for rank in ranks:
                rank.kill()

    def close(self) -> None:
        self._control.close()
        self._process.wait(timeout=30)
