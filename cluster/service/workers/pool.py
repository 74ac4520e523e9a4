"""Work that needs a model or much time, in a process of its own: the service stays small, quick and free of torch.

A helper runs `main.py` and speaks lines of JSON with it, one request at a time. It knows nothing of
what the work is. A deadline that passes ends the process; the next request starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from cluster.service.exceptions import DeadlineError, InternalError
from cluster.service.workers.messages import Reply, Work
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 28  # bytes of one answer
_IDLE_S = 600.0
_END_S = 5.0
_COMMAND = (sys.executable, "-m", "cluster.service.workers.main")


class Helper:
    """One process, started when it is needed and ended when it has had nothing to do for ten minutes."""

    def __init__(self, command: Sequence[str] = _COMMAND) -> None:
        self._command = command
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request would have to wait."""
        return self._turn.locked()

    async def call(self, work: Work, *, deadline_s: float) -> Any:
        """The result of one piece of work. Raises UserError as the work did; DeadlineError past the deadline."""
        result = None
        async with contextlib.aclosing(self.stream(work, deadline_s=deadline_s)) as answers:
            async for kind, value in answers:
                if kind == "result":
                    result = value
        return result

    async def stream(self, work: Work, *, deadline_s: float) -> AsyncGenerator[tuple[str, Any], None]:
        """("piece", value) as they come, then ("result", value). Leaving early ends the process's work. The deadline is
        that of the wait for others' work, and then that of this one."""
        async with self._taking_turns(work.work, deadline_s):
            self._keep()
            complete = False
            until = asyncio.get_running_loop().time() + deadline_s
            try:
                async with asyncio.timeout_at(until):
                    process = await self._running()
                    await _ask(process, work)
                while not complete:
                    # Never around the yield: it would cancel whatever the caller awaits between two pieces.
                    async with asyncio.timeout_at(until):
                        kind, value = await _answer(process)
                    complete = kind == "result"
                    yield kind, value
            except TimeoutError:
                raise DeadlineError(f"{work.work} took longer than {deadline_s:g} s and was ended") from None
            except UserError:
                complete = True
                raise
            finally:
                if complete:
                    self._rest()
                else:
                    await self.close()

    @contextlib.asynccontextmanager
    async def _taking_turns(self, work: str, deadline_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline_s):
                await self._turn.acquire()
        except TimeoutError:
            raise DeadlineError(f"{work} waited longer than {deadline_s:g} s for what came before") from None
        try:
            yield
        finally:
            self._turn.release()

    async def close(self) -> None:
        """End the process, if there is one."""
        self._keep()
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
            )
        return self._process

    def _keep(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _rest(self) -> None:
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(_IDLE_S, self._retire)

    def _retire(self) -> None:
        if self._process is not None and self._process.returncode is None and not self.busy:
            self._process.kill()


async def _ask(process: asyncio.subprocess.Process, work: Work) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(work.model_dump()).encode() + b"\n")
    await process.stdin.drain()


async def _answer(process: asyncio.subprocess.Process) -> tuple[str, Any]:
    """The next line of the process."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise DeadlineError("the helper process ended without an answer (out of memory?); try again")
    reply = Reply.model_validate(json.loads(line))
    if reply.kind == "problems":
        raise UserError([Problem(where, message) for where, message in reply.value])
    if reply.kind == "failed":
        logger.error("a helper's work failed: %s", reply.value)
        raise InternalError()
    return reply.kind, reply.value
