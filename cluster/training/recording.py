"""Progress of a run as it is kept: passed on to whoever watches, written to `run.json`, and timed by phase and part.

It knows the run's directory and the progress protocol, no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

from cluster.runs.directory import RunDirectory
from cluster.training.progress import Progress

_HEADLINE = ("reward/mean", "kl/mean", "eval/reward_mean")


class Recording:
    """Implements `Progress` around another one; knows the phase that the run is in and what it waits for."""

    def __init__(
        self,
        progress: Progress,
        run: RunDirectory,
        *,
        spent: Mapping[str, float] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`spent`: seconds of the phases before this one, by name."""
        self._progress = progress
        self._run = run
        self._clock = clock
        self._since = clock()
        self._waits: dict[str, float] = {}  # since when
        self.current = "start"
        self.seconds: dict[str, float] = dict(spent or {})
        self.parts: dict[str, float] = {}  # seconds of what was waited for, several of them at a time

    def start(self, *, steps: int, done: int) -> None:
        """See `Progress`; before it, the seconds that the start took."""
        self.phase(self.current)
        shown = {name: seconds for name, seconds in self.seconds.items() if seconds >= 0.05}
        self.note(f"ready after {sum(shown.values()):.1f} s: {_listed(shown)}")
        if self.parts:
            self.note(f"of these at the same time: {_listed(self.parts)}")
        self._progress.start(steps=steps, done=done)

    def phase(self, name: str) -> None:
        """See `Progress`."""
        now = self._clock()
        self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = name, now
        self._progress.phase(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The run waits for `name` as long as the block lasts; several may overlap."""
        began = self._waits[name] = self._clock()
        self._progress.waiting(dict(self._waits))
        try:
            yield
        finally:
            del self._waits[name]
            self.parts[name] = self.parts.get(name, 0.0) + self._clock() - began
            self._progress.waiting(dict(self._waits))

    def waiting(self, since: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._progress.waiting(since)

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        shown = {key: metrics[key] for key in _HEADLINE if key in metrics}
        self._run.update(step=int(metrics["step"]), headline=self._run.record().headline | shown)
        self._progress.step(metrics)

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._progress.note(text)

    def close(self) -> None:
        """See `Progress`."""
        self.phase("closed")
        self._progress.close()


def _listed(seconds: Mapping[str, float]) -> str:
    """
    >>> _listed({"start Ray": 4.04, "read prompts": 0.5})
    'start Ray 4.0 s, read prompts 0.5 s'
    """
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
