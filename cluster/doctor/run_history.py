"""What a rule is given: the run's curves, its config and its sample summaries, each looked up by name. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from actors.rewards.config import RewardConfig, reward_names
from cluster.config.tree import get_path
from cluster.doctor.curves import Series, series
from cluster.doctor.finding import Change
from cluster.doctor.sample_summary import SampleSummary


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run as the rules see it."""

    metrics: Sequence[Mapping[str, Any]]  # steps from 1, in order
    config: Mapping[str, Any]
    samples: tuple[SampleSummary, ...] = ()  # in order of the steps, not of every step
    _curves: dict[str, Series] = field(default_factory=dict, init=False, repr=False, compare=False)

    def curve(self, key: str) -> Series:
        """The metric's curve; empty where the run has none."""
        if key not in self._curves:
            self._curves[key] = series(self.metrics, key)
        return self._curves[key]

    def setting(self, path: str) -> Any:
        """The resolved config's value at a dotted path; None if there is none.

        >>> RunHistory([], {"rewards": [{"weight": 0}]}).setting("rewards.0.weight")
        0
        """
        return get_path(self.config, path)

    def scaled(self, path: str, factor: float, *, least: float = 0.0, most: float = float("inf")) -> tuple[Change, ...]:
        """The change of a number by a factor, between limits; none where it is absent or would stay as it is.

        Integers stay integers.

        >>> RunHistory([], {"train": {"learning_rate": 1e-6}}).scaled("train.learning_rate", 0.5)
        (Change(key='train.learning_rate', value=5e-07),)
        """
        old = self.setting(path)
        if isinstance(old, bool) or not isinstance(old, int | float):
            return ()
        new = float(f"{max(least, min(most, old * factor)):.3g}")
        value = round(new) if isinstance(old, int) and new >= 1 else new
        return () if value == old else (Change(path, value),)

    def raised_kl(self) -> tuple[Change, ...]:
        """Twice the KL coefficient, at least the lower end of the recommended range (0.05)."""
        return self.scaled("algorithm.kl.coef", 2.0, least=0.05)

    def watched(self) -> list[str]:
        """Names of the rewards that are monitored but not trained on (weight 0)."""
        return [name for name, weight in self._rewards() if weight == 0]

    def reward_index(self, name: str) -> int | None:
        """The index of the reward of that name in the config's list."""
        names = [found for found, _ in self._rewards()]
        return names.index(name) if name in names else None

    def _rewards(self) -> list[tuple[str, float]]:
        configs = TypeAdapter(list[RewardConfig]).validate_python(self.setting("rewards") or [])
        return [(name, config.weight) for name, config in zip(reward_names(configs), configs, strict=True)]
