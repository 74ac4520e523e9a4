"""Estimates of memory before anything starts. Formulas are in the docstrings; all are rough and say so.

Pure arithmetic on the config and a model's sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.config.run import RunConfig
from cluster.models.inspect import ModelInfo

GIB = 2**30
ADAM_BYTES = 12  # a float32 master weight and Adam's two moments


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process of a role, by what they hold; `device` on the GPU (without one: all in host memory)."""

    role: str
    device: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one process for one purpose."""

    name: str
    size: int
    on_host: bool = False


def dtype_bytes(config: RunConfig) -> int:
    """Bytes of a weight."""
    return 4 if config.policy.dtype == "float32" else 2


def learner_memory(config: RunConfig, model: ModelInfo, *, teacher: ModelInfo | None = None) -> MemoryEstimate | None:
    """One rank, with P parameters of b bytes over W ranks and ZeRO stage z. None where P is not known.

    weights b·P (/W if z = 3; qlora: half a byte each, on every rank), gradients 4·T (summed in float32; /W if z ≥ 2),
    optimizer 12·T (/W if z ≥ 1; arXiv 1910.02054) for T trained parameters (P, or the adapter's), reference b·P
    (/W if z = 3) if there is a KL term and no adapter to switch off, a critic as such a policy again, by its own
    train type (T: the adapter's and the head's), a teacher b·P of its own (/W if z = 3) unless it is served,
    activations 17·b·t·h a layer for t tokens of a micro-batch and width h (arXiv 2205.05198 without the attention
    scores, which are not kept), with gradient checkpointing b·t·h a layer and one whole layer,
    logits 2·b·t·V (they and their gradient) for a vocabulary of V.
    """
    parameters, b = model.parameters, dtype_bytes(config)
    if parameters is None:
        return None
    train_type, lora = config.policy.train_type, config.policy.lora
    adapted = train_type != "full"
    trained = adapter_parameters(model, config.policy.adapter_rank or 0) if adapted else parameters
    parts = [*_in_training(config, parameters, trained, quantized=train_type == "qlora")]
    if (critic := config.algorithm.capabilities.critic) is not None:
        judging = critic.train_type
        trained = parameters if judging == "full" else adapter_parameters(model, lora.r) + (model.hidden or 0)
        parts += _together("critic", _in_training(config, parameters, trained, quantized=judging == "qlora"))
    sharded = config.learners.workers if config.learners.zero_stage == 3 else 1
    off_loaded = config.learners.offload == "all"
    if config.algorithm.kl.coef > 0 and not adapted:
        parts.append(Part("reference", b * parameters // sharded, off_loaded))
    if teacher is not None and teacher.parameters is not None and config.served_top_k is None:
        parts.append(Part("teacher", b * teacher.parameters // sharded, off_loaded))
    tokens = config.train.max_tokens_per_microbatch
    if model.layers is not None and model.hidden is not None:
        inputs = tokens * model.hidden * b  # of one layer
        checkpointed = config.learners.gradient_checkpointing
        activations = inputs * (model.layers + 17) if checkpointed else 17 * inputs * model.layers
        parts.append(Part("activations", activations))
    if model.vocabulary is not None:
        parts.append(Part("logits", 2 * b * tokens * model.vocabulary))
    return _estimate("learner", parts)


def _in_training(config: RunConfig, parameters: int, trained: int, *, quantized: bool) -> tuple[Part, ...]:
    """One model's share; 4-bit weights are neither sharded nor off-loaded."""
    ranks, stage, offload = config.learners.workers, config.learners.zero_stage, config.learners.offload
    weights = parameters // 2 if quantized else dtype_bytes(config) * parameters // (ranks if stage == 3 else 1)
    return (
        Part("weights", weights, on_host=offload == "all" and not quantized),
        Part("gradients", 4 * trained // (ranks if stage >= 2 else 1)),
        Part("optimizer", ADAM_BYTES * trained // (ranks if stage >= 1 else 1), on_host=offload != "none"),
    )


def _together(name: str, parts: Iterable[Part]) -> Iterator[Part]:
    """Their sums, on the device and on the host."""
    whole = _estimate("", parts)
    for held, on_host in ((whole.device, False), (whole.host, True)):
        if held:
            yield Part(name, sum(held.values()), on_host)


def _estimate(role: str, parts: Iterable[Part]) -> MemoryEstimate:
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    for part in parts:
        (host if part.on_host else device)[part.name] = part.size
    return MemoryEstimate(role, device, host)


def adapter_parameters(model: ModelInfo, rank: int) -> int:
    """Numbers of an adapter of rank r on every linear layer: about 23·h·r a layer of width h (attention 4 × 2·h·r, a
    gated MLP of width 4·h: 3 × 5·h·r); 0 where the config does not say."""
    return 23 * (model.hidden or 0) * rank * (model.layers or 0)


def kv_bytes_per_token(config: RunConfig, model: ModelInfo) -> int | None:
    """2 (key and value) · layers · key-value width · bytes; None where the config does not say."""
    if model.layers is None or model.kv_width is None:
        return None
    return 2 * model.layers * model.kv_width * dtype_bytes(config)


def generator_memory(config: RunConfig, model: ModelInfo, *, gpus: bool) -> MemoryEstimate | None:
    """One GPU's share of an engine: weights b·P / tensor_parallel and the key-value cache.

    On the CPU the cache is `generators.kv_cache_gib`. On a GPU it is what `gpu_memory_utilization` leaves; the
    estimate is what all of `max_num_seqs` (at most a step's samples) need at full length.
    """
    if model.parameters is None:
        return None
    shards = config.generators.tensor_parallel
    weights = Part("weights", dtype_bytes(config) * model.parameters // shards)
    if not gpus:
        return _estimate("generator", [weights, Part("kv_cache", int(config.generators.kv_cache_gib * GIB))])
    parts, per_token = [weights], kv_bytes_per_token(config, model)
    if per_token is not None:
        samples = config.train.prompts_per_step * config.sampling.n
        sequences = min(config.generators.max_num_seqs, -(-samples // config.generators.replicas))
        parts.append(Part("kv_cache", per_token * config.max_model_len * sequences // shards))
    return _estimate("generator", parts)
