"""Three algorithms times four train types on the arithmetic example: what each cell learns, costs and moves.

    python -m benchmarks.matrix [--cells ppo-lora grpo-full ...] [--steps N] [--markdown FILE]

Every cell is a run of `rlhf train` with a file of `examples/arithmetic/` and the overrides of `CELLS`; what is shown is
read from the run's directory. The full cell of each algorithm is the peer that the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RLHF: Final = str(Path(sys.executable).with_name("rlhf"))
DEADLINE_S: Final = 1800.0
PARTS: Final = ("generate", "reward", "annotate", "train")

# AdaLoRA's bases begin small and at random: in so few steps they must turn soon (a smaller penalty, a larger scale).
_QUICK_RANKS: Final = ("policy.lora.alpha=128", "policy.lora.orth_reg_weight=1e-3")
# What the train types need: an adapter's learning rate is ten times that of all weights (its B begins at 0).
_TRAIN_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "full": ("train.learning_rate=5e-4",),
    "lora": ("policy.lora.r=8", "train.learning_rate=3e-3"),
    "qlora": ("policy.lora.r=8", "train.learning_rate=3e-3"),
    "adalora": ("policy.lora.init_r=8", "policy.lora.target_r=4", *_QUICK_RANKS, "train.learning_rate=1e-2"),
}
# (ZeRO stage, ranks): every train type with both stages and with two ranks.
_CUTS: Final[Mapping[str, tuple[int, int]]] = {
    "grpo-full": (2, 1),  # as the demo
    "grpo-lora": (3, 1),
    "grpo-qlora": (2, 1),
    "grpo-adalora": (3, 2),
    "ppo-full": (3, 1),
    "ppo-lora": (2, 2),
    "ppo-qlora": (3, 2),
    "ppo-adalora": (2, 1),
    "gkd-full": (3, 2),
    "gkd-lora": (3, 2),
    "gkd-qlora": (3, 1),
    "gkd-adalora": (2, 1),
}
# Ways that an algorithm has beside those in its example: each is in one cell.
_WAYS: Final[Mapping[str, tuple[str, ...]]] = {
    "ppo-lora": ("algorithm.critic.train_type=lora",),
    "ppo-qlora": ("algorithm.critic.train_type=qlora",),
    "gkd-lora": ("algorithm.lmbda=0",),  # the teacher writes everything
    "gkd-qlora": ("algorithm.teacher.served=true", "algorithm.top_k=24"),
}
CELLS: Final = tuple(_CUTS)


@dataclass(frozen=True, slots=True)
class Cell:
    """A finished cell: its run's directory, and what is recorded there."""

    name: str
    run: Path
    metrics: Sequence[Mapping[str, float]]  # of the steps, from 1
    evaluations: Sequence[Mapping[str, float]]  # before, …, after
    peak_memory: Mapping[str, int]  # bytes, by role and rank

    @property
    def train_type(self) -> str:
        """full, lora, qlora or adalora."""
        return self.name.partition("-")[2]

    def typical(self, key: str) -> float:
        """The median over the steps after the first, which warms everything up."""
        return median([line[key] for line in self.metrics[1:] if key in line] or [0.0])


def overrides(name: str, *, steps: int) -> list[str]:
    """What the cell changes in its algorithm's example."""
    train_type = name.partition("-")[2]
    stage, ranks = _CUTS[name]
    return [
        f"policy.train_type={train_type}",
        *_TRAIN_TYPES[train_type],
        *_WAYS.get(name, ()),
        f"train.steps={steps}",
        "train.warmup_steps=2",
        f"learners.zero_stage={stage}",
        f"learners.workers={ranks}",
        "eval.every=0",
        "checkpoint.every=0",
    ]


def prepare() -> None:
    """Make the models and prompts that the examples name, where they are missing."""
    subprocess.run([RLHF, "demo", "--prepare"], check=True, capture_output=True, timeout=DEADLINE_S, cwd=ROOT)


def run_cell(name: str, root: Path, *, steps: int, more: Sequence[str] = ()) -> Cell:
    """Train one cell with its run's directory under `root`. RuntimeError with the output where it fails."""
    return read_cell(name, run_example(example_of(name), name, root, [*overrides(name, steps=steps), *more]))


def example_of(name: str) -> str:
    """The file of `examples/arithmetic/` that a cell changes."""
    return name.partition("-")[0]


def run_example(example: str, name: str, root: Path, changes: Sequence[str]) -> Path:
    """Train a file of `examples/arithmetic/`, changed, under `root`; the run's directory. RuntimeError if it fails."""
    command = [RLHF, *train_arguments(example, name, root, changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return run_of(name, root)


def train_arguments(example: str, name: str, root: Path, changes: Sequence[str]) -> list[str]:
    """The arguments of `rlhf` that train a file of `examples/arithmetic/`, changed, under `root`."""
    file = ROOT / "examples" / "arithmetic" / f"{example}.yaml"
    return ["train", str(file), "--resume", "never", f"name={name}", f"root={root}", *changes]


def run_of(name: str, root: Path) -> Path:
    """The directory of the one run of that name under `root`."""
    (run,) = root.glob(f"*-{name}-*")
    return run


def read_cell(name: str, run: Path) -> Cell:
    """A cell from its run's directory."""
    lines: list[dict[str, float]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return Cell(
        name=name,
        run=run,
        metrics=[line for line in lines if line["step"] > 0],
        evaluations=[line for line in lines if "eval/correct" in line],
        peak_memory=record["peak_memory"],
    )


def table(cells: Sequence[Cell]) -> str:
    """The report as a Markdown table."""
    head = (
        "cell | ZeRO × ranks | accuracy before → after | reward or JSD, first → last step | "
        "step s (generate, reward, annotate, train, sync) | sync KiB | × fewer than full | gap max | "
        "peak MiB (generator, learner, driver)"
    )
    full_bytes = max((cell.typical("weights/sync_bytes") for cell in cells if cell.train_type == "full"), default=0.0)
    rows = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    rows += [f"| {' | '.join(_row(cell, full_bytes))} |" for cell in cells]
    return "\n".join(rows)


def _row(cell: Cell, full_bytes: float) -> list[str]:
    stage, ranks = _CUTS[cell.name]
    before, after = cell.evaluations[0], cell.evaluations[-1]
    signal = "distill/jsd" if cell.name.startswith("gkd") else "reward/mean"
    parts = [cell.typical(f"time/{part}_s") for part in PARTS] + [cell.typical("weights/sync_s")]
    moved = cell.typical("weights/sync_bytes")
    roles = ("generator 0", "learner 0", "driver")
    return [
        cell.name,
        f"{stage} × {ranks}",
        f"{before['eval/correct']:.3f} → {after['eval/correct']:.3f}",
        f"{signal} {cell.metrics[0][signal]:.3f} → {cell.metrics[-1][signal]:.3f}",
        f"{cell.typical('time/step_s'):.2f} ({', '.join(f'{part:.2f}' for part in parts)})",
        f"{moved / 1024:,.0f}",
        f"{full_bytes / moved:.1f}" if full_bytes else "",
        f"{max(line.get('rollout/logprob_gap_max', 0.0) for line in cell.metrics):.1e}",
        ", ".join(f"{cell.peak_memory[role] / 2**20:,.0f}" for role in roles if role in cell.peak_memory),
    ]


def main() -> None:
    """Make what the examples name, run the cells one after the other, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as root:
        cells = []
        for name in options.cells:
            cells.append(run_cell(name, Path(root), steps=options.steps))
            print(table(cells[-1:]).splitlines()[-1], flush=True)
        print(report := table(cells))
    if options.markdown is not None:
        options.markdown.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
