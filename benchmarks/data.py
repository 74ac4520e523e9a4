"""How fast prompt files are validated and indexed, beside plain loops of `json.loads` and `orjson.loads`.

    python -m benchmarks.data [--records 1000000] [--shape prompt|messages] [--markdown FILE]

Each figure is the best of several fresh processes that take turns, so that a busy machine treats them alike; the
peak memory is that of the whole process. The file is made first, from a seed, records of about 200 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[1]
SMALL = 10_000
WORDS = (  # noqa: SIM905  a text is easier to read
    "write a short polite e-mail to my landlord about the broken heating in the kitchen and ask when somebody can come "
    "explain quantum computing simply give three points that matter most compare both answers step by step"
).split()


def make(path: Path, records: int, shape: str) -> None:
    """Distinct prompts of about 200 bytes a record, a few colons and quotes among the words."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(records):
            text = " ".join(rng.choices(WORDS, k=24))[:128] + f': "{i}"'
            record: dict[str, object]
            if shape == "prompt":
                record = {"prompt": text, "answer": str(i * 7), "task": "mail"}
            else:
                turn = {"role": "user", "content": text[:60]}
                record = {"messages": [{"role": "system", "content": "You are an expert."}, turn], "answer": str(i)}
            file.write(json.dumps(record) + "\n")


def json_loop(path: str) -> int:
    n = 0
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
            n += 1
    return n


def orjson_loop(path: str) -> int:
    n = 0
    with open(path, "rb") as file:
        for line in file:
            orjson.loads(line)
            n += 1
    return n


def check(path: str) -> int:
    """Everything that `rlhf data check` does."""
    from trainers.data.reader import ScanOptions, scan

    report = scan(path, ScanOptions(keep=False))[1].report()
    assert report.ready, report.problems
    return report.records


def open_for_training(path: str) -> int:
    """The same, with the index and the fingerprint that a run needs."""
    from trainers.data.reader import open_prompts

    return len(open_prompts(path))


WAYS: dict[str, Callable[[str], int]] = {
    "json.loads loop": json_loop,
    "orjson.loads loop": orjson_loop,
    "check": check,
    "check and index": open_for_training,
}


@dataclass(frozen=True)
class Figure:
    seconds: float
    cpu_seconds: float
    records: int
    peak_mib: float


def one(way: str, path: str) -> None:
    """What a child process does: one way over one file, its figures as JSON."""
    start, cpu = time.perf_counter(), time.process_time()
    records = WAYS[way](path)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, cpu_seconds, records, peak]))


def measure(way: str, path: Path) -> Figure:
    command = [sys.executable, "-m", "benchmarks.data", "--one", way, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    return Figure(*json.loads(done.stdout))


def table(path: Path, rounds: int) -> list[str]:
    """A row for each way: the least time of all rounds, and the most memory."""
    size = path.stat().st_size / 1e6
    runs: dict[str, list[Figure]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, figures in runs.items():
            figures.append(measure(way, path))
    rows = ["| way | records/s | MB/s | seconds | CPU seconds | peak MiB |", "|---|--:|--:|--:|--:|--:|"]
    for way, figures in runs.items():
        seconds, cpu = min(f.seconds for f in figures), min(f.cpu_seconds for f in figures)
        peak = max(f.peak_mib for f in figures)
        rate = figures[0].records / seconds
        rows.append(f"| {way} | {rate:,.0f} | {size / seconds:.0f} | {seconds:.2f} | {cpu:.2f} | {peak:.0f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--shape", choices=["prompt", "messages"], default="prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        report: list[str] = []
        for records in (options.records, SMALL):
            path = Path(folder) / f"{records}.jsonl"
            make(path, records, options.shape)
            size = path.stat().st_size
            report += [
                f"### {records:,} `{options.shape}` records, {size / 1e6:.0f} MB ({size / records:.0f} bytes each)"
            ]
            report += ["", *table(path, options.rounds), ""]
            path.unlink()
    print("\n".join(report))
    if options.markdown:
        options.markdown.write_text("\n".join(report))


if __name__ == "__main__":
    main()
