"""The demo: tiny models made from code and a seed, GRPO on them, and a comparison of before and after.

It creates the files that the configs in `examples/arithmetic/` name, and runs `grpo.yaml` as `rlhf train` would.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from cluster.config.run import load_config
from cluster.planning.plan import find_problems
from cluster.runs.directory import RunDirectory
from cluster.runs.metrics_jsonl import read_metrics
from cluster.training.launch import DONE, Outcome, train
from cluster.training.preloading import preloaded_python
from trainers.arithmetic import write_prompts
from trainers.errors import Problem, UserError
from trainers.tiny_models import make_policy, make_reward_model, make_teacher, recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "grpo.yaml"
MODELS = EXAMPLE.parent.parent.parent / ".cache" / "demo"
_SHOWN_PROMPTS = 4
_PROMPTS, _HELD_OUT = 4000, 64


@dataclass(slots=True)
class Stopwatch:
    """Seconds by part, in order."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + monotonic() - began


def run_demo(root: Path, *, prepare_only: bool = False, console: Console | None = None) -> int:
    """Create what is missing, train, and show what changed. Returns an exit code."""
    console = console or Console()
    watch = Stopwatch()
    if not EXAMPLE.exists():
        raise UserError([Problem(str(EXAMPLE), "not found; the demo runs from a checkout of the project")])
    prepare(console, watch)
    if prepare_only:
        console.print(f"models and prompts are in {MODELS}", highlight=False)
        return DONE
    config = load_config(EXAMPLE, [f"root={root.resolve()}"])
    if problems := find_problems(config):
        raise UserError(problems)
    with preloaded_python() as python, watch.part("train"):
        outcome = train(config, resume="never", console=console, python=python)
    if outcome.exit_code == DONE:
        report(outcome, watch, console)
    return outcome.exit_code


def prepare(console: Console, watch: Stopwatch) -> None:
    """Create policy, reward model and prompts; models that the same code made are kept."""
    made_by = MODELS / "made_by"
    if not made_by.exists() or made_by.read_text(encoding="utf-8") != recipe():
        shutil.rmtree(MODELS, ignore_errors=True)
        MODELS.mkdir(parents=True)
        made_by.write_text(recipe(), encoding="utf-8")
    disable_progress_bar()  # transformers', which would break into ours
    with Progress(console=console) as bar:
        makers: dict[str, Callable[..., None]] = {
            "policy": make_policy,
            "reward": partial(make_reward_model, policy=MODELS / "policy"),
            "teacher": _make_teacher,
        }
        for name, make in makers.items():
            if (MODELS / name / "config.json").exists():
                continue
            task = bar.add_task("instruction-tuning the policy" if name == "policy" else f"making the {name} model")
            unfinished = MODELS / f".{name}.partial"
            with watch.part(f"make {name}"):
                make(unfinished, progress=_showing(bar, task))
            unfinished.rename(MODELS / name)
    write_prompts(MODELS / "prompts.jsonl", _PROMPTS, seed=0)
    write_prompts(MODELS / "held_out.jsonl", _HELD_OUT, seed=0, held_out=True)


def _make_teacher(path: Path, *, progress: Callable[[int, int], None]) -> None:
    make_teacher(path, MODELS / "policy")
    progress(1, 1)


def _showing(bar: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: bar.update(task, completed=done, total=total)


def report(outcome: Outcome, watch: Stopwatch, console: Console) -> None:
    """Before and after, sample completions, time and memory, and the paths of the results."""
    metrics = read_metrics(outcome.run.metrics)
    evaluations = [m for m in metrics if "eval/correct" in m]
    console.print(_scores(evaluations[0], evaluations[-1]))
    console.print(_answers(outcome.run, int(evaluations[-1]["step"])))
    console.print(_times(outcome, watch, metrics))
    console.print(f"trained model  {outcome.run.model}\nrun directory  {outcome.run.path}", highlight=False)
    console.print(f"try it: rlhf chat {outcome.run.model} --base {MODELS / 'policy'}", highlight=False)


def _scores(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table("held-out prompts, sampled at temperature 1", "before", "after", title="What was learned")
    for name, key in (("reward (model)", "eval/reward_mean"), ("accuracy (rule, monitored)", "eval/correct")):
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}")
    return table


def _answers(run: RunDirectory, last: int) -> Table:
    table = Table("prompt", "completions before", "completions after", title="Sample completions")
    before, after = (_by_prompt(run.rollouts / f"eval-{step:06d}.parquet") for step in (0, last))
    for prompt in islice(before, _SHOWN_PROMPTS):
        table.add_row(prompt, "  ".join(before[prompt]), "  ".join(after[prompt]))
    return table


def _by_prompt(file: Path) -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {}
    for row in pq.read_table(file, columns=["prompt", "completion"]).to_pylist():
        answers.setdefault(json.loads(row["prompt"])[-1]["content"], []).append(row["completion"].strip())
    return answers


def _times(outcome: Outcome, watch: Stopwatch, metrics: list[dict[str, Any]]) -> Table:
    """Seconds by part; each step's clock separates scoring from generating."""
    scoring = sum(m.get("time/reward_s", 0.0) for m in metrics)
    phases = dict(outcome.seconds)
    phases["generate"] = phases.get("generate", 0.0) - scoring
    phases["score"] = scoring
    made = {name: seconds for name, seconds in watch.parts.items() if name.startswith("make")}
    table = Table("part", "seconds", "process", "peak MiB", title="Where time and memory went")
    rows = list((made | phases).items())
    memory = list(outcome.peak_memory.items())
    for i in range(max(len(rows), len(memory))):
        part = (rows[i][0], f"{rows[i][1]:.1f}") if i < len(rows) else ("", "")
        process = (memory[i][0], f"{memory[i][1] / 2**20:.0f}") if i < len(memory) else ("", "")
        table.add_row(*part, *process)
    return table
