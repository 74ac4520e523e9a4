"""A checkpoint on a file system that hangs ends the run with the cause, and the process ends too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runs.checkpoint import checkpoint_steps
from cluster.runs.directory import RunDirectory, RunError
from cluster.training.launch import record_failure
from tests.support.fake_runs import Silent, make_config

ROOT = Path(__file__).parents[3]
PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from cluster.runs.atomic_files import RunDirectoryError
from tests.support.fake_runs import new_run

folder = Path(sys.argv[1])
run = new_run(folder, train={"steps": 3}, checkpoint={"every": 1, "keep": 3}, timeouts={"save_s": 1})
hang = folder / "run/checkpoints/.step-000002.partial/shard.pt"
run.at("save", 2, lambda: os.mkfifo(hang))  # opening a FIFO that no process writes to blocks in the kernel
try:
    asyncio.run(run.run())
except RunDirectoryError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.integration
def test_a_commit_that_hangs_ends_the_run_and_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("the checkpoint of step 2 was not written within 1 s (timeouts.save_s)")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [1]  # what was there before stays


def test_a_failure_that_cannot_be_recorded_is_said_and_the_end_is_not_held_up(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "run", make_config(tmp_path))
    cause = RunError(role="driver", phase="checkpoint", type="RunDirectoryError", message="not written")
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    record_failure(run, cause, progress, within_s=60)
    assert (run.record().state, run.record().error, notes) == ("failed", cause, [])
    (run.path / "run.json").unlink()
    os.mkfifo(run.path / "run.json")  # reading it blocks
    try:
        record_failure(run, cause, progress, within_s=0.05)
    finally:
        os.close(os.open(run.path / "run.json", os.O_WRONLY))  # lets the thread end
    assert notes == [f"{run.path / 'run.json'} could not be written within 0.05 s; is its file system hung?"]
