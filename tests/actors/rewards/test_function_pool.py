"""The process pool of reward functions: both forms, and everything that a user's function can do wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.rewards.function_pool import HOPELESS, FunctionPool, WorkerError, read_function
from actors.rewards.score import Answer
from tests.support.processes import descendants_running
from trainers.types import Prompt

PROMPT = Prompt(
    messages=({"role": "user", "content": "2+2="},), columns={"answer": "4", "level": 2}, source="p.jsonl", line=7
)

Open = Callable[..., Any]


@pytest.fixture
def pool_of(tmp_path: Path) -> Open:
    @asynccontextmanager
    async def open_pool(source: str, name: str, *, timeout_s: float = 20, workers: int = 1) -> AsyncIterator[Any]:
        file = tmp_path / "rules.py"
        file.write_text(source)
        pool = FunctionPool(read_function(file, name, timeout_s=timeout_s), workers=workers)
        try:
            await pool.start()
            yield pool
        finally:
            await pool.close()
            assert descendants_running("function_worker") == []

    return open_pool


async def scores(pool: FunctionPool, completions: Sequence[str]) -> list[float | None]:
    return [answer.value for answer in await pool.score(PROMPT, completions)]


async def cause(pool: FunctionPool, completion: str = "x") -> str:
    (answer,) = await pool.score(PROMPT, [completion])
    assert answer.value is None
    assert answer.cause is not None
    return answer.cause


SINGLE = """
def reward(*, prompt, completion, **columns):
    assert prompt == [{"role": "user", "content": "2+2="}] and columns == {"answer": "4", "level": 2}
    return completion == columns["answer"]
"""
ASYNC = """
import asyncio
async def reward(*, prompt, completion, answer):
    await asyncio.sleep(0)
    return 1 if completion == answer else None
"""
BATCHED = """
def rewards(*, prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) and prompts[0] == [{"role": "user", "content": "2+2="}]
    assert columns == {"level": [2] * len(prompts)}
    return [float(a == c) for a, c in zip(answer, completions)]
"""
ASYNC_BATCHED = """
async def rewards(*, completions, **_):
    return tuple(len(c) for c in completions)
"""


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (SINGLE, "reward", [1.0, 0.0, 0.0]),
        (ASYNC, "reward", [1.0, None, None]),
        (BATCHED, "rewards", [1.0, 0.0, 0.0]),
        (ASYNC_BATCHED, "rewards", [1.0, 1.0, 4.0]),
        ("import numpy\ndef f(completion, **_): return numpy.float32(0.5)", "f", [0.5] * 3),
        ("import numpy\ndef f(completion, **_): return numpy.bool_(True)", "f", [1.0] * 3),
        ("import numpy\ndef f(completions, **_): return numpy.arange(len(completions))", "f", [0.0, 1.0, 2.0]),
        ("def f(completion, **_):\n  print('noise')\n  return input", "f", [None] * 3),
    ],
)
async def test_forms(pool_of: Open, source: str, name: str, expected: list[float | None]) -> None:
    async with pool_of(source, name) as pool:
        assert await scores(pool, ["4", "5", "four"]) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no digits')", "rules.py:2: f raised ValueError: no digits"),
        ("return columns['missing']", "rules.py:2: f raised KeyError: 'missing'"),
        ("return 'good'", "rules.py: f returned str 'good', not a number or None"),
        ("return [1.0]", "rules.py: f returned list '[1.0]', not a number or None"),
        ("return None", "rules.py: f returned None"),
        ("import sys; sys.exit(3)", "rules.py:2: f raised SystemExit: 3"),
        ("import os; os._exit(4)", "rules.py: the process of f exited with code 4"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "rules.py: the process of f was ended by SIGSEGV"),
        ("return f(completion=completion)", "f raised RecursionError"),
        ("import json; json.loads('{')", "rules.py:2: f raised JSONDecodeError"),  # raised elsewhere, our line named
    ],
)
async def test_failures_name_function_exception_and_line(pool_of: Open, body: str, message: str) -> None:
    source = f"def f(completion, **columns):\n    if completion == 'x': {body}\n    return 1.0\n"
    async with pool_of(source, "f") as pool:
        assert message in await cause(pool)
        assert await scores(pool, ["y"]) == [1.0]  # and the next call is answered


async def test_only_the_completion_that_fails_is_lost(pool_of: Open) -> None:
    source = "import os\ndef f(completion, **_):\n    return os._exit(1) if completion == 'bad' else len(completion)\n"
    async with pool_of(source, "f") as pool:
        assert await scores(pool, ["a", "bad", "bbb"]) == [1.0, None, 3.0]


async def test_a_function_that_raises_in_a_batch_loses_the_batch(pool_of: Open) -> None:
    async with pool_of("def f(completions, **_): raise OSError('disk')", "f") as pool:
        answers = await pool.score(PROMPT, ["a", "b"])
        assert [a.value for a in answers] == [None, None]
        assert "f raised OSError: disk" in str(answers[1].cause)


async def test_a_batch_of_another_length_is_refused(pool_of: Open) -> None:
    async with pool_of("def f(completions, **_): return [1.0]", "f") as pool:
        assert await scores(pool, ["a"]) == [1.0]
        answers = await pool.score(PROMPT, ["a", "b"])
        assert [a.cause.rpartition("/")[2] for a in answers] == ["rules.py: f returned 1 scores for 2 completions"] * 2


async def test_a_missing_column_is_named(pool_of: Open) -> None:
    async with pool_of("def f(completion, solution): return 1.0", "f") as pool:
        assert "f raised TypeError: missing a required argument: 'solution'" in await cause(pool)


HANG = """
import subprocess, sys
def f(completion, **_):
    if completion == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(__file__ + ".pid", "w").write(str(child.pid))
        while True: pass
    return 1.0
"""


async def test_a_hanging_call_is_killed_with_what_it_started(pool_of: Open, tmp_path: Path) -> None:
    async with pool_of(HANG, "f", timeout_s=1.0) as pool:
        answers = await pool.score(PROMPT, ["hang", "ok"])
        assert answers[1] == Answer(1.0)
        assert str(answers[0].cause).endswith("rules.py: f took more than 1 s")
        child = int((tmp_path / "rules.py.pid").read_text())
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


async def test_hanging_again_and_again_is_not_waited_for(pool_of: Open) -> None:
    source = "def f(completion, **_):\n    while True: pass\n"
    async with pool_of(source, "f", timeout_s=0.2) as pool:
        answers = await pool.score(PROMPT, ["x"] * 20)
        assert all(a.value is None and "rules.py: f took more than 0.2 s" in str(a.cause) for a in answers)
        assert sum(str(a.cause).startswith("left alone for 30 s") for a in answers) == 20 - HOPELESS


ASYNC_HANG = """
import asyncio, time
together, all_here = [], asyncio.Event()
async def f(completion, **_):
    if completion == "waits":
        await asyncio.sleep(600)
    if completion == "blocks":
        time.sleep(600)
    if completion == "meets":  # 19 others
        together.append(completion)
        if len(together) == 20:
            all_here.set()
        await all_here.wait()
    return 1.0
"""


async def test_coroutines_run_at_once_and_one_that_waits_costs_nothing_else(pool_of: Open) -> None:
    """One after the other, the first of those who wait for each other would wait to its time limit."""
    async with pool_of(ASYNC_HANG, "f", timeout_s=2.0) as pool:
        assert await scores(pool, ["waits"] + ["meets"] * 20) == [None] + [1.0] * 20


@pytest.mark.integration
async def test_a_coroutine_that_blocks_costs_its_process(pool_of: Open) -> None:
    async with pool_of(ASYNC_HANG, "f", timeout_s=3) as pool:
        assert "took more than 3 s" in await cause(pool, "blocks")
        assert await scores(pool, ["a"]) == [1.0]


async def test_processes_work_at_the_same_time(pool_of: Open) -> None:
    source = "import os\ndef f(completion, **_):\n    return os.getpid()\n"
    async with pool_of(source, "f", workers=2) as pool:
        assert len(set(await scores(pool, ["a"] * 8))) == 2


async def test_the_file_finds_its_neighbours_and_itself(pool_of: Open, tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("BONUS = 0.25\n")
    source = "from helpers import BONUS\ndef f(completion, **_): return BONUS * __file__.endswith('rules.py')\n"
    async with pool_of(source, "f") as pool:
        assert await scores(pool, ["a"]) == [0.25]


async def test_the_source_travels(tmp_path: Path) -> None:
    """On another node the file is not there."""
    file = tmp_path / "gone" / "rules.py"
    file.parent.mkdir()
    file.write_text("def f(completion, **_):\n    return 1 / len(completion)\n")
    spec = read_function(file, "f", timeout_s=20)
    file.unlink()
    pool = FunctionPool(spec, workers=1)
    try:
        await pool.start()
        assert await scores(pool, ["ab"]) == [0.5]
        assert f"{file}:2: f raised ZeroDivisionError" in await cause(pool, "")
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import no_such_module\n",
            "rules.py:1: importing it raised ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def f(:\n", "rules.py:1: importing it raised SyntaxError"),
        ("x = 1\n\nraise SystemExit('bye')\n", "rules.py:3: importing it raised SystemExit: bye"),
        ("def g(completion): return 1\n", "rules.py: has no function 'f'"),
        ("f = 3\n", "rules.py: this is no function 'f'"),
        ("def f(text): return 1\n", "rules.py: f must take either completion"),
        ("def f(completion, completions): return 1\n", "rules.py: f must take either completion"),
        ("def f(completion, /): return 1\n", "completion is positional-only"),
        ("def f(prompts, completion): return 1\n", "f takes prompts together with completion"),
        ("import os; os._exit(7)\n", "the process ended while importing it (exited with code 7)"),
    ],
)
async def test_a_file_that_cannot_be_used(pool_of: Open, source: str, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        async with pool_of(source, "f"):
            pass
    assert message in str(caught.value)


async def test_an_import_that_hangs(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text("while True: pass\n")
    spec = read_function(file, "f", timeout_s=1)
    pool = FunctionPool(type(spec)(path=spec.path, source=spec.source, name="f", timeout_s=1, import_s=0.5), workers=1)
    with pytest.raises(WorkerError, match=r"importing it took more than 0\.5 s"):
        await pool.start()


async def test_a_caller_who_leaves_frees_the_process(pool_of: Open) -> None:
    source = "import time\ndef f(completion, **_):\n    time.sleep(float(completion))\n    return 1.0\n"
    async with pool_of(source, "f") as pool:
        leaver: asyncio.Task[list[Answer]] = asyncio.create_task(pool.score(PROMPT, ["600"]))
        await asyncio.wait([leaver], timeout=0.3)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert await scores(pool, ["0"]) == [1.0]


@pytest.mark.integration
def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    """Also one that hangs, when the replica is killed outright."""
    if not Path("/proc").is_dir():
        pytest.skip("only Linux ends a process with its parent")
    parent = (
        "import asyncio, os, sys\nfrom pathlib import Path\n"
        "from actors.rewards.function_pool import FunctionPool, read_function\n"
        "from trainers.types import Prompt\n"
        "async def main():\n"
        "    pool = FunctionPool(read_function(Path(sys.argv[1]), 'f', timeout_s=600), workers=1)\n"
        "    await pool.start()\n"
        "    await pool.score(Prompt(messages=(), source='', line=1), ['x'])\n"
        "asyncio.run(main())\n"
    )
    file = tmp_path / "rules.py"
    file.write_text(
        "import os\ndef f(completion, **_):\n    os.write(2, b'%d\\n' % os.getpid())\n    while True: pass\n"
    )
    worker = _run_until_line(parent, file)
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def _run_until_line(code: str, file: Path) -> psutil.Process:
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        worker = psutil.Process(int(parent.stderr.readline()))
        assert worker.ppid() == parent.pid
        os.kill(parent.pid, 9)
        parent.stderr.close()
    return worker
