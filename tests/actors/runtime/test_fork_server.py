"""Forks in place of Python: the script sees what its caller would have given it, and nothing outlives its purpose."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from actors.runtime.fork_server import SCRATCH, fork_server

SCRIPT = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "variables": {name: os.environ.get(name) for name in ("CALLERS", "STARTERS")},
    "read": sys.stdin.read(),
    "loaded": [name for name in ("colorsys", "ray", "torch") if name in sys.modules],
    "main": __name__,
    "parent": os.getppid(),
    "group": os.getpgid(0) == os.getpid(),
}))
print("trouble", file=sys.stderr)
sys.exit(0)
"""
HOLD = """
import sys
from actors.runtime.fork_server import fork_server
with fork_server([], {}):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


@pytest.fixture
def python(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("STARTERS", "not for the fork")
    with fork_server(["colorsys"], {"OMP_NUM_THREADS": "1"}) as command:
        wait_for(lambda: list(scratch.glob(f"{SCRATCH}*/socket")))
        yield command


def wait_for(condition: object, within_s: float = 60.0) -> None:
    """Until the condition holds; a failure names how long it was waited for."""
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.02)


def run(python: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "STARTERS"} | {"CALLERS": "ü"}
    command = [*shlex.split(python), str(script), *arguments]
    output, errors = tmp_path / "out", tmp_path / "err"
    with output.open("w") as out, errors.open("w") as err:
        done = subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            input="from the caller",
            text=True,
            stdout=out,
            stderr=err,
            timeout=60,
        )
    wait_for(lambda: "trouble" in errors.read_text())  # the fork may outlive who asked for it
    return subprocess.CompletedProcess(command, done.returncode, output.read_text(), errors.read_text())


def servers_in(scratch: Path) -> list[psutil.Process]:
    """Live fork servers whose sockets are there; not their forks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            arguments = process.cmdline()
            if "actors.runtime.fork_server" in arguments and any(a.startswith(str(scratch)) for a in arguments):
                found.append(process)
    return found


def server_in(scratch: Path) -> psutil.Process:
    (server,) = servers_in(scratch)
    return server


def test_a_fork_has_the_callers_everything_and_the_modules(python: str, tmp_path: Path, scratch: Path) -> None:
    done = run(python, tmp_path, "--one", "two words", "x" * 100_000)
    seen = json.loads(done.stdout)
    server = server_in(scratch)
    assert server.ppid() not in (os.getpid(), psutil.Process().ppid())  # who ends this process and its children
    assert seen == {
        "arguments": ["--one", "two words", "x" * 100_000],
        "folder": str(tmp_path),
        "variables": {"CALLERS": "ü", "STARTERS": None},
        "read": "from the caller",
        "loaded": ["colorsys"],
        "main": "__main__",
        "parent": server.pid,
        "group": True,
    }
    wait_for(lambda: not server.children())  # nobody waits for a fork, and yet none stays as a zombie
    assert json.loads(run(python, tmp_path).stdout)["parent"] == server.pid  # not only once


def test_without_a_server_python_does_it(python: str, tmp_path: Path, scratch: Path) -> None:
    (socket,) = scratch.glob(f"{SCRATCH}*/socket")
    socket.unlink()
    done = run(python, tmp_path, "a")
    seen = json.loads(done.stdout)
    assert (seen["arguments"], seen["loaded"], done.returncode) == (["a"], [], 0)


def test_a_module_that_cannot_be_imported_leaves_python_to_do_it(scratch: Path, tmp_path: Path) -> None:
    with fork_server(["no_such_module"], {}) as python:
        wait_for(lambda: servers_in(scratch) == [])
        assert json.loads(run(python, tmp_path).stdout)["loaded"] == []


def test_a_server_that_cannot_start_leaves_python_to_do_it(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.runtime.fork_server.__name__", "no_such_module")  # what Python is asked to run
    with fork_server([], {}) as python:
        assert json.loads(run(python, tmp_path).stdout)["main"] == "__main__"


def test_it_ends_with_the_block(scratch: Path) -> None:
    with fork_server([], {}):
        server_in(scratch)
    wait_for(lambda: servers_in(scratch) == [])
    assert list(scratch.iterdir()) == []


def test_it_ends_with_a_starter_that_is_killed(scratch: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    wait_for(lambda: list(scratch.glob(f"{SCRATCH}*/socket")))
    server_in(scratch)
    holder.kill()
    holder.communicate()
    wait_for(lambda: servers_in(scratch) == [])
