"""Makes runs that go wrong, each in its own way, and one that does not, and records what the Doctor is to see of them.

    python -m tests.cluster.doctor.runs.record [NAME ...]

Each is a real run of `grpo.yaml` or `gkd.yaml` in `examples/arithmetic/` with the overrides below; beside this file
then lie `NAME.jsonl` (its metrics, without times) and `NAME.samples.jsonl` (summaries of its first and last step).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from benchmarks.matrix import prepare, run_example
from cluster.doctor import SampleRow, summarize

HERE: Final = Path(__file__).resolve().parent
REWARDS: Final = HERE / "sick_rewards.py"
CORRECT: Final = '{type: function, name: correct, path: "examples/arithmetic/rewards.py:correct", weight: %d}'
KEPT: Final = ("reward/", "kl/", "policy/", "advantage/", "rollout/", "distill/")

SICK: Final[Mapping[str, tuple[str, ...]]] = {
    "still": ("train.steps=45", "train.learning_rate=1e-8"),
    "spreadless": ("train.steps=20", f"rewards=[{{type: function, name: constant, path: '{REWARDS}:constant'}}]"),
    "failing": ("train.steps=20", f"rewards=[{{type: function, name: fragile, path: '{REWARDS}:fragile'}}]"),
    "gap": ("train.steps=20", "policy.dtype=bfloat16", "sync.max_logprob_gap=0.15"),
    "dissolved": (
        "train.steps=60",
        "train.learning_rate=1e-3",
        "algorithm.kl.coef=0",
        f"rewards=[{{type: function, name: dice, path: '{REWARDS}:dice'}}, {CORRECT % 0}]",
    ),
}
TAUGHT: Final[Mapping[str, tuple[str, ...]]] = {
    "taught": ("train.steps=48", "train.learning_rate=5e-4"),
    "untaught": ("train.steps=48", "train.learning_rate=1e-8", "train.warmup_steps=0"),
}


def record(name: str, root: Path) -> None:
    """Make the run and write its two files."""
    example, changes = ("gkd", TAUGHT[name]) if name in TAUGHT else ("grpo", SICK[name])
    run = run_example(example, name, root, ["eval.every=0", "checkpoint.every=0", *changes])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: rounded(value) for key, value in line.items() if is_kept(key)} for line in lines if line["step"] > 0]
    write(HERE / f"{name}.jsonl", kept)
    rollouts = sorted((run / "rollouts").glob("step-*.parquet"))
    summaries = [
        asdict(summarize(int(file.stem.partition("-")[2]), samples_in(file))) for file in (rollouts[0], rollouts[-1])
    ]
    write(HERE / f"{name}.samples.jsonl", summaries)


def samples_in(file: Path) -> list[SampleRow]:
    """The samples of a rollouts file."""
    table = pq.read_table(file, columns=[column.name for column in fields(SampleRow)])
    return [SampleRow(**{**row, "rewards": dict(row["rewards"])}) for row in table.to_pylist()]


def is_kept(key: str) -> bool:
    """Whether the Doctor, or a page that shows the run, reads the metric."""
    return key == "step" or key.startswith(KEPT)


def rounded(value: Any) -> Any:
    """Four digits tell the curve."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    """As JSON lines."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Make the runs that are named, or all."""
    prepare()
    for name in sys.argv[1:] or (*SICK, *TAUGHT):
        with tempfile.TemporaryDirectory() as root:
            record(name, Path(root))


if __name__ == "__main__":
    main()
