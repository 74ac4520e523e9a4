"""What the driver sees of the roles: five protocols, all asynchronous, every call with a deadline inside.

The driver is tested against the small fakes of `fakes.py`; on a cluster `groups.py` implements them over Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.messages import GroupScores, Proof, ScoreRequest, StepReport, UpdateOptions
from trainers.algorithms.base import Need
from trainers.config import SamplingConfig
from trainers.types import AnnotatedSample, Completion, Sample, TokenPrompt, TopLogprobs, TrainSample


class Generators(Protocol):
    """The replicas that write completions."""

    async def generate(
        self, prompt: TokenPrompt, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> tuple[Completion, ...]:
        """One group, by whichever replica is least busy; the same seeds write the same text."""
        ...


class Teacher(Generators, Protocol):
    """An engine of GKD's teacher."""

    async def top_logprobs(self, sample: Sample, k: int) -> TopLogprobs:
        """Its `k` likeliest tokens wherever the policy chose one."""
        ...


class Learners(Protocol):
    """The ZeRO ranks as one."""

    async def annotate(self, samples: Sequence[Sample], needs: frozenset[Need]) -> list[AnnotatedSample]:
        """Log-probabilities that the algorithm needs before the update."""
        ...

    async def update(self, samples: Sequence[TrainSample], order: UpdateOptions, *, seed: Sequence[int]) -> StepReport:
        """All optimizer steps of one step of the loop."""
        ...

    async def save(self, directory: str) -> None:
        """Every rank's part of a checkpoint."""
        ...

    async def load(self, directory: str) -> None:
        """Restore every rank."""
        ...

    async def export(self, directory: str) -> None:
        """The policy in Hugging Face format."""
        ...


class WeightSync(Protocol):
    """The way from learners to generators."""

    async def publish(self, version: int) -> Proof:
        """Bring every generator to the learners' weights, prove it, and let them write."""
        ...


class Scorer(Protocol):
    """The reward service."""

    async def score(self, request: ScoreRequest) -> GroupScores:
        """Scores of one group; a failed score is None, never an exception."""
        ...

    def end_step(self, rewards: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """The raw scores of a step's groups, by name: what running statistics may learn from."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back."""
        ...


class GpuSharing(Protocol):
    """Who has the GPUs, where generators and learners share them; on GPUs of their own nothing happens.

    After `generate` the generators write nothing until weights are published to them.
    """

    @property
    def shared(self) -> bool:
        """Whether they take turns at all."""
        ...

    async def acquire_for_training(self) -> None:
        """The generators sleep, the learners take the GPUs."""
        ...

    async def acquire_for_generation(self) -> None:
        """The learners keep their weights only, the generators wake up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """All roles of a run."""

    generators: Generators
    teacher: Teacher | None = None  # writes in the policy's place or judges its tokens, where the algorithm asks for it
    learners: Learners
    weights: WeightSync
    scorer: Scorer
    gpu_sharing: GpuSharing
