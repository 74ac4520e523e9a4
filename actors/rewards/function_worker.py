"""The process that calls one user's reward function; started by `function_pool` as a script of its own.

It knows the standard library only, so that it starts in a few hundredths of a second and the user's file finds
nothing of ours in its way. It talks over what was its standard input and output: frames of a length (8 bytes, big
endian) and a pickle (to the worker) or JSON (from it). What the user's code prints goes to standard error.

First frame: path, source text and name of the function, and the time limit. Answer: {"form"} or {"error"}.
Then for each call: (id, keyword arguments) → {"id", "value"} or {"id", "cause"}.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import linecache
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

LENGTH = struct.Struct(">Q")
LONGEST_TEXT = 500
IMPORT_S = 120.0  # for the user's file, in a new process
DIE_WITH_PARENT = 1  # Linux: prctl(PR_SET_PDEATHSIG)


class LoadError(Exception):
    """The user's file or function cannot be used; the text explains why."""


@dataclass(frozen=True)
class Target:
    """The loaded function: how to call it, and what to report when that fails."""

    function: Callable[..., Any]
    path: str
    name: str

    @property
    def batched(self) -> bool:
        """Takes `completions`, not `completion`."""
        return "completions" in inspect.signature(self.function).parameters

    @property
    def asynchronous(self) -> bool:
        """Is a coroutine function."""
        return inspect.iscoroutinefunction(self.function)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The given arguments that the function takes; without **columns it gets the columns that it names."""
        signature = inspect.signature(self.function)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        taken = given if open_ended else {key: value for key, value in given.items() if key in signature.parameters}
        signature.bind(**taken)  # TypeError where a column is missing, before any of the user's code runs
        return taken

    def cause(self, error: BaseException) -> str:
        """Place, function, exception and message, as the user will read it."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.path]
        where = f"{self.path}:{frames[-1].lineno}" if frames else self.path
        text = str(error)
        shown = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
        return f"{where}: {self.name} raised {type(error).__name__}{': ' if shown else ''}{shown}"


def load(path: str, source: str, name: str) -> Target:
    """The function `name` of a file whose text is `source`; `path` is what tracebacks and `__file__` show."""
    module = ModuleType(f"reward_file_{os.path.splitext(os.path.basename(path))[0]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    sys.path.insert(0, os.path.dirname(path))
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 0
        raise LoadError(f"{path}:{line}: importing it raised {type(error).__name__}: {error}") from error
    function = module.__dict__.get(name)
    if not callable(function):
        raise LoadError(f"{path}: {'has no' if function is None else 'this is no'} function {name!r}")
    if wrong := signature_problem(list(inspect.signature(function).parameters.values()), name):
        raise LoadError(f"{path}: {wrong}")
    return Target(function, path, name)


def signature_problem(parameters: list[inspect.Parameter], name: str) -> str | None:
    """What is wrong with a reward function's parameters; None: nothing."""
    names = {p.name for p in parameters}
    if names >= {"completion", "completions"} or not names & {"completion", "completions"}:
        return (
            f"{name} must take either completion (one call each) or completions (one call for all), "
            "as in `def reward(*, prompt, completion, **columns)`"
        )
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if positional:
        return f"{name} is called with keywords only, but {positional[0]} is positional-only"
    other = ("prompt", "completions") if "completions" in names else ("prompts", "completion")
    if wrong := next((p for p in parameters if p.name == other[0] and p.default is p.empty), None):
        return (
            f"{name} takes {wrong.name} together with {other[1]}; use prompt with completion, prompts with completions"
        )
    return None


class Channel:
    """Frames in, frames out, over the pipes that were standard input and output."""

    def __init__(self) -> None:
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.close(null)

    def frames(self) -> Iterator[Any]:
        """What the parent sends, until it closes its end."""
        while len(head := self._in.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            yield pickle.loads(self._in.read(length))

    def send(self, message: dict[str, Any]) -> None:
        """One JSON object."""
        body = json.dumps(message).encode()
        self._out.write(LENGTH.pack(len(body)) + body)
        self._out.flush()


def plain(value: Any) -> Any:
    """Numbers of any kind as float, lists, tuples and arrays (numpy's and torch's) as lists; the rest as it is."""
    if not isinstance(value, str | bytes | list | tuple) and callable(to_list := getattr(value, "tolist", None)):
        value = to_list()  # of a scalar: the plain number
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, int) else value


def answer(identity: int, value: Any, target: Target) -> dict[str, Any]:
    """The message for what a function returned."""
    value = plain(value)
    items = value if target.batched and isinstance(value, list) else [value]
    strange = next((item for item in items if item is not None and not isinstance(item, float)), None)
    if strange is not None or (target.batched and not isinstance(value, list)):
        found = value if strange is None else strange
        wanted = "a list of numbers or None" if target.batched else "a number or None"
        cause = f"{target.path}: {target.name} returned {type(found).__name__} {str(found)[:60]!r}, not {wanted}"
        return {"id": identity, "cause": cause}
    return {"id": identity, "value": items}


def serve(target: Target, channel: Channel) -> None:
    """Call after call; in the main thread, so that functions may use signals for limits of their own."""
    for identity, given in channel.frames():
        try:
            message = answer(identity, target.function(**target.arguments(given)), target)
        except BaseException as error:  # noqa: BLE001 — the boundary to the user's code, sys.exit included; reported
            message = {"id": identity, "cause": target.cause(error)}
        channel.send(message)


def serve_async(target: Target, channel: Channel, timeout_s: float) -> None:
    """As many calls at once as are sent; each is cancelled at the time limit."""
    loop = asyncio.new_event_loop()

    async def call(identity: int, given: dict[str, Any]) -> None:
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                message = answer(identity, await target.function(**target.arguments(given)), target)
        except BaseException as error:  # noqa: BLE001 — the boundary to the user's code; reported
            message = {"id": identity, "cause": target.cause(error)}
            if deadline.expired():
                message = {"id": identity, "timeout": True}
        channel.send(message)

    def read() -> None:
        for identity, given in channel.frames():
            asyncio.run_coroutine_threadsafe(call(identity, given), loop)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    loop.run_forever()


def main() -> None:
    """One function until the parent closes the pipe or dies."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            return
    channel = Channel()
    path, source, name, timeout_s = next(channel.frames())
    try:
        target = load(path, source, name)
    except LoadError as error:
        channel.send({"error": str(error)})
        return
    channel.send({"batched": target.batched, "asynchronous": target.asynchronous})
    if target.asynchronous:
        serve_async(target, channel, timeout_s)
    else:
        serve(target, channel)


if __name__ == "__main__":
    main()
