"""Ray, applied in one place: launching an actor, and waiting for it with a deadline and a named cause.

It knows Ray, and no role.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_INNER_SHARE = 0.9
_GRACE_S = 1.0  # a rank that dies takes others with it: the cause is the first, but may be reported second


def peak_memory() -> int:
    """The most host memory that this process ever held, in bytes; getrusage's, where Linux tells no other, may be that
    of the process that started this one."""
    found = _PEAK.search(Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"))
    kibibytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


def inner_deadline(outer_s: float) -> float:
    """The deadline of waits inside a call whose own deadline is `outer_s`: shorter, so that the inner cause is the one
    that is reported.

    >>> inner_deadline(600)
    540.0
    """
    return _INNER_SHARE * outer_s


class RoleError(RuntimeError):
    """Something failed in a role; the text is what the user sees first."""

    def __init__(self, *, role: str, rank: int, phase: str, kind: str, message: str, log: str | None = None) -> None:
        self.role, self.rank, self.phase, self.kind, self.message, self.log = role, rank, phase, kind, message, log
        where = f" (log: {log})" if log else ""
        super().__init__(f"{role} {rank} failed in phase {phase!r}: {kind}: {message}{where}")

    def with_log(self, log: Path) -> RoleError:
        """The same error with the role's log file."""
        return RoleError(
            role=self.role, rank=self.rank, phase=self.phase, kind=self.kind, message=self.message, log=str(log)
        )

    def __reduce__(self) -> tuple[Callable[..., RoleError], tuple[Any, ...]]:
        return _rebuild, (self.role, self.rank, self.phase, self.kind, self.message, self.log)


def _rebuild(*fields: Any) -> RoleError:
    names = ("role", "rank", "phase", "kind", "message", "log")
    return RoleError(**dict(zip(names, fields, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where an actor sits and what it may use."""

    group: PlacementGroup
    bundle: int
    cpus: float
    gpus: float
    env: Mapping[str, str] = field(default_factory=dict)
    log: Path  # takes what the process prints


class _Host:
    """Beside every launched role: its log file, and what only its own node can tell."""

    def redirect_output(self, path: str) -> None:
        """Send what this process prints to a file."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file, descriptor)
        os.close(file)

    def peak_memory(self) -> int:
        """The most host memory that this process ever held, in bytes."""
        return peak_memory()

    def node_ip(self) -> str:
        """The address under which other nodes reach this one."""
        return str(ray.util.get_node_ip_address())

    def free_port(self) -> int:
        """A port that nobody listens on now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])


def launch(cls: type[Any], seat: Seat, *args: Any, **kwargs: Any) -> ActorHandle:
    """A plain class as a Ray actor in its seat; its constructor must be cheap, loading belongs to a phase."""
    actor_class: Any = ray.remote(type(cls.__name__, (cls, _Host), {}))
    actor = actor_class.options(
        num_cpus=seat.cpus,
        num_gpus=seat.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=seat.group, placement_group_bundle_index=seat.bundle
        ),
        runtime_env={"env_vars": dict(seat.env)},
        max_restarts=0,
    ).remote(*args, **kwargs)
    actor.redirect_output.remote(str(seat.log))
    return actor


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """Actors of one role; `each` calls all of them at once and waits, `one` a single one."""

    role: str
    actors: Sequence[ActorHandle]
    logs: Sequence[Path]

    async def each(self, phase: str, call: Callable[[Any, int], Any], *, deadline_s: float) -> list[Any]:
        """`call(handle, rank)` on every actor; results in the order of the ranks, or the first failure."""
        waits = [
            asyncio.ensure_future(self._result(call(actor, rank), rank, phase, deadline_s))
            for rank, actor in enumerate(self.actors)
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_EXCEPTION)
            await asyncio.wait(waits, timeout=_GRACE_S)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
        failures = [error for wait in waits if not wait.cancelled() and (error := wait.exception()) is not None]
        if failures:
            raise _most_telling(failures)
        return [wait.result() for wait in waits]

    async def one(self, rank: int, phase: str, call: Callable[[Any], Any], *, deadline_s: float) -> Any:
        """`call(handle)` on the actor of that rank."""
        return await self._result(call(self.actors[rank]), rank, phase, deadline_s)

    def kill(self) -> None:
        """End every actor at once."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)

    async def _result(self, ref: Awaitable[Any], rank: int, phase: str, deadline_s: float) -> Any:
        log = str(self.logs[rank])
        try:
            async with asyncio.timeout(deadline_s):
                return await ref
        except RayError as error:  # before TimeoutError, which it may be too: Ray gives it its cause's type
            if isinstance(error, RayTaskError) and isinstance(error.cause, RoleError):
                raise error.cause from None  # this role waited for another one, which is the one to name
            kind, message = explain(error)
        except TimeoutError:
            kind, message = "Timeout", f"no answer within {deadline_s:g} s"
        raise RoleError(role=self.role, rank=rank, phase=phase, kind=kind, message=message, log=log)


def explain(error: RayError) -> tuple[str, str]:
    """What happened, as a kind and a message: of an exception in the actor, its own; of a dead actor, Ray's report."""
    if isinstance(error, RayTaskError):
        return type(error.cause).__name__, str(error.cause) or "(no message)"
    if isinstance(error, ActorDiedError):
        return "ActorDied", _died(error)
    return type(error).__name__, str(error)


def _died(error: ActorDiedError) -> str:
    text = str(error).strip().splitlines()
    return " ".join(line.strip() for line in text if line.strip())[:600]


def _most_telling(failures: Sequence[BaseException]) -> BaseException:
    """A dead process and an exception of our own explain a peer's broken connection, not the other way round."""

    def weight(error: BaseException) -> int:
        if not isinstance(error, RoleError):
            return 0
        if error.kind == "ActorDied":
            return 1
        if error.kind == "Timeout":
            return 3
        return 4 if "Connection" in error.message or "closed by peer" in error.message else 2

    return min(failures, key=weight)
