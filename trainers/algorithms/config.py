"""The config of each algorithm, told apart by `type`. It knows pydantic only."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from trainers.config import Config


class KLConfig(Config):
    """How the policy is held near the reference (the policy as the run began)."""

    coef: float = Field(default=0.05, ge=0)
    """Weight of the KL term; 0.05 to 0.1 is recommended, 0 loads no reference."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL divergence (k1 in the reward; k3 has the lower variance in the loss)."""
    placement: Literal["reward", "loss"] = "loss"
    """Whether the KL term is subtracted from the reward or added to the loss."""
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


class GRPOConfig(Config):
    """Group relative policy optimisation (arXiv 2402.03300) and its variants."""

    type: Literal["grpo"]
    """Selects this algorithm."""
    kl: KLConfig = KLConfig()
    """KL control."""
    advantage: Literal["group", "leave_one_out"] = "group"
    """Baseline: the group's mean (GRPO), or the mean of the others (RLOO, arXiv 2402.14740)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide group advantages by the group's or the batch's standard deviation, or not (Dr. GRPO, 2503.20783)."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The probability ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """The probability ratio is clipped above at 1 + clip_high (DAPO, 2503.14476, uses 0.28)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of the optimizer step, mean of the sequences' means, or division by a constant."""

    @model_validator(mode="after")
    def _leave_one_out_is_unscaled(self) -> GRPOConfig:
        if self.advantage == "leave_one_out" and self.scale != "none":
            raise ValueError("leave_one_out advantages are not scaled; set algorithm.scale: none")
        return self

    @model_validator(mode="after")
    def _placement(self) -> GRPOConfig:
        if self.kl.placement != "loss":
            raise ValueError("grpo has its KL term in the loss; set algorithm.kl.placement: loss")
        return self


AlgorithmConfig: TypeAlias = GRPOConfig
