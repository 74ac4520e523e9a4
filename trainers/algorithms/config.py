"""The config of each algorithm, distinguished by `type`. It knows pydantic only.

The rest of the program never asks which algorithm a config belongs to. It asks what the algorithm uses (a critic, a
teacher, rewards, a group's baseline): `AlgorithmSection.capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from trainers.config import Config, SamplingConfig, TrainConfig
from trainers.errors import Problem


class KLConfig(Config):
    """How the policy is held near the reference (the policy as the run began)."""

    coef: float = Field(default=0.05, ge=0, json_schema_extra={"recommended": [0.05, 0.1]})
    """Weight of the KL term; 0 loads no reference."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL divergence: k1 in the reward, k2 or k3 in the loss."""
    placement: Literal["reward", "loss"] = "loss"
    """Whether the KL term is subtracted from the reward (estimator k1) or added to the loss."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether the coefficient stays, or follows the measured KL towards the target (arXiv 1909.08593)."""
    target: float | None = Field(default=None, gt=0)
    """Wanted KL in nats per token, for the adaptive controller."""
    horizon: int = Field(default=10000, gt=0)
    """Samples over which the adaptive controller acts; smaller is quicker."""

    @model_validator(mode="after")
    def _target_with_adaptive(self) -> KLConfig:
        if self.controller == "adaptive" and self.target is None:
            raise ValueError("the adaptive controller needs algorithm.kl.target (nats per token, e.g. 0.05)")
        if self.controller == "adaptive" and self.coef == 0:
            raise ValueError("an adaptive coefficient cannot start at 0; set algorithm.kl.coef above 0")
        return self

    @model_validator(mode="after")
    def _k1_in_the_reward(self) -> KLConfig:
        if self.placement == "reward" and self.estimator != "k1":
            raise ValueError(
                f"the policy gradient of a reward minus {self.estimator} is not that of the KL divergence, only k1 "
                "gives it; set algorithm.kl.estimator: k1"
            )
        return self

    @model_validator(mode="after")
    def _not_k1_in_the_loss(self) -> KLConfig:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "in the loss the gradient of k1 is 0 on average and holds nothing; set algorithm.kl.estimator: k2 or k3"
            )
        return self


class OverlongConfig(Config):
    """Soft punishment of overlong completions: nothing, then a line down over the buffer, then the full penalty."""

    max_tokens: int = Field(ge=1)
    """Length at which the full penalty is reached, in tokens; sampling.max_tokens as a rule."""
    buffer_tokens: int = Field(ge=1)
    """Tokens before that over which the penalty grows."""
    penalty: float = Field(default=1.0, ge=0)
    """What is subtracted from the reward at most."""

    @model_validator(mode="after")
    def _buffer_within(self) -> OverlongConfig:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens is {self.buffer_tokens}; set it to max_tokens ({self.max_tokens}) or less")
        return self


class CriticConfig(Config):
    """The model that foresees rewards: a value head on a transformer, trained beside the policy."""

    model: str | None = None
    """Path, address in a store or hub id of what it starts from, such as the reward's; null = a copy of the policy."""
    train_type: Literal["full", "lora", "qlora"] = "full"
    """What is trained: all weights, or value head and adapter, with r, alpha and target_modules of policy.lora."""
    learning_rate: float = Field(default=1e-5, ge=0)
    """Peak learning rate of the critic's AdamW; schedule and warm-up are the policy's."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of the loop at the start in which only the critic learns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """A teacher, and the divergence from it that is the loss (generalized Jensen–Shannon, arXiv 2306.13649)."""

    model: str  # path, address in a store, or hub id
    served: bool  # an engine gives its top_k log-probabilities, so that no learner holds a copy
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None  # None: over the complete vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioClip:
    """The clip of the probability ratio, below at 1 − low and above at 1 + high."""

    low: float
    high: float
    level: Literal["token", "sequence"] = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an algorithm uses, as the loop, the plan and the learners need to know it."""

    critic: CriticConfig | None = None
    teacher: Distillation | None = None
    learns_from_rewards: bool = True  # False: rewards are monitored only, and there is no policy gradient
    policy_share: float = 1.0  # probability that the policy writes a step's completions; else teacher or data
    group_baseline: Literal["mean", "leave_one_out"] | None = None  # how completions of one prompt are compared
    replaceable_groups: int = 0  # groups of equal rewards that a step may replace, times train.prompts_per_step
    ratio_clip: RatioClip | None = None


class AlgorithmSection(Config):
    """What the config of every algorithm has."""

    type: str
    """Selects the algorithm."""
    kl: KLConfig = KLConfig()
    """KL control."""

    @property
    def capabilities(self) -> Capabilities:
        """What the algorithm uses; here: scalar rewards, nothing else."""
        return Capabilities()

    def problems(self, sampling: SamplingConfig, train: TrainConfig) -> Iterator[Problem]:
        """What is wrong with this section beside those two, although each key is right by itself."""
        uses = self.capabilities
        if not uses.learns_from_rewards and train.importance_correction is not None:
            reason = f"corrects a policy gradient, and {self.type} has none; set it to null"
            yield Problem("train.importance_correction", reason)
        if uses.group_baseline is not None and sampling.n == 1:
            yield Problem(
                "sampling.n",
                "with one completion a prompt every advantage is 0, since completions are compared within "
                "their group; use at least 2 (8 is usual)",
            )
        if uses.critic is not None and uses.critic.warmup_steps >= train.steps:
            yield Problem(
                "algorithm.critic.warmup_steps",
                f"{uses.critic.warmup_steps} of {train.steps} steps train the critic only, so that the policy never "
                "learns; use fewer",
            )


class GRPOConfig(AlgorithmSection):
    """Group relative policy optimization (arXiv 2402.03300) and its variants."""

    type: Literal["grpo"]
    """Selects this algorithm."""
    kl: KLConfig = KLConfig()
    """KL control."""
    advantage: Literal["group", "leave_one_out"] = "group"
    """Baseline: the group's mean (GRPO), or the mean of the others (RLOO, arXiv 2402.14740)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide group advantages by the group's or the batch's standard deviation, or not (Dr. GRPO, 2503.20783)."""
    clip_low: float = Field(default=0.2, ge=0, lt=1, json_schema_extra={"recommended": [0.1, 0.3]})
    """The probability ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(default=0.2, ge=0, json_schema_extra={"recommended": [0.1, 0.3]})
    """The probability ratio is clipped above at 1 + clip_high (DAPO, 2503.14476, uses 0.28)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss is at most this many times its size (1912.09729: 3); null = any."""
    ratio: Literal["token", "sequence"] = "token"
    """The ratio of each token, or of the sequence, per token (GSPO, 2507.18071, with clips of about 0.0003)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of the optimizer step, mean of the sequences' means, or division by a constant."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Prompts a step may try in place of those whose group's rewards are all equal, times prompts_per_step (DAPO)."""
    overlong: OverlongConfig | None = None
    """Subtracts from the reward of completions that come near the length limit (DAPO, 2503.14476); null = nothing."""

    @model_validator(mode="after")
    def _leave_one_out_is_unscaled(self) -> GRPOConfig:
        if self.advantage == "leave_one_out" and self.scale != "none":
            raise ValueError("leave_one_out advantages are not scaled; set algorithm.scale: none")
        return self

    @property
    def capabilities(self) -> Capabilities:
        """Rewards, compared within a group."""
        return Capabilities(
            group_baseline="mean" if self.advantage == "group" else "leave_one_out",
            replaceable_groups=self.dynamic_sampling,
            ratio_clip=RatioClip(low=self.clip_low, high=self.clip_high, level=self.ratio),
        )

    def problems(self, sampling: SamplingConfig, train: TrainConfig) -> Iterator[Problem]:
        """See `AlgorithmSection`."""
        yield from super().problems(sampling, train)
        if self.overlong is not None and self.overlong.max_tokens > sampling.max_tokens:
            yield Problem(
                "algorithm.overlong.max_tokens",
                f"{self.overlong.max_tokens} is more than any completion has (sampling.max_tokens "
                f"{sampling.max_tokens}); set it to {sampling.max_tokens}",
            )


class PPOKLConfig(KLConfig):
    """KL control of PPO: in the reward by default."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of the KL divergence: k1 in the reward, k2 or k3 in the loss."""
    placement: Literal["reward", "loss"] = "reward"
    """Whether the KL term is subtracted from the reward, token by token, or added to the loss."""


class PPOConfig(AlgorithmSection):
    """Proximal policy optimization with a critic (arXiv 1707.06347)."""

    type: Literal["ppo"]
    """Selects this algorithm."""
    kl: PPOKLConfig = PPOKLConfig()
    """KL control."""
    gamma: float = Field(default=1.0, ge=0, le=1, json_schema_extra={"recommended": [0.99, 1]})
    """Discount of later rewards, per token; 1 = none."""
    lam: float = Field(default=0.95, ge=0, le=1, json_schema_extra={"recommended": [0.9, 1]})
    """Lambda of generalized advantage estimation (arXiv 1506.02438): 1 = no bias, smaller = less variance."""
    clip_low: float = Field(default=0.2, ge=0, lt=1, json_schema_extra={"recommended": [0.1, 0.3]})
    """The probability ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(default=0.2, ge=0, json_schema_extra={"recommended": [0.1, 0.3]})
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss is at most this many times its size (1912.09729: 3); null = any."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far the critic's value may move from the one before the update and still lower the loss; null = any."""
    critic: CriticConfig = CriticConfig()
    """The critic."""

    @property
    def capabilities(self) -> Capabilities:
        """Rewards, judged against a critic."""
        return Capabilities(critic=self.critic, ratio_clip=RatioClip(low=self.clip_low, high=self.clip_high))


class GKDKLConfig(KLConfig):
    """KL control of GKD: none by default, for the teacher already holds the policy."""

    coef: float = Field(default=0.0, ge=0)
    """Weight of the KL term; 0 (the default here) loads no reference."""

    @model_validator(mode="after")
    def _in_the_loss(self) -> GKDKLConfig:
        if self.placement != "loss":
            raise ValueError("gkd learns from no reward to put the KL term in; set algorithm.kl.placement: loss")
        return self


class TeacherConfig(Config):
    """The model that is learnt from; it must have the policy's vocabulary."""

    model: str
    """Path, address in a store, or hub id."""
    served: bool = False
    """Whether a vLLM engine gives its `top_k` log-probabilities, so that no learner rank holds a copy of it."""


class GKDConfig(AlgorithmSection):
    """Generalised knowledge distillation from a teacher (arXiv 2306.13649)."""

    type: Literal["gkd"]
    """Selects this algorithm."""
    kl: GKDKLConfig = GKDKLConfig()
    """KL control."""
    teacher: TeacherConfig
    """The teacher."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Which divergence: 0 = KL(teacher ‖ policy), 1 = KL(policy ‖ teacher), between = generalized Jensen–Shannon."""
    lmbda: float = Field(default=0.5, ge=0, le=1, json_schema_extra={"recommended": [0.5, 1]})
    """Probability that the policy writes a step's completions; else the teacher does, or they are the data's."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits in the divergence; it is not the temperature of sampling."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare the teacher's most probable tokens and the rest as one; null = exact, over the complete vocabulary."""

    @model_validator(mode="after")
    def _what_an_engine_gives(self) -> GKDConfig:
        if self.teacher.served and self.top_k is None:
            raise ValueError(
                "a served teacher gives its most probable tokens only; set algorithm.top_k (e.g. 64), or "
                "algorithm.teacher.served: false for the exact divergence"
            )
        if self.teacher.served and self.temperature != 1:
            raise ValueError(
                "a served teacher's log-probabilities are those at temperature 1; set algorithm.temperature: 1, or "
                "algorithm.teacher.served: false"
            )
        return self

    @property
    def capabilities(self) -> Capabilities:
        """A teacher; rewards are monitored only."""
        return Capabilities(
            teacher=Distillation(
                model=self.teacher.model,
                served=self.teacher.served,
                beta=self.beta,
                temperature=self.temperature,
                top_k=self.top_k,
            ),
            learns_from_rewards=False,
            policy_share=self.lmbda,
        )


AlgorithmConfig: TypeAlias = Annotated[GRPOConfig | PPOConfig | GKDConfig, Field(discriminator="type")]
