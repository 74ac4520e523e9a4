"""A process that has imported what roles need, and forks for every worker that Ray starts on this machine.

Importing torch, vLLM, DeepSpeed and Ray Serve takes each role 10 to 20 seconds of a CPU and half a gigabyte; a fork has
them at once, and shares their memory. Ray runs `forking_python.py` in place of Python, which asks this process for a
fork. What is imported may start no thread that a fork needs (a fork has one) and may not touch a GPU, whose state does
not survive a fork: only for machines without one. It knows the operating system, and of Ray how it starts a worker.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from actors.runtime.scratch_folder import scratch_folder

SCRATCH = "rlhf-forks-"
_CLIENT = Path(__file__).with_name("forking_python.py")
_STREAMS = (0, 1, 2)
_PATIENCE_S = 40  # for a caller to say what it wants


@contextmanager
def fork_server(modules: Iterable[str], environment: Mapping[str, str]) -> Iterator[str]:
    """The process, importing `modules`; gives the command that takes Python's place (a script and arguments follow).

    It ends with the block, and with this process however that ends; its forks go on.
    """
    home = Path(os.environ.get("RAY_TMPDIR") or "/tmp")  # not TMPDIR: the path of a socket must stay short
    with scratch_folder(SCRATCH, home) as folder:
        address = str(folder / "socket")
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, address, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries complain when they are imported
            env=os.environ | environment,
        )
        with starter:
            assert starter.stdin is not None
            assert starter.stdout is not None
            server = starter.stdout.readline()  # its process id; nothing where it could not start: Python does it all
            try:
                yield shlex.join([sys.executable, "-ISB", str(_CLIENT), address])
            finally:
                starter.stdin.close()
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(server), signal.SIGKILL)  # it may be importing


def detach() -> None:
    """Continue as a process that is no child of the starter's, and print its id. Ray stops a job by a signal to its
    process and all descendants; the workers, which are children of this process, must live until the run is saved."""
    if server := os.fork():
        print(server, flush=True)
        os._exit(0)
    os.setsid()  # Ctrl-C is for the driver
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def serve(address: str, modules: Sequence[str]) -> None:
    """Import the modules, then fork for everybody who asks, until the starter is gone."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)  # who asks too early waits for the imports
        _import(modules)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork: it leaves nothing when it ends
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            caller = listener.accept()[0]
            with warnings.catch_warnings(action="ignore"):  # of threads: those that libraries have started survive
                child = os.fork() == 0
            if child:
                listener.close()
                _become(caller)
                return
            caller.close()


def _import(modules: Sequence[str]) -> None:
    """Not Ray: its library reads the environment once, when it is imported, and that must be the fork's own."""
    sys.modules["ray"] = None  # type: ignore[assignment]  # what would import it, does without
    for module in modules:
        importlib.import_module(module)
    del sys.modules["ray"]
    gc.collect()
    gc.freeze()  # collections in a fork leave the memory of what was imported shared


def _become(caller: socket.socket) -> None:
    """Do what the caller would have done: run a script with its arguments, environment, folder and streams."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray has it for its workers
    os.setpgid(0, 0)  # Ray ends the group of a worker
    with caller:
        caller.settimeout(_PATIENCE_S)
        message, streams = _received(caller)
        arguments, environment, folder = json.loads(message)
        for stream, target in zip(streams, _STREAMS, strict=True):
            os.dup2(stream, target)
            os.close(stream)
        caller.sendall(b"done")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None and "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP has read it when it was loaded
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _received(caller: socket.socket) -> tuple[bytes, Sequence[int]]:
    message, streams, *_ = socket.recv_fds(caller, 1 << 16, len(_STREAMS))
    while not message.endswith(b"\n"):
        if not (more := caller.recv(1 << 16)):
            raise EOFError("the caller has ended")
        message += more
    return message, streams


if __name__ == "__main__":
    detach()
    serve(sys.argv[1], sys.argv[2:])
