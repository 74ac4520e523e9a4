"""A checkpoint on a file system that hangs ends the run with the cause, and the process ends too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.runs.checkpoint import checkpoint_steps

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
