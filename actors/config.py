"""The config of the roles: policy, generators, learners, placement. It knows pydantic only, so that the command
line's help, the plan and the service can read it without an engine."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from trainers.config import Config

Placement: TypeAlias = Literal["split", "colocated"]


class PolicyConfig(Config):
    """The model that is trained."""

    model: str
    """Path or hub id of an instruction-tuned causal language model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of weights and arithmetic in generators and learners; the optimizer keeps float32 master weights."""
    train_type: Literal["full"] = "full"
    """What is trained: all weights."""
    chat_template: str | None = None
    """A Jinja chat template that replaces the tokenizer's own; null = the tokenizer's."""


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


class SyncConfig(Config):
    """The proof that generators hold what the learners trained."""

    transport: Literal["auto", "nccl", "ipc", "ray"] = "auto"
    """How weights travel; auto = nccl between GPUs, ipc on the same GPU, ray (object store) on CPUs."""
    max_logprob_gap: float | None = Field(default=None, gt=0)
    """Largest difference of log-probabilities between generator and trainer at the same weights before the run
    stops; null = 1e-3 in float32, 0.5 in bfloat16 for a single token, see docs/operations.md."""
    canary_prompts: int = Field(default=4, ge=1)
    """Prompts whose log-probabilities are compared after each sync."""

    def allowed_gap(self, dtype: str) -> float:
        """The threshold that holds for a policy of that type."""
        if self.max_logprob_gap is not None:
            return self.max_logprob_gap
        return 1e-3 if dtype == "float32" else 0.5
