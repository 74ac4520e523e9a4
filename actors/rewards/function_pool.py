"""Rewards that are Python functions: a pool of processes that call one function, and its Ray Serve replica.

A call that takes too long, or whose process dies, costs that process and nothing else: a fresh one takes its place.
The function's source text travels with the pool, so that a replica on another node has it. It knows asyncio and
processes; Ray Serve sees only `FunctionReplica`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from actors.rewards import function_worker as reward_worker
from actors.rewards.circuit_breaker import Breaker
from actors.rewards.function_worker import IMPORT_S, LENGTH
from actors.rewards.score import Answer, unscored
from trainers.types import Prompt

ASYNC_CALLS = 64  # calls that one process of a coroutine function works on at once
BLOCKED_S = 2.0  # how long after its time limit a coroutine function may still hold the event loop
HOPELESS = 3  # calls in a row that hang or kill their process, after which the function is left alone for a while


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """A function, and how long one call of it may take."""

    path: str  # what `__file__` and tracebacks show
    source: str  # the file's text
    name: str
    timeout_s: float
    import_s: float = IMPORT_S


class WorkerError(Exception):
    """A worker process did not start, or did not live to answer; the text explains why."""


class _Worker:
    """One process with the function loaded."""

    def __init__(self, process: Process, spec: FunctionSpec) -> None:
        self._process, self._spec = process, spec
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = count()
        self._reader: asyncio.Task[None] | None = None
        self._ended: str | None = None  # why it takes no more calls
        self.batched = self.asynchronous = False

    @classmethod
    async def start(cls, spec: FunctionSpec) -> _Worker:
        """A process that has imported the file; WorkerError where it cannot."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", reward_worker.__file__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # so that what the function starts can be ended with it
        )
        worker = cls(process, spec)
        try:
            async with asyncio.timeout(spec.import_s):
                worker._send((spec.path, spec.source, spec.name, spec.timeout_s))
                hello = await worker._receive()
        except TimeoutError:
            await worker.kill("")
            raise WorkerError(f"{spec.path}: importing it took more than {spec.import_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise WorkerError(f"{spec.path}: the process ended while importing it ({await worker._exit()})") from None
        if "error" in hello:
            await worker.kill("")
            raise WorkerError(hello["error"])
        worker.batched, worker.asynchronous = hello["batched"], hello["asynchronous"]
        worker._reader = asyncio.create_task(worker._read())
        return worker

    @property
    def alive(self) -> bool:
        return self._ended is None

    async def call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's message. WorkerError: the process died or was killed, by this call or by one beside it."""
        if self._ended is not None:
            raise WorkerError(self._ended)
        identity = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._waiting[identity] = future
        limit = self._spec.timeout_s + (BLOCKED_S if self.asynchronous else 0)
        answered = False
        try:
            async with asyncio.timeout(limit):
                self._send((identity, dict(arguments)))
                message: dict[str, Any] = await future
                answered = True
                return message
        except TimeoutError:
            return {"timeout": True}
        finally:
            self._waiting.pop(identity, None)
            if not answered:  # timed out, cancelled or dead
                await self.kill("its process was stopped, since another call blocked it beyond the time limit")

    async def kill(self, cause: str) -> None:
        """End the process and all that it started; calls that wait for it fail with the cause."""
        self._ended = self._ended or cause
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._reader is not None and self._reader is not asyncio.current_task():
            await self._reader

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        body = pickle.dumps(message)
        self._process.stdin.write(LENGTH.pack(len(body)) + body)

    async def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        message: dict[str, Any] = json.loads(await self._process.stdout.readexactly(length))
        return message

    async def _read(self) -> None:
        try:
            while True:
                message = await self._receive()
                if (future := self._waiting.get(message["id"])) and not future.done():
                    future.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            died = f"{self._spec.path}: the process of {self._spec.name} {await self._exit()}"
            self._ended = self._ended or died
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(WorkerError(self._ended))

    async def _exit(self) -> str:
        code = await self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


class FunctionPool:
    """`workers` processes with one function, each replaced when it dies. Used from one event loop."""

    def __init__(self, spec: FunctionSpec, *, workers: int) -> None:
        self._spec = spec
        self._workers: list[_Worker | None] = [None] * workers
        self._locks = [asyncio.Lock() for _ in range(workers)]
        self._free: asyncio.Queue[int] = asyncio.Queue()  # a worker's index, once for each call that it may take
        self._breaker = Breaker(failures=HOPELESS)
        self._batched = False

    async def start(self) -> None:
        """Start every process; WorkerError where the file or the function cannot be used."""
        first = await self._worker(0)
        self._batched = first.batched
        await asyncio.gather(*(self._worker(i) for i in range(1, len(self._workers))))
        for _ in range(ASYNC_CALLS if first.asynchronous else 1):
            for index in range(len(self._workers)):
                self._free.put_nowait(index)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Answer]:
        """An answer for each completion."""
        n = len(completions)
        messages, columns = list(prompt.messages), dict(prompt.columns)
        if self._batched:
            repeated = {key: [value] * n for key, value in columns.items()}
            return await self._call({**repeated, "prompts": [messages] * n, "completions": list(completions)}, n)
        calls = ({**columns, "prompt": messages, "completion": completion} for completion in completions)
        answers = await asyncio.gather(*(self._call(call, 1) for call in calls))
        return [answer for (answer,) in answers]

    async def close(self) -> None:
        """End every process."""
        await asyncio.gather(*(worker.kill("the pool was closed") for worker in self._workers if worker is not None))

    async def _call(self, arguments: Mapping[str, Any], n: int) -> list[Answer]:
        index = await self._free.get()
        try:
            if refusal := self._breaker.refusal():
                return unscored(refusal, n)
            message = await (await self._worker(index)).call(arguments)
        except WorkerError as error:
            self._breaker.failed(str(error))
            return unscored(str(error), n)
        finally:
            self._free.put_nowait(index)
        if "timeout" in message:
            cause = f"{self._spec.path}: {self._spec.name} took more than {self._spec.timeout_s:g} s"
            self._breaker.failed(cause)
            return unscored(cause, n)
        self._breaker.succeeded()
        return self._answers(message, n)

    def _answers(self, message: Mapping[str, Any], n: int) -> list[Answer]:
        if "cause" in message:
            return unscored(message["cause"], n)
        values = message["value"]
        where = f"{self._spec.path}: {self._spec.name} returned"
        if len(values) != n:
            return unscored(f"{where} {len(values)} scores for {n} completions", n)
        return [Answer(value, f"{where} None" if value is None else None) for value in values]

    async def _worker(self, index: int) -> _Worker:
        async with self._locks[index]:
            worker = self._workers[index]
            if worker is None or not worker.alive:
                worker = self._workers[index] = await _Worker.start(self._spec)
            return worker


class FunctionReplica:
    """The pool as a Ray Serve deployment."""

    def __init__(self, spec: FunctionSpec, workers: int) -> None:
        self._spec, self._count = spec, workers
        self._pool: FunctionPool | None = None
        self._starting = asyncio.Lock()

    async def check(self) -> str | None:
        """Start the processes; what is wrong with the user's file, if anything."""
        try:
            await self._started()
        except WorkerError as error:
            return str(error)
        return None

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Answer]:
        """An answer for each completion."""
        try:
            pool = await self._started()
        except WorkerError as error:  # of a replica that Serve has restarted
            return unscored(str(error), len(completions))
        return await pool.score(prompt, completions)

    async def _started(self) -> FunctionPool:
        async with self._starting:
            if self._pool is None:
                pool = FunctionPool(self._spec, workers=self._count)
                try:
                    await pool.start()
                except WorkerError:
                    await pool.close()
                    raise
                self._pool = pool
            return self._pool


def read_function(file: Path, name: str, *, timeout_s: float) -> FunctionSpec:
    """The spec of a function in a file, which is read now."""
    return FunctionSpec(path=str(file), source=file.read_text(encoding="utf-8-sig"), name=name, timeout_s=timeout_s)
