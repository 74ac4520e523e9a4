"""A process that has imported what a learner needs, and forks a rank for every connection that it is handed.

Importing torch, transformers and DeepSpeed takes 14 seconds of a CPU; a fork has it done. It runs nothing before a
fork that starts threads (no OpenMP region, no collective), because threads do not survive a fork. Run as
`python -m tests.support.fork_server FD`; `forked_ranks.py` is the other side.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIBRARIES = (
    "bitsandbytes",
    "deepspeed",
    "peft",
    "transformers.integrations.bitsandbytes",
    "transformers.integrations.deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "actors.learner.actor",
    "actors.learner.models",
    "actors.modeling.merge",
    "actors.modeling.quantized",
)


def serve(connection: Connection) -> None:
    """Make the object of the first message, then call its methods until the tests close the connection."""
    make, log = pickle.loads(connection.recv_bytes())
    redirect_output(Path(log))
    target = make()
    connection.send_bytes(pickle.dumps(os.getpid()))
    while True:
        try:
            number, method, arguments, keywords = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reply = number, getattr(target, method)(*arguments, **keywords), None
        except Exception:  # noqa: BLE001 - the boundary to what is under test: reported to the test
            reply = number, None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(reply))


def redirect_output(log: Path) -> None:
    """Send what this process prints to a file, as the actors do."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def reap() -> None:
    """Take leave of the ranks that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    """Fork until the tests close their end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for library in LIBRARIES:
        importlib.import_module(library)
    threads: Any = [*threading.enumerate(), *os.listdir("/proc/self/task")]
    assert len(threads) == 2, f"a fork would lose threads: {threads}"
    control.send(b"ready")
    while (received := socket.recv_fds(control, 1, 1))[0]:
        (descriptor,) = received[1]
        reap()
        if os.fork() == 0:
            control.close()
            serve(Connection(descriptor))
            os._exit(0)
        os.close(descriptor)


if __name__ == "__main__":
    main()
