"""The learner: one ZeRO rank that annotates samples, updates the policy and hands its weights out.

A plain class, testable in-process; `group.py` makes a Ray actor of it. It knows the algorithm only through its
protocol and DeepSpeed only through `deepspeed_engine.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from actors.messages import AnnotatedRows, LearnerSpec, UpdateReport
from actors.policy import forward_logprobs, load_model, load_tokenizer
from actors.weights import GeneratorClient, ObjectStoreSender, Route, SentWeights, WeightSender
from trainers.algorithms.base import Mean, Need, PolicyTokens, Totals
from trainers.algorithms.catalog import make_algorithm
from trainers.packing import MicroBatch, OptimizerStep
from trainers.types import Float32Array

if TYPE_CHECKING:
    from actors.deepspeed_engine import FrozenEngine, TrainingEngine


class Learner:
    """One rank. `start` comes first, then `connect`; every method is called on all ranks at once."""

    def __init__(self, spec: LearnerSpec, *, rank: int, world_size: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._algorithm = make_algorithm(spec.algorithm, spec.train)
        self._policy: TrainingEngine
        self._reference: FrozenEngine | None = None
        self._sender: WeightSender

    def start(self, init_method: str) -> None:
        """Join the other ranks at `init_method` (tcp://host:port) and load the models."""
        from actors.deepspeed_engine import FrozenEngine, TrainingEngine, shard_while_loading  # here: takes seconds
        from actors.deepspeed_ops import use_built_ops

        spec = self._spec
        use_built_ops()
        torch.manual_seed(spec.seed)
        random.seed(spec.seed)
        np.random.seed(spec.seed % 2**32)
        dist.init_process_group(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            init_method=init_method,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=spec.collective_timeout_s),
        )
        sharding = shard_while_loading(spec.learners, dtype=spec.policy.dtype)
        model = load_model(spec.policy, gradient_checkpointing=spec.learners.gradient_checkpointing)
        self._policy = TrainingEngine(
            model,
            learner=spec.learners,
            train=spec.train,
            dtype=spec.policy.dtype,
            total_steps=spec.total_optimizer_steps,
        )
        if "ref_logprobs" in self._algorithm.needs:
            self._reference = FrozenEngine(load_model(spec.policy), learner=spec.learners, dtype=spec.policy.dtype)
        del sharding  # had to live until the last model was loaded
        self._warm_up()

    def connect(self, generators: Sequence[ActorHandle], route: Route) -> None:
        """Open the way over which `publish` sends."""
        client = GeneratorClient(generators, deadline_s=route.deadline_s)
        source = self._policy.weights()
        if route.transport == "ray":
            self._sender = ObjectStoreSender(source, client, rank=self._rank)
            return
        from actors.vllm_weights import VllmSender  # importing vLLM takes ten seconds that "ray" can do without

        self._sender = VllmSender(route, source, client, rank=self._rank)

    @torch.no_grad()
    def annotate(self, batches: Sequence[MicroBatch], needs: frozenset[Need]) -> list[AnnotatedRows]:
        """Log-probabilities of the policy as it is and of the reference, of each micro-batch."""
        return [
            AnnotatedRows(
                old_logprobs=self._logprobs(self._policy, batch) if "old_logprobs" in needs else None,
                ref_logprobs=self._logprobs(self._reference, batch) if "ref_logprobs" in needs else None,
            )
            for batch in batches
        ]

    def update(self, steps: Sequence[OptimizerStep], kl_coef: float) -> UpdateReport:
        """Run the optimizer steps of one step of the loop."""
        report = UpdateReport()
        for index, step in enumerate(steps):
            totals = Totals(
                tokens=step.total_tokens,
                sequences=step.total_sequences,
                max_tokens=self._spec.max_completion_tokens,
            )
            report.learning_rate = self._policy.learning_rate
            shares = [self._accumulate(batch, totals, kl_coef, report, index == 0) for batch in step.micro_batches]
            report.losses.append(sum(shares))
            report.grad_norms.append(self._policy.step())
        return report

    def publish(self) -> SentWeights:
        """Send the weights to the generators; digests and bytes on the rank that sends."""
        return self._sender.send()

    def save(self, directory: str) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer, random state."""
        path = Path(directory)
        self._policy.save(path)
        state = {"torch": torch.get_rng_state(), "rank": torch.tensor(self._rank)}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        torch.save(state, path / f"rng-{self._rank:05d}.pt")

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""
        path = Path(directory)
        self._policy.load(path)
        state = torch.load(path / f"rng-{self._rank:05d}.pt", weights_only=True)
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def export(self, directory: str) -> None:
        """Write the policy in Hugging Face format, from rank 0."""
        weights = {}
        for name, tensor in self._policy.weights():
            if self._rank == 0:
                weights[name] = tensor.cpu()
        if self._rank == 0:
            model: Any = self._policy.module
            model.config.use_cache = True
            model.save_pretrained(directory, state_dict=weights)
            model.config.use_cache = False
            load_tokenizer(self._spec.policy).save_pretrained(directory)

    def offload(self) -> None:
        """Leave the GPU to a colocated generator."""
        self._policy.offload()

    def reload(self) -> None:
        """Take the GPU back."""
        self._policy.reload()

    def _warm_up(self) -> None:
        """One forward pass: before it, ZeRO-3 may gather storage that was never filled."""
        token = torch.zeros(1, 2, dtype=torch.long, device=self._policy.device)
        with torch.no_grad():
            self._policy(input_ids=token)

    def _logprobs(self, model: Callable[..., Any] | None, batch: MicroBatch) -> Float32Array:
        assert model is not None, "this run loaded no such model"
        tokens, lengths = self._on_device(batch.tokens).long(), self._on_device(batch.lengths)
        logprobs, _ = forward_logprobs(model, tokens, lengths, temperature=self._spec.temperature)
        return logprobs.cpu().numpy()

    def _accumulate(
        self, batch: MicroBatch, totals: Totals, kl_coef: float, report: UpdateReport, at_rollout_weights: bool
    ) -> float:
        tokens, lengths = self._on_device(batch.tokens).long(), self._on_device(batch.lengths)
        logprobs, entropy = forward_logprobs(self._policy, tokens, lengths, temperature=self._spec.temperature)
        mask = self._on_device(batch.mask)
        assert batch.advantages is not None
        rollout = self._on_device(batch.rollout_logprobs)
        view = PolicyTokens(
            logprobs=logprobs,
            entropy=entropy,
            mask=mask,
            sequence_ids=torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens).contiguous(),
            rollout_logprobs=rollout,
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else self._on_device(batch.old_logprobs),
            ref_logprobs=None if batch.ref_logprobs is None else self._on_device(batch.ref_logprobs),
            advantages=self._on_device(batch.advantages),
        )
        output = self._algorithm.loss(view, totals=totals, kl_coef=kl_coef)
        self._policy.backward(output.loss)
        for name, mean in output.metrics.items():
            report.add(name, mean)
        if at_rollout_weights:
            _note_gap(report, batch, (logprobs.detach() - rollout).abs(), mask)
        return float(output.loss.detach())

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self._policy.device)  # Ray's arrays are read-only


def _note_gap(report: UpdateReport, batch: MicroBatch, gap: Tensor, mask: Tensor) -> None:
    """Keep mean and largest difference between trainer and generator at the same weights."""
    if not bool(mask.any()) or math.isnan(report.gap_max):
        return
    chosen = torch.where(mask, gap, 0.0)
    report.add("rollout/logprob_gap_mean", Mean(float(chosen.sum()), float(mask.sum())))
    by_row = chosen.max(dim=1).values
    row = int(by_row.argmax())  # NaN counts as the largest
    worst = float(by_row[row])
    if math.isnan(worst) or worst > report.gap_max:
        report.gap_max, report.gap_at = worst, int(batch.order[row])
