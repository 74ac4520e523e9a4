"""The config of the roles: policy, generators, learners, placement. It knows pydantic only, so that the command
line's help, the plan and the service can read it without an engine."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from trainers.config import Config
from trainers.logprob_gap import GapLimits, gap_limits

Transport: TypeAlias = Literal["ray", "nccl", "ipc"]
Placement: TypeAlias = Literal["split", "colocated"]
TrainType: TypeAlias = Literal["full", "lora", "qlora", "adalora"]

LARGEST_RANK = 512  # of an adapter that vLLM serves


class LoraConfig(Config):
    """The adapter of the train types lora, qlora and adalora."""

    r: int = Field(default=16, ge=1, le=LARGEST_RANK, json_schema_extra={"recommended": [8, 64]})
    """Rank of the adapter (lora, qlora)."""
    alpha: float = Field(default=32.0, gt=0, json_schema_extra={"recommended": [16, 128]})
    """The adapter's output is scaled by alpha / r (adalora: alpha / init_r)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Only 0: rollouts are written without dropout, so that with it every log-probability ratio would be wrong."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names (last parts) of the layers that get an adapter; all-linear = every linear layer but the output head."""
    init_r: int = Field(default=12, ge=1, le=LARGEST_RANK)
    """adalora: rank of every layer's adapter at the beginning."""
    target_r: int = Field(default=8, ge=1)
    """adalora: mean rank of the layers in the end."""
    tinit: int | None = Field(default=None, ge=0)
    """adalora: optimizer steps before ranks begin to fall; null = a tenth of the run's."""
    tfinal: int | None = Field(default=None, ge=0)
    """adalora: optimizer steps at the end, in which the ranks stay; null = a third of the run's."""
    delta_t: int = Field(default=1, ge=1)
    """adalora: optimizer steps between two allocations of ranks."""
    orth_reg_weight: float = Field(default=0.5, ge=0)
    """adalora: weight of the penalty on bases that are not orthogonal; 0.5 is PEFT's, less lets them turn sooner."""

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout > 0:
            raise ValueError("only 0: completions are written without dropout, so training must have none either")
        return dropout

    @model_validator(mode="after")
    def _ranks_fall(self) -> LoraConfig:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r {self.target_r} is not below init_r {self.init_r}; adalora's ranks fall")
        return self

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """adalora's (tinit, tfinal) in a run of that many optimizer steps.

        >>> LoraConfig().schedule(60)
        (6, 20)
        """
        tinit = total_steps // 10 if self.tinit is None else self.tinit
        tfinal = total_steps // 3 if self.tfinal is None else self.tfinal
        return tinit, tfinal


class PolicyConfig(Config):
    """The model that is trained."""

    model: str
    """Path, address in a store (s3://bucket/policy) or hub id of an instruction-tuned causal language model, or path or
    address of a PEFT adapter on one."""
    adapter: Literal["merge", "continue"] = "merge"
    """Where model is an adapter: merge it into its base first, which every train type can train; or continue it (lora
    and qlora), with its own rank, alpha and layers in place of policy.lora's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of weights and arithmetic in generators and learners; the optimizer keeps float32 master weights."""
    train_type: TrainType = "full"
    """What is trained: all weights, an adapter (lora), an adapter on 4-bit weights (qlora), one of adaptive rank."""
    lora: LoraConfig = LoraConfig()
    """The adapter, for every train type but full."""
    chat_template: str | None = None
    """A Jinja chat template that replaces the tokenizer's own; null = the tokenizer's."""

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapter that the generators serve; None where all weights are trained."""
        if self.train_type == "full":
            return None
        return self.lora.init_r if self.train_type == "adalora" else self.lora.r

    @property
    def served_alpha(self) -> float:
        """What the generators scale the adapter by, times its rank; PEFT's AdaLoRA divides by rank + 1e-5."""
        if self.train_type == "adalora":
            return self.lora.alpha * self.lora.init_r / (self.lora.init_r + 1e-5)
        return self.lora.alpha


class GeneratorConfig(Config):
    """The vLLM engines that write completions."""

    replicas: int = Field(default=1, ge=1)
    """Independent engines; groups are spread over them."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of each GPU's memory that vLLM may take."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of an engine on the CPU, in GiB."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus completion; null = data.max_prompt_tokens + sampling.max_tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences that one engine works on at once."""
    enforce_eager: bool = False
    """Run without CUDA graphs (always so on the CPU)."""
    prefix_caching: bool = True
    """Reuse the key-value cache of a group's common prompt."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one engine; null = this machine's cores (generators and learners take turns)."""


class LearnerConfig(Config):
    """The DeepSpeed ranks that train."""

    workers: int = Field(default=1, ge=1)
    """Ranks, one GPU each (or one process each on the CPU)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over the ranks: 1 optimizer states, 2 and gradients, 3 and weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory: the optimizer's states, or with ZeRO-3 the weights too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one rank; null = this machine's cores divided by the ranks on it."""

    @property
    def data_parallel_size(self) -> int:
        """How many shares a step's samples are cut into. Ranks that hold parts of one model get the same share; today
        every rank has a share of its own."""
        return self.workers


class SyncConfig(Config):
    """The proof that generators hold what the learners trained."""

    transport: Literal["auto", "nccl", "ipc", "ray"] = "auto"
    """How weights travel; auto = nccl between GPUs, ipc on the same GPU, ray (object store) on CPUs."""
    max_logprob_gap: float | None = Field(default=None, gt=0)
    """Difference of log-probabilities between generator and trainer at the same weights that one token in a thousand
    may exceed in a step; if more do, the run stops. null = 1e-3 in float32, 1 in bfloat16; see docs/semantics.md."""
    max_mean_logprob_gap: float | None = Field(default=None, gt=0)
    """Largest mean of that difference in a step before the run stops; null = 0.15 times the other limit."""
    canary_prompts: int = Field(default=4, ge=1)
    """Prompts whose log-probabilities are compared after each sync."""

    def allowed_gap(self, dtype: str) -> GapLimits:
        """The limits for a policy of that type."""
        return gap_limits(dtype, quantile=self.max_logprob_gap, mean=self.max_mean_logprob_gap)
