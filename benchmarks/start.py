"""How long `rlhf train` takes from the command to its first step, and until it refuses a config with a mistake.

    python -m benchmarks.start [--runs 5] [--only start files schema] [--markdown FILE]

The run is the demo (`examples/arithmetic/grpo.yaml`; its models are made first if they are missing), ended after its
first step. Seconds are medians. On a machine that does other work too, compare the CPU seconds (user and system, of
the process tree), not the wall clock's.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic

import psutil

RLHF = str(Path(sys.executable).with_name("rlhf"))
CONFIG = Path(__file__).resolve().parents[1] / "examples" / "arithmetic" / "grpo.yaml"
MARK = "RLHF_BENCHMARK_MARK"
MISTAKES = {"schema": "train.steps=0", "files": "sampling.max_tokens=100000"}
"""One that the schema sees, and one that needs the policy's files: more tokens than its context has."""
LOOP, FIRST_EVALUATION, FIRST_STEP = "training: ", "step 0/", "step 1/"
_PART = re.compile(r"([^,:]+?) (\d+\.\d) s")
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start: seconds from the command on, and what they consist of."""

    loop: float  # until all roles are ready
    evaluation: float  # until the held-out prompts are answered by the untrained policy
    step: float  # until the first step is done
    cpu: float  # until all roles are ready, of all processes
    parts: Mapping[str, float]  # as the run reports them
    processes: Mapping[str, float]  # CPU seconds


@dataclass(slots=True)
class _Tree:
    """CPU seconds of every process with the mark, also of those that have ended meanwhile."""

    mark: str
    seconds: dict[tuple[int, float], tuple[str, float]] = field(default_factory=dict)

    def look(self) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) != self.mark:
                    continue
                times = process.cpu_times()
                name = _role(process.cmdline())
                self.seconds[process.pid, process.create_time()] = (name, times.user + times.system)
            except psutil.Error:
                continue

    def by_role(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, seconds in self.seconds.values():
            totals[name] = totals.get(name, 0.0) + seconds
        return dict(sorted(totals.items(), key=lambda pair: -pair[1]))


def _role(command: Sequence[str]) -> str:
    """What a person would call a process.

    >>> _role(["ray::Generator.start"]), _role(["/usr/bin/python3", "/env/bin/rlhf", "train"])
    ('ray::Generator', 'rlhf')
    """
    first = command[0] if command else "?"
    if first.startswith("ray::"):
        return first.partition(".")[0].partition(" ")[0]
    scripts = [part for part in command[1:] if not part.startswith("-")]
    named = scripts[0] if Path(first).name.startswith("python") and scripts else first
    return Path(named).name


def time_start(root: Path) -> Start:
    """Start the demo's run, and end it after its first step."""
    tree, seen, parts = _Tree(uuid.uuid4().hex), dict[str, float](), dict[str, float]()
    began = monotonic()
    process = subprocess.Popen(
        [RLHF, "train", str(CONFIG), f"root={root}", "--resume", "never"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: tree.mark},
        start_new_session=True,
    )
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            tree.look()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    output = []
    cpu, by_role = 0.0, dict[str, float]()
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        for mark in (LOOP, FIRST_EVALUATION, FIRST_STEP):
            if line.startswith(mark):
                seen[mark] = monotonic() - began
        if line.startswith(LOOP):
            over.set()
            watching.join()
            tree.look()
            by_role = tree.by_role()
            cpu = sum(by_role.values())
        elif " s" in line and line.startswith(("ready after", "of these")):
            parts |= {name.strip(): float(seconds) for name, seconds in _PART.findall(line.partition(":")[2])}
        elif line.startswith(FIRST_STEP):
            os.killpg(process.pid, signal.SIGINT)
    over.set()
    process.wait(timeout=120)
    if FIRST_STEP not in seen:
        raise RuntimeError("".join(output))
    return Start(
        loop=seen[LOOP],
        evaluation=seen[FIRST_EVALUATION],
        step=seen[FIRST_STEP],
        cpu=cpu,
        parts=parts,
        processes=by_role,
    )


def time_mistake(override: str, root: Path) -> tuple[float, float]:
    """Seconds until a config is refused: wall and CPU."""
    began = monotonic()
    process = subprocess.Popen(
        [RLHF, "train", str(CONFIG), f"root={root}", override], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    took = monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 2:
        raise RuntimeError(f"{override}: exit code {process.returncode}, expected 2")
    return took, usage.ru_utime + usage.ru_stime


def _rows(of: Iterable[Mapping[str, float]], unit: str) -> list[str]:
    found = list(of)
    names = dict.fromkeys(name for one in found for name in one)
    medians = {name: median(one.get(name, 0.0) for one in found) for name in names}
    return [f"| {name} | {seconds:.1f} {unit} |" for name, seconds in medians.items() if seconds >= 0.1]


def report(starts: Sequence[Start], mistakes: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The tables."""
    rows = ["| | median |", "|---|---|"]
    for name, times in mistakes.items():
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        rows.append(f"| a mistake refused ({name}: `{MISTAKES[name]}`) | {wall:.1f} s, {cpu:.1f} CPU s |")
    if starts:
        rows += [
            f"| roles ready, the loop begins | {median(s.loop for s in starts):.1f} s |",
            f"| first evaluation done | {median(s.evaluation for s in starts):.1f} s |",
            f"| first step done | {median(s.step for s in starts):.1f} s |",
            f"| CPU until the loop begins, all processes | {median(s.cpu for s in starts):.1f} CPU s |",
            *("", "| part, as the run reports it | median |", "|---|---|"),
            *_rows([s.parts for s in starts], "s"),
            *("", "| process | median until the loop begins |", "|---|---|"),
            *_rows([s.processes for s in starts], "CPU s"),
        ]
    return "\n".join(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each, of which the median is shown")
    parser.add_argument("--only", nargs="+", choices=("start", *MISTAKES), default=("start", *MISTAKES))
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    options = parser.parse_args()
    subprocess.run([RLHF, "demo", "--prepare"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mistakes = {
            name: [time_mistake(MISTAKES[name], root) for _ in range(options.runs)]
            for name in MISTAKES
            if name in options.only
        }
        starts = [time_start(root) for _ in range(options.runs)] if "start" in options.only else []
    print(tables := report(starts, mistakes))
    if options.markdown is not None:
        options.markdown.write_text(tables + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
