"""`rlhf` commands that follow one another in one process, with one Ray and one Ray Serve for all of them.

A run spends most of half a minute on importing what its driver needs and on starting Ray and Ray Serve; here that
happens once. Each run still has roles of its own, in processes of their own. What starting and ending a cluster is
about is tested with processes of their own (`test_train.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended, and what it printed."""

    code: int
    output: str


class WarmRlhf:
    """The process; it starts with the first command and is ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: str) -> Finished:
        """Run `rlhf ARGUMENTS`."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.support.warm_rlhf", str(self._folder)]
            environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process ended with {self._process.wait()}"
        return Finished(**json.loads(answer))

    def close(self) -> None:
        """End the process, and with it Ray."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(timeout=120) == 0
        finally:
            self._process.kill()


def main(folder: Path) -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with _cluster():
        for line in requests:
            with tempfile.TemporaryFile("w+", dir=folder) as output:
                code = _rlhf(json.loads(line), output)
                output.seek(0)
                print(json.dumps({"code": code, "output": output.read()}), file=answers, flush=True)


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """As `rlhf train` makes it for itself, with Ray Serve, which then outlives every run."""
    from ray import serve

    from cluster.training.launch import ray_cluster
    from cluster.training.preloading import preloaded_python

    with preloaded_python() as python, ray_cluster(python):
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        try:
            yield
        finally:
            serve.shutdown()


def _rlhf(arguments: list[str], output: IO[str]) -> int:
    """Its exit code; all that it prints goes to `output`."""
    from cluster.cli.main import app

    before = os.dup(1), os.dup(2)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    try:
        app(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
