"""The demo, run once for all tests that look at what it leaves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RLHF = str(Path(sys.executable).with_name("rlhf"))


@dataclass(frozen=True, slots=True)
class DemoRun:
    """The run's directory, and what the command printed."""

    path: Path
    printed: str


def run_demo(root: Path) -> DemoRun:
    """`rlhf demo` with its run under `root`."""
    done = subprocess.run([RLHF, "demo", "--root", str(root)], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = root.glob("[!.]*")  # beside the run: the cache of prompts
    return DemoRun(path, done.stdout)
