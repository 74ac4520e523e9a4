"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere. It knows rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar


class Progress(Protocol):
    """Told what happens, in order."""

    def start(self, *, steps: int, done: int) -> None:
        """The loop begins, `done` of `steps` behind it."""
        ...

    def phase(self, name: str) -> None:
        """What the run is doing now."""
        ...

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step (or the first evaluation, step 0) is recorded."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should read."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


def make_progress(console: Console) -> Progress:
    """A bar where `console` is a terminal, lines where it is not."""
    return Bar(console) if console.is_terminal else Lines(console)


_SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("kl", "kl/mean", "{:.4f}"),
    ("eval", "eval/reward_mean", "{:.3f}"),
    ("tok/s", "throughput/tokens_per_s", "{:.0f}"),
    ("s/step", "time/step_s", "{:.2f}"),
)


def headline(metrics: Mapping[str, float]) -> str:
    """The few numbers of a step that fit on a line.

    >>> headline({"reward/mean": 0.5, "time/step_s": 1.0})
    'reward 0.500  s/step 1.00'
    """
    return "  ".join(f"{name} {form.format(metrics[key])}" for name, key, form in _SHOWN if key in metrics)


class Lines:
    """One line a step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0
        self._phase = ""

    def start(self, *, steps: int, done: int) -> None:
        """See `Progress`."""
        self._steps = steps
        self.note(f"training: {steps} steps" + (f", going on after step {done}" if done else ""))

    def phase(self, name: str) -> None:
        """See `Progress`; lines show phases only before the first step, where they take long."""
        if self._steps == 0 and name != self._phase:
            self.note(f"{name} …")
        self._phase = name

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self.note(f"step {int(metrics['step'])}/{self._steps}  {headline(metrics)}")

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See `Progress`."""


class Bar:
    """A live bar: step, reward, KL, tokens a second, phase, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = RichBar(
            TextColumn("{task.fields[phase]:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[headline]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._bar.add_task("train", total=None, phase="start", headline="")
        self._bar.start()

    def start(self, *, steps: int, done: int) -> None:
        """See `Progress`."""
        self._bar.reset(self._task, total=steps, completed=done, phase="start", headline="")

    def phase(self, name: str) -> None:
        """See `Progress`."""
        self._bar.update(self._task, phase=name)

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._bar.update(self._task, completed=int(metrics["step"]), headline=headline(metrics))

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.stop()
