"""What the driver and the roles say to each other: plain data that any process can read without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.config import GeneratorConfig, LearnerConfig, PolicyConfig, Transport
from trainers.adapter_folder import AdapterFolder
from trainers.algorithms.base import Mean
from trainers.algorithms.config import AlgorithmConfig
from trainers.config import SamplingConfig, TrainConfig
from trainers.types import Completion, Float32Array, Int32Array, Int64Array, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is built from."""

    model: str  # path or hub id
    dtype: str
    generators: GeneratorConfig
    max_model_len: int
    transport: Transport = "ray"
    top_logprobs: int = 1  # the most that are asked for at a token
    adapter: PolicyConfig | None = None  # whose adapter is served on the model; None: the model's own weights change


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One group to write: completion i is drawn with `seeds[i]`, so the same request writes the same text."""

    id: str
    prompt: Int32Array
    sampling: SamplingConfig
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobsRequest:
    """A sequence that is written already, of which the engine's model is to say what it would have written."""

    id: str
    tokens: Int32Array  # [T]
    places: Int64Array  # [n], rising, each at least 1: of the tokens to tell the alternatives of
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What every rank is built from."""

    policy: PolicyConfig
    learners: LearnerConfig
    algorithm: AlgorithmConfig
    train: TrainConfig
    temperature: float
    max_completion_tokens: int
    total_optimizer_steps: int
    critic_optimizer_steps: int
    seed: int
    collective_timeout_s: float
    adapter: AdapterFolder | None = None  # on policy.model, continued


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedRows:
    """Results of one micro-batch, `[B, T]` each, aligned with its tokens."""

    old_logprobs: Float32Array | None
    ref_logprobs: Float32Array | None
    values: Float32Array | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """How a step's updates are to be made."""

    kl_coef: float
    train_policy: bool = True  # False: only the critic learns
    from_policy: bool = True  # False: someone else wrote the samples, so that there is no gap to measure

    @property
    def steers_kl(self) -> bool:
        """Whether the step's mean of k1 estimates where training takes the policy: it wrote the samples, and learns."""
        return self.train_policy and self.from_policy


@dataclass(slots=True)
class UpdateReport:
    """What one rank saw during a step's optimizer steps; additive over ranks but for the norms and rates."""

    metrics: dict[str, Mean] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # this rank's share of each optimizer step's loss
    gap_max: float = 0.0  # largest |trainer − generator| log-probability, before the first optimizer step
    gap_at: int = -1  # row (`MicroBatch.order`) where it was seen
    gaps: list[Float32Array] = field(default_factory=list)  # that of every token, of which the driver takes a quantile
    grad_norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0

    def add(self, name: str, mean: Mean) -> None:
        """Add to a metric's sum and count."""
        self.metrics[name] = self.metrics.get(name, Mean(0.0, 0.0)) + mean

    def add_all(self, metrics: Mapping[str, Mean]) -> None:
        """Add to several."""
        for name, mean in metrics.items():
            self.add(name, mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step's update did, over all ranks."""

    metrics: Mapping[str, Mean]
    loss: float  # mean over the step's optimizer steps
    grad_norm: float | None  # likewise, before clipping; None where only the critic learned
    learning_rate: float
    gap_max: float  # largest difference of trainer's and generator's log-probabilities at the rollouts' weights
    gap_sample: str  # where
    gap_quantile: float = 0.0  # see `trainers.logprob_gap`


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a weight sync moved and how it was proved."""

    version: int
    bytes: int
    canary_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One group to score, as text, as messages and as tokens."""

    prompt: Prompt
    prompt_tokens: Int32Array  # [P], the chat template applied
    completions: tuple[Completion, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each completion."""
        return tuple(completion.text for completion in self.completions)

    def chat(self, index: int) -> tuple[Message, ...]:
        """The messages of the prompt and completion `index` as the assistant's reply."""
        return (*self.prompt.messages, {"role": "assistant", "content": self.completions[index].text})


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """A score that could not be had, and why."""

    name: str  # the reward
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """Scores of one group; None where one could not be had.

    `rewards` are raw, by name; `reward` is the weighted sum that is trained on, None where any reward with a weight
    failed.
    """

    rewards: Mapping[str, tuple[float | None, ...]]
    reward: tuple[float | None, ...]
    failures: tuple[ScoreFailure, ...] = ()
