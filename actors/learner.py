"""The learner: one ZeRO rank that annotates samples, updates the policy and hands its weights out.

A plain class, testable in-process; `group.py` makes a Ray actor of it. It knows the algorithm only through its
protocol and DeepSpeed only through `deepspeed_engine.py`. What differs between train types is in `trainee.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from actors.critic import forward_values, load_critic
from actors.distillation import Teacher
from actors.messages import AnnotatedRows, LearnerSpec, UpdateOrder, UpdateReport
from actors.policy import chosen_logprobs, forward, load_model, load_policy, load_tokenizer
from actors.weights import GeneratorClient, ObjectStoreSender, Route, SentWeights, WeightSender
from trainers.algorithms.base import ActorCritic, LossOutput, Mean, Need, PolicyTokens, Totals, ValueTokens
from trainers.algorithms.catalog import make_algorithm
from trainers.algorithms.config import GKDConfig, PPOConfig
from trainers.packing import MicroBatch, OptimizerStep
from trainers.types import Float32Array

if TYPE_CHECKING:
    from actors.deepspeed_engine import TrainingEngine
    from actors.trainee import Trainee


_CRITIC = "critic"  # folder of its part of a checkpoint


class Learner:
    """One rank. `start` comes first, then `connect`; every method is called on all ranks at once."""

    def __init__(self, spec: LearnerSpec, *, rank: int, world_size: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._algorithm = make_algorithm(spec.algorithm, spec.train)
        self._policy: Trainee
        self._reference: Callable[..., Any] | None = None
        self._critic: TrainingEngine | None = None
        self._teacher: Teacher | None = None
        self._sender: WeightSender

    def start(self, init_method: str) -> None:
        """Join the other ranks at `init_method` (tcp://host:port) and load the models."""
        from actors.deepspeed_engine import shard_while_loading  # here: takes seconds
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
        sharding = None
        if spec.policy.train_type == "full":
            sharding = shard_while_loading(spec.learners, dtype=spec.policy.dtype)
        self._load_models()
        del sharding  # had to live until the last model was loaded
        self._load_critic()
        self._warm_up()

    def _load_models(self) -> None:
        from actors.deepspeed_engine import FrozenEngine
        from actors.trainee import make_trainee

        spec, needs = self._spec, self._algorithm.needs
        model = load_policy(
            spec.policy,
            total_steps=spec.total_optimizer_steps,
            gradient_checkpointing=spec.learners.gradient_checkpointing,
        )
        self._policy = make_trainee(model, spec)
        if "ref_logprobs" in needs and spec.policy.train_type == "full":
            self._reference = FrozenEngine(load_model(spec.policy), learner=spec.learners, dtype=spec.policy.dtype)
        if "divergence" in needs:
            config = cast("GKDConfig", spec.algorithm)
            model = load_model(spec.policy.model_copy(update={"model": config.teacher.model}))
            self._teacher = Teacher(FrozenEngine(model, learner=spec.learners, dtype=spec.policy.dtype), config)

    def _load_critic(self) -> None:
        if "values" not in self._algorithm.needs:
            return
        from actors.deepspeed_engine import TrainingEngine

        spec = self._spec
        critic = cast("PPOConfig", spec.algorithm).critic
        self._critic = TrainingEngine(
            load_critic(critic.model or spec.policy.model, dtype=spec.policy.dtype),
            learner=spec.learners,
            train=spec.train.model_copy(update={"learning_rate": critic.learning_rate}),
            dtype=spec.policy.dtype,
            total_steps=spec.critic_optimizer_steps,
        )

    def connect(self, generators: Sequence[ActorHandle], route: Route) -> None:
        """Open the way over which `publish` sends."""
        client = GeneratorClient(generators, deadline_s=route.deadline_s)
        source = self._policy.served()
        if route.transport == "ray":
            self._sender = ObjectStoreSender(source, client, rank=self._rank)
            return
        from actors.vllm_weights import VllmSender  # importing vLLM takes ten seconds that "ray" can do without

        self._sender = VllmSender(route, source, client, rank=self._rank)

    @torch.no_grad()
    def annotate(self, batches: Sequence[MicroBatch], needs: frozenset[Need]) -> list[AnnotatedRows]:
        """Log-probabilities of the policy as it is and of the reference, and the critic's values."""
        rows = []
        for batch in batches:
            old = self._logprobs(self._policy.engine, batch) if "old_logprobs" in needs else None
            ref = None
            if "ref_logprobs" in needs:
                with self._policy.as_reference():
                    ref = self._logprobs(self._reference or self._policy.engine, batch)
            rows.append(
                AnnotatedRows(
                    old_logprobs=old, ref_logprobs=ref, values=self._values(batch) if "values" in needs else None
                )
            )
        return rows

    def update(self, steps: Sequence[OptimizerStep], order: UpdateOrder) -> UpdateReport:
        """Run the optimizer steps of one step of the loop."""
        report = UpdateReport()
        for index, step in enumerate(steps):
            totals = Totals(
                tokens=step.total_tokens,
                sequences=step.total_sequences,
                max_tokens=self._spec.max_completion_tokens,
            )
            report.learning_rate = self._policy.engine.learning_rate
            loss = 0.0
            for batch in step.micro_batches:
                with torch.set_grad_enabled(order.train_policy):
                    output = self._policy_loss(batch, totals, order, report if index == 0 else None)
                loss += float(output.loss.detach())
                report.add_all(output.metrics)
                if order.train_policy:
                    self._policy.engine.backward(output.loss)
                if self._critic is not None:
                    self._learn_values(self._critic, batch, totals, report)
            if order.train_policy:
                loss += self._policy.step(report)
            report.losses.append(loss)
            if self._critic is not None:
                self._critic.step()
        return report

    def publish(self) -> SentWeights:
        """Send the weights to the generators; digests and bytes on the rank that sends."""
        return self._sender.send()

    def save(self, directory: str) -> None:
        """Write this rank's part of a checkpoint: weights, optimizer, random state."""
        path = Path(directory)
        self._policy.save(path)
        if self._critic is not None:
            self._critic.save(path / _CRITIC)
        state = {"torch": torch.get_rng_state(), "rank": torch.tensor(self._rank)}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        torch.save(state, path / f"rng-{self._rank:05d}.pt")

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""
        path = Path(directory)
        self._policy.load(path)
        if self._critic is not None:
            self._critic.load(path / _CRITIC)
        state = torch.load(path / f"rng-{self._rank:05d}.pt", weights_only=True)
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def export(self, directory: str) -> None:
        """Write what was trained in Hugging Face format, from rank 0."""
        weights = {}
        for name, tensor in self._policy.engine.weights():
            if self._rank == 0:
                weights[name] = tensor.cpu()
        if self._rank == 0:
            self._policy.write(Path(directory), weights)
            load_tokenizer(self._spec.policy).save_pretrained(directory)

    def write_base(self, directory: str) -> None:
        """Write the quantised base as the generators serve it, from rank 0."""
        from actors.quantised import write_dequantised

        if self._rank == 0:
            write_dequantised(self._policy.engine.module, load_model(self._spec.policy), Path(directory))
            load_tokenizer(self._spec.policy).save_pretrained(directory)

    def offload(self) -> None:
        """Leave the GPU to a colocated generator."""
        for engine in self._engines():
            engine.offload()

    def reload(self) -> None:
        """Take the GPU back."""
        for engine in self._engines():
            engine.reload()

    def _engines(self) -> list[TrainingEngine]:
        return [self._policy.engine] if self._critic is None else [self._policy.engine, self._critic]

    @torch.no_grad()
    def _warm_up(self) -> None:
        """One forward pass: before it, ZeRO-3 may gather storage that was never filled."""
        token = torch.zeros(1, 2, dtype=torch.long, device=self._policy.engine.device)
        for engine in self._engines():
            engine(input_ids=token)

    def _sequences(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._on_device(batch.tokens).long(), self._on_device(batch.lengths)

    def _logprobs(self, model: Callable[..., Any], batch: MicroBatch) -> Float32Array:
        tokens, lengths = self._sequences(batch)
        logits = forward(model, tokens, lengths)
        logprobs, _ = chosen_logprobs(logits, tokens, lengths, temperature=self._spec.temperature)
        return logprobs.cpu().numpy()

    def _values(self, batch: MicroBatch) -> Float32Array:
        assert self._critic is not None, "this run has no critic"
        return forward_values(self._critic, *self._sequences(batch)).cpu().numpy()

    def _policy_loss(
        self, batch: MicroBatch, totals: Totals, order: UpdateOrder, report: UpdateReport | None
    ) -> LossOutput:
        """The micro-batch's share of the loss; `report` is given while the weights are still the rollouts'."""
        tokens, lengths = self._sequences(batch)
        logits = forward(self._policy.engine, tokens, lengths)
        logprobs, entropy = chosen_logprobs(logits, tokens, lengths, temperature=self._spec.temperature)
        mask = self._on_device(batch.mask)
        assert batch.advantages is not None
        rollout = self._on_device(batch.rollout_logprobs)
        if report is not None and order.from_policy:
            _note_gap(report, batch, (logprobs.detach() - rollout).abs(), mask)
        view = PolicyTokens(
            logprobs=logprobs,
            entropy=entropy,
            mask=mask,
            sequence_ids=_rows(mask),
            rollout_logprobs=rollout,
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else self._on_device(batch.old_logprobs),
            ref_logprobs=None if batch.ref_logprobs is None else self._on_device(batch.ref_logprobs),
            advantages=self._on_device(batch.advantages),
            divergence=None if self._teacher is None else self._teacher.divergence(logits, tokens, lengths, mask),
        )
        return self._algorithm.loss(view, totals=totals, kl_coef=order.kl_coef)

    def _learn_values(self, critic: TrainingEngine, batch: MicroBatch, totals: Totals, report: UpdateReport) -> None:
        assert batch.old_values is not None
        assert batch.returns is not None
        mask = self._on_device(batch.mask)
        view = ValueTokens(
            values=forward_values(critic, *self._sequences(batch)),
            old_values=self._on_device(batch.old_values),
            returns=self._on_device(batch.returns),
            mask=mask,
            sequence_ids=_rows(mask),
        )
        output = cast("ActorCritic", self._algorithm).value_loss(view, totals=totals)
        critic.backward(output.loss)
        report.add_all(output.metrics)

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self._policy.engine.device)  # Ray's arrays are read-only


def _rows(mask: Tensor) -> Tensor:
    """The row's number at each of its tokens."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask).contiguous()


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
