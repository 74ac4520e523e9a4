"""The base of every config class, and the sections on sampling and training. It knows pydantic only.

Each layer defines its own config beside what it configures; `cluster/config/run.py` composes them. The text under a
field is its help in `rlhf plan`, in the JSON schema and in `docs/configuration.md`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """A frozen section of the config tree; unknown keys are refused, validators refuse and never rewrite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class SamplingConfig(Config):
    """How completions are drawn. Every option keeps generator and trainer on the same distribution."""

    # Meant for what compares a prompt's completions: the plan's warnings and docs/configuration.md say so.
    n: int = Field(default=8, ge=1, json_schema_extra={"recommended": [4, 64], "recommended_for": ["grpo"]})
    """Completions for each prompt (the group size)."""
    temperature: float = Field(default=1.0, gt=0, le=10, json_schema_extra={"recommended": [0.7, 1.2]})
    """Divides the logits, in the generator and in the trainer alike."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest completion, in tokens; a longer one ends as `length` and counts as truncated."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion besides the end-of-sequence token."""


class ImportanceConfig(Config):
    """Correction for the difference between the generator's and the trainer's log-probabilities."""

    level: Literal["token", "sequence"] = "token"
    """Per token, or the geometric mean over the sequence."""
    cap: float = Field(default=2.0, gt=0)
    """Largest weight (truncated importance sampling); ignored if there is a band."""
    floor: float | None = Field(default=None, ge=0)
    """Smallest weight; null = none."""
    band: tuple[float, float] | None = None
    """Lowest and highest weight: inside, the weight is kept, outside it is 0 (IcePop); null = cap and floor act."""

    @model_validator(mode="after")
    def _limits(self) -> ImportanceConfig:
        if self.floor is not None and self.floor > self.cap:
            raise ValueError(f"the floor {self.floor:g} is above the cap {self.cap:g}; set floor to the cap or below")
        if self.band is None:
            return self
        if self.floor is not None:
            raise ValueError("a floor has no effect with a band; leave out one of the two")
        low, high = self.band
        if not 0 <= low <= 1 <= high:
            raise ValueError(
                f"the band {low:g} to {high:g} must include 1, the weight if generator and trainer agree, and start "
                "at 0 or above; set band such as [0.5, 2.0]"
            )
        return self


class TrainConfig(Config):
    """One optimizer, one step of the loop."""

    steps: int = Field(default=100, ge=1)
    """Steps of the loop: rollouts, scores, update, weight sync."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts of one step; each gets `sampling.n` completions."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps that one pass over a step's samples is cut into (1 = exactly on-policy)."""
    epochs_per_step: int = Field(default=1, ge=1, json_schema_extra={"recommended": [1, 4]})
    """Passes over a step's samples."""
    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate changes after the warm-up; linear and cosine reach 0 after the last optimizer step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0, json_schema_extra={"recommended": [0, 0.1]})
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, json_schema_extra={"recommended": [0.1, 1]})
    """Gradients are scaled down to this global norm."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=1)
    """Token budget of one forward and backward pass, padding included; changes memory and speed, never the result."""
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of a step's samples whose scores may fail (they are left out); more stops the run with the first cause."""
    max_staleness: int = Field(default=0, ge=0, le=0)
    """How many policy versions a completion may lag behind; 0 = synchronous (the only value so far)."""
    importance_correction: ImportanceConfig | None = None
    """Multiplies the policy loss by capped importance weights; null = no correction."""
