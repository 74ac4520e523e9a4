"""The learner: one ZeRO rank that annotates samples, updates the policy and hands its weights out.

A plain class, testable in-process; `group.py` makes a Ray actor of it. It knows the algorithm only through its
protocol, and DeepSpeed not at all: its models are in `models.py`, what differs between train types in
`trained_policy.py`. Importing it loads neither transformers nor DeepSpeed: the driver does so to start it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from actors.config import PolicyConfig
from actors.messages import AnnotatedRows, LearnerSpec, UpdateOptions, UpdateReport
from actors.runtime.actor_group import inner_deadline
from actors.weights.transfer import GeneratorClient, Route, SentWeights, WeightSender
from actors.weights.transports import make_sender
from trainers.adapter_folder import AdapterFolder
from trainers.algorithms.base import ActorCritic, Mean, Need, Totals
from trainers.algorithms.catalog import make_algorithm
from trainers.algorithms.terms import require_kept
from trainers.packing import MicroBatch, OptimizerStep

if TYPE_CHECKING:
    from actors.learner.models import LearnerModels

_CRITIC = "critic"  # folder of its part of a checkpoint
_KEPT = "importance/kept"


class Learner:
    """One rank. `start` comes first, but for `merge`, then `connect`; every method is called on all ranks at once."""

    def __init__(self, spec: LearnerSpec, *, rank: int, world_size: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._algorithm = make_algorithm(spec.algorithm, spec.train)
        self._models: LearnerModels
        self._sender: WeightSender

    def start(self, init_method: str) -> None:
        """Join the other ranks at `init_method` (tcp://host:port) and load the models."""
        from actors.learner.deepspeed_ops import use_built_ops
        from actors.learner.models import LearnerModels  # here: importing DeepSpeed takes seconds

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
            timeout=timedelta(seconds=inner_deadline(spec.collective_timeout_s)),
        )
        self._models = LearnerModels(spec, self._algorithm.needs)

    def connect(self, generators: Sequence[ActorHandle], route: Route) -> None:
        """Open the way over which `publish` sends."""
        client = GeneratorClient(generators, deadline_s=inner_deadline(route.deadline_s))
        source = self._models.policy.exported_weights()
        self._sender = make_sender(route, source, client, rank=self._rank)

    def annotate(self, batches: Sequence[MicroBatch], needs: frozenset[Need]) -> list[AnnotatedRows]:
        """Log-probabilities of the policy as it is and of the reference, and the critic's values."""
        models = self._models
        return [
            AnnotatedRows(
                old_logprobs=models.logprobs(batch) if "old_logprobs" in needs else None,
                ref_logprobs=models.ref_logprobs(batch) if "ref_logprobs" in needs else None,
                values=models.values(batch) if "values" in needs else None,
            )
            for batch in batches
        ]

    def update(self, steps: Sequence[OptimizerStep], order: UpdateOptions) -> UpdateReport:
        """Run the optimizer steps of one step of the loop."""
        report, policy = UpdateReport(), self._models.policy
        for index, step in enumerate(steps):
            report.learning_rate = policy.engine.learning_rate
            loss = self._learn(step, order, report, at_rollout_weights=index == 0 and order.from_policy)
            if order.train_policy:
                loss += policy.step(report)
            report.losses.append(loss)
            if self._models.critic is not None:
                self._models.critic.step()
        return report

    def _learn(
        self, step: OptimizerStep, order: UpdateOptions, report: UpdateReport, *, at_rollout_weights: bool
    ) -> float:
        """The gradients of one optimizer step; this rank's share of the policy's loss."""
        totals = Totals(
            tokens=step.total_tokens, sequences=step.total_sequences, max_tokens=self._spec.max_completion_tokens
        )
        share, kept = 0.0, Mean(0.0, 0.0)
        for batch in step.micro_batches:
            with torch.set_grad_enabled(order.train_policy):
                view = self._models.policy_tokens(batch)
                output = self._algorithm.loss(view, totals=totals, kl_coef=order.kl_coef)
            if at_rollout_weights:
                _note_gap(report, batch, (view.logprobs.detach() - view.rollout_logprobs).abs(), view.mask)
            share += float(output.loss.detach())
            report.add_all(output.metrics)
            kept += output.metrics.get(_KEPT, Mean(0.0, 0.0))
            if order.train_policy:
                self._models.policy.engine.backward(output.loss)
            if self._models.critic is not None:
                judging = cast("ActorCritic", self._algorithm)
                judged = judging.value_loss(self._models.value_tokens(batch), totals=totals)
                self._models.critic.backward(judged.loss)
                report.add_all(judged.metrics)
        correction = self._spec.train.importance_correction
        if correction is not None and correction.band is not None:
            _refuse_empty(kept)
        return share

    def publish(self) -> SentWeights:
        """Send the weights to the generators; digests and bytes on the rank that sends."""
        return self._sender.send()

    def save(self, directory: str) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer, random state."""
        path = Path(directory)
        self._models.policy.save(path)
        if self._models.critic is not None:
            self._models.critic.save(path / _CRITIC)
        state = {"torch": torch.get_rng_state(), "rank": torch.tensor(self._rank)}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        torch.save(state, path / f"rng-{self._rank:05d}.pt")

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""
        path = Path(directory)
        self._models.policy.load(path)
        if self._models.critic is not None:
            self._models.critic.load(path / _CRITIC)
        state = torch.load(path / f"rng-{self._rank:05d}.pt", weights_only=True)
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def export(self, directory: str) -> None:
        """Write what was trained in Hugging Face format, from rank 0."""
        from actors.modeling.causal_lm import load_tokenizer

        weights = {}
        for name, tensor in self._models.policy.engine.weights():
            if self._rank == 0:
                weights[name] = tensor.cpu()
        if self._rank == 0:
            self._models.policy.write(Path(directory), weights)
            load_tokenizer(self._spec.policy, self._spec.adapter).save_pretrained(directory)

    def merge(self, policy: PolicyConfig, adapter: AdapterFolder, directory: str) -> None:
        """Write `policy` with the adapter merged into it, which the roles then load; from rank 0, before `start`."""
        from actors.modeling.merge import write_merged

        if self._rank == 0:
            write_merged(policy, adapter, Path(directory))

    def write_base(self, directory: str) -> None:
        """Write the quantized base as the generators serve it, from rank 0."""
        from actors.modeling.causal_lm import load_model, load_tokenizer
        from actors.modeling.quantized import write_dequantized

        if self._rank == 0:
            write_dequantized(self._models.policy.engine.module, load_model(self._spec.policy), Path(directory))
            load_tokenizer(self._spec.policy, self._spec.adapter).save_pretrained(directory)

    def offload(self) -> None:
        """Leave the GPU to a colocated generator; the policy still computes log-probabilities and sends its weights."""
        self._models.offload()

    def reload(self) -> None:
        """Take the GPU back."""
        self._models.reload()


def _refuse_empty(kept: Mean) -> None:
    """All ranks together, also those without a token: a band that keeps none is an error, not a gradient of 0."""
    counts = torch.tensor([kept.total, kept.count], dtype=torch.float64)
    if torch.cuda.is_available():
        counts = counts.cuda()
    dist.all_reduce(counts)
    require_kept({_KEPT: Mean(*counts.tolist())})


def _note_gap(report: UpdateReport, batch: MicroBatch, gap: Tensor, mask: Tensor) -> None:
    """Keep the differences between trainer and generator at the same weights: of every token, mean and largest."""
    if not bool(mask.any()):
        return
    report.gaps.append(gap[mask].float().cpu().numpy())
    chosen = torch.where(mask, gap, 0.0)
    report.add("rollout/logprob_gap_mean", Mean(float(chosen.sum()), float(mask.sum())))
    by_row = chosen.max(dim=1).values
    row = int(by_row.argmax())  # NaN counts as the largest
    worst = float(by_row[row])
    if not (worst <= report.gap_max or math.isnan(report.gap_max)):  # the first NaN is taken, and kept
        report.gap_max, report.gap_at = worst, int(batch.order[row])
