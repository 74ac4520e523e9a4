"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere. It knows rich."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar
from rich.text import Text

_LINE_S = 10.0  # between two lines about the same wait, if the output is not a terminal


class Progress(Protocol):
    """Receives what happens, in order."""

    def start(self, *, steps: int, done: int) -> None:
        """The loop begins with `done` of `steps` done."""
        ...

    def phase(self, name: str) -> None:
        """What the run is doing now."""
        ...

    def waiting(self, since: Mapping[str, float]) -> None:
        """What the phase waits for: each part with the time (monotonic) at which it began; replaces the last."""
        ...

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step (or the first evaluation, step 0) is recorded."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should read."""
        ...

    def close(self) -> None:
        """Nothing more follows."""
        ...


def make_progress(console: Console) -> Progress:
    """A bar if `console` is a terminal, else lines."""
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


def described_waits(since: Mapping[str, float], *, now: float) -> str:
    """What is waited for and how long already, the longest wait first.

    >>> described_waits({"loading learner 0": 3.0, "loading generator 0 (vLLM)": 0.0}, now=12.4)
    'loading generator 0 (vLLM) 12 s, loading learner 0 9 s'
    """
    return ", ".join(f"{part} {now - began:.0f} s" for part, began in sorted(since.items(), key=lambda p: p[1]))


class Lines:
    """One line for each step; before the first one, for each phase and every few seconds of a wait."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = monotonic) -> None:
        self._console = console
        self._clock = clock
        self._steps = 0
        self._phase = ""
        self._since: Mapping[str, float] = {}
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def start(self, *, steps: int, done: int) -> None:
        """See `Progress`."""
        self._steps = steps
        self.note(f"training: {steps} steps" + (f", resumed after step {done}" if done else ""))

    def phase(self, name: str) -> None:
        """See `Progress`; lines show phases only before the first step, where they take long."""
        if self._steps == 0 and name not in (self._phase, "closed"):
            self.note(f"{name} …")
        self._phase = name

    def waiting(self, since: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._since = since
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()

    def remind(self) -> None:
        """A line about what is waited for now, if anything is."""
        if since := self._since:
            self.note(f"{described_waits(since, now=self._clock())} …")

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self.note(f"step {int(metrics['step'])}/{self._steps}  {headline(metrics)}")

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See `Progress`."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()

    def _tick(self) -> None:
        while not self._closed.wait(_LINE_S):
            self.remind()


class _Doing(ProgressColumn):
    """The phase, or what it waits for, with seconds that rise as the bar is redrawn."""

    def __init__(self) -> None:
        super().__init__()
        self.since: Mapping[str, float] = {}

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        waits = described_waits(self.since, now=monotonic())
        return Text(f"{waits} …" if waits else f"{task.fields['phase']:<10}")


class Bar:
    """A live bar: phase or wait, step, reward, KL, tokens/s, time left."""

    def __init__(self, console: Console) -> None:
        self._doing = _Doing()
        self._bar = RichBar(
            self._doing,
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

    def waiting(self, since: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._doing.since = since

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._bar.update(self._task, completed=int(metrics["step"]), headline=headline(metrics))

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.stop()
