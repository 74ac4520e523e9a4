"""The driver: one loop that coordinates rollouts, rewards, updates, weight sync, KL control and checkpoints.

    buffer ──rollouts──▶ annotate ──▶ advantages ──▶ update ──▶ KL controller ──▶ publish ──▶ record, checkpoint
      ▲  generators write, the reward service scores, group by group                 │
      └───────────────────────────── slots are freed ◀───────────────────────────────┘

It sees the roles through `actors/protocols.py` only, so that it runs against the fakes as it does on a cluster.
Everything that it must remember is in `DriverState`; everything that is drawn has a seed of its own (`seeds.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic, time
from typing import Any, Protocol, TypeVar

from actors.messages import StepReport
from actors.protocols import Roles
from cluster.config.run import RunConfig
from cluster.runs.checkpoint import Checkpoint, CheckpointStore, DriverState
from cluster.runs.daemon_threads import run_within
from cluster.runs.recorder import Recorder, rollout_rows
from cluster.training.buffer import RolloutBuffer, Stream
from cluster.training.progress import Progress
from cluster.training.rollouts import Encoder, GroupProducer
from cluster.training.step_metrics import Clock, StepFacts, eval_metrics, step_metrics
from cluster.training.step_schedule import has_reward_variance, rollout_source, update_options
from trainers.algorithms.base import Algorithm
from trainers.kl import AdaptiveKL, FixedKL
from trainers.logprob_gap import ONE_IN
from trainers.seeds import derive_seed
from trainers.types import Prompt, Rollout, TrainSample, to_samples

_T = TypeVar("_T")


class Interrupted(Exception):
    """The run was asked to stop; nothing of its finished steps is lost."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped after step {step}")


class LogprobGapError(RuntimeError):
    """Generator and trainer disagree about the same tokens at the same weights."""


class RestorableStream(Stream, Protocol):
    """A stream whose cursor can be put back."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What the run reads."""

    stream: RestorableStream
    eval_prompts: Sequence[Prompt]
    encoder: Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """Where the run writes."""

    recorder: Recorder
    checkpoints: CheckpointStore
    progress: Progress


class Driver:
    """One run. `run` goes from the state at hand (fresh, or restored) to the last step."""

    def __init__(self, config: RunConfig, roles: Roles, data: Data, sinks: Sinks, *, algorithm: Algorithm) -> None:
        self._config = config
        self._roles = roles
        self._data = data
        self._sinks = sinks
        self._algorithm = algorithm
        self._kl = make_controller(config)
        self._step = 0
        self._version = 0
        self._saved_step = -1
        self._stop = asyncio.Event()
        self._groups = GroupProducer(config, roles, data.encoder)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._step

    def stop(self) -> None:
        """Ask the run to end at the next moment where nothing is lost."""
        self._stop.set()

    async def restore(self, checkpoint: Checkpoint, state: DriverState) -> None:
        """Put everything back as it was after the checkpoint's step."""
        await self._in_learners_turn(self._roles.learners.load(str(checkpoint.path)))
        self._step = self._saved_step = state.step
        self._version = state.policy_version
        self._kl = make_controller(self._config, coef=float(state.kl["coef"]))
        self._data.stream.restore(state.stream)
        self._roles.scorer.restore(state.scorer)

    async def run(self) -> None:
        """Train to the last step. Raises `Interrupted` after `stop`, or the first failure of any role."""
        train = self._config.train
        self._sinks.progress.phase("sync")
        await self._roles.weights.publish(self._version)
        buffer = RolloutBuffer(
            self._data.stream,
            self._produce,
            slots=(train.max_staleness + 1) * train.prompts_per_step,
            prompts_left=(train.steps - self._step) * train.prompts_per_step,
        )
        try:
            if self._step == 0 and self._data.eval_prompts:
                self._note({"step": 0} | await self._unless_stopped(self._evaluate()))
            while self._step < train.steps:
                if self._stop.is_set():  # asked within the last step; the next must not begin
                    raise Interrupted(self._step)
                await self._one_step(buffer)
            await self._save(buffer)
        except Interrupted:
            await self._save(buffer)
            raise
        finally:
            await buffer.close()

    def _produce(self, id: str, prompt: Prompt) -> Awaitable[Rollout]:
        writer = rollout_source(self._config, self._step)
        return self._groups.produce(id, prompt, n=self._config.sampling.n, writer=writer, version=self._version)

    async def _one_step(self, buffer: RolloutBuffer) -> None:
        """One step of the loop, from free slots to a record on the disk."""
        train, progress, clock = self._config.train, self._sinks.progress, Clock()
        began = monotonic()
        progress.phase("generate")
        buffer.fill()
        taking = buffer.take(train.prompts_per_step, keep=has_reward_variance, replace=self._config.replaceable_groups)
        rollouts, replaced = await self._unless_stopped(taking)
        written = self._groups.written_at
        clock.generate, clock.reward = written - began, monotonic() - written
        scored = [*rollouts, *replaced]
        self._groups.refuse_failed(rollouts, step=self._step + 1)
        self._roles.scorer.end_step([rollout.rewards for rollout in scored])

        progress.phase("annotate")
        began_part = monotonic()
        await self._roles.gpu_sharing.acquire_for_training()
        annotated = await self._roles.learners.annotate(to_samples(rollouts), self._needs())
        if (k := self._config.served_top_k) is not None:
            annotated = await self._groups.teacher_top_logprobs(annotated, k)
        clock.annotate = monotonic() - began_part

        progress.phase("train")
        began_part = monotonic()
        samples = self._algorithm.advantages(annotated, kl_coef=self._kl.coef)
        order = update_options(self._config, self._step, kl_coef=self._kl.coef)
        seed = (derive_seed(self._config.seed, "updates", self._step),)
        report = await self._roles.learners.update(samples, order, seed=seed)
        clock.train = monotonic() - began_part
        self._refuse_gap(report)
        coef = self._kl.coef
        if order.steers_kl and (kl := report.metrics.get("kl/mean")) is not None:
            self._kl = self._kl.updated(kl.value, len(samples))

        progress.phase("sync")
        began_part = monotonic()
        await self._roles.gpu_sharing.acquire_for_generation()
        proof = await self._roles.weights.publish(self._version + 1)
        clock.sync = monotonic() - began_part
        buffer.release(train.prompts_per_step)
        clock.step = monotonic() - began

        self._step += 1
        facts = StepFacts(
            step=self._step,
            version=self._version,
            rollouts=scored,
            replaced=len(replaced) if self._config.replaceable_groups else None,
            samples=samples,
            report=report,
            proof=proof,
            kl_coef=coef if self._config.algorithm.kl.coef > 0 else None,
            trained_rewards=self._groups.trains_on_rewards,
            clock=clock,
        )
        self._version += 1
        await self._record(facts, buffer)

    async def _record(self, facts: StepFacts, buffer: RolloutBuffer) -> None:
        config, step = self._config, self._step
        metrics = step_metrics(facts)
        if config.logging.samples_every and step % config.logging.samples_every == 0:
            advantages = {s.sample.id: _advantage(s) for s in facts.samples}
            known = ((s.sample.id, s.annotated.ref_logprobs) for s in facts.samples)
            references = {id: logprobs for id, logprobs in known if logprobs is not None}
            self._sinks.recorder.rollouts(step, rollout_rows(step, facts.rollouts, advantages, references))
        last = step == config.train.steps
        if self._data.eval_prompts and (last or (config.eval.every and step % config.eval.every == 0)):
            metrics |= await self._evaluate()
        self._note(metrics)
        if config.checkpoint.every and step % config.checkpoint.every == 0 and not last:
            await self._save(buffer)

    def _note(self, measured: Mapping[str, float]) -> None:
        metrics = {"step": measured["step"], "time": time(), **measured}
        self._sinks.recorder.step(metrics)
        self._sinks.progress.step(metrics)

    async def _evaluate(self) -> dict[str, float]:
        """Held-out prompts with the current weights; the same seeds each time, so that evaluations compare."""
        self._sinks.progress.phase("evaluate")
        prompts = self._data.eval_prompts[: self._config.eval.max_prompts]
        tasks = [
            asyncio.ensure_future(self._groups.produce(f"eval-{i:06d}", prompt, n=self._config.eval.n))
            for i, prompt in enumerate(prompts)
        ]
        try:
            rollouts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._sinks.recorder.rollouts(self._step, rollout_rows(self._step, rollouts, {}), kind="eval")
        return eval_metrics(rollouts, trained=self._groups.trains_on_rewards)

    async def _unless_stopped(self, work: Awaitable[_T]) -> _T:
        """What `work` gives, unless the run is asked to stop first: then the work is given up, nothing is lost."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted(self._step)
            return task.result()
        finally:
            stop.cancel()
            task.cancel()

    async def _save(self, buffer: RolloutBuffer) -> None:
        if self._saved_step == self._step or self._step == 0:
            return
        self._sinks.progress.phase("checkpoint")
        store, save_s = self._sinks.checkpoints, self._config.timeouts.save_s
        late = f"the checkpoint of step {self._step} was not written"
        directory = await run_within(partial(store.begin, self._step), save_s=save_s, late=late)
        await self._in_learners_turn(self._roles.learners.save(str(directory)))
        if self._roles.gpu_sharing.shared:
            await self._roles.weights.publish(self._version)
        state = DriverState(
            step=self._step,
            policy_version=self._version,
            kl={"coef": self._kl.coef},
            stream=buffer.cursor(),
            scorer=self._roles.scorer.state(),
        )
        await run_within(partial(store.commit, self._step, state), save_s=save_s, late=late)
        self._saved_step = self._step

    async def _in_learners_turn(self, work: Awaitable[None]) -> None:
        """Work of the learners outside of a step's updates; on shared GPUs the generators sleep meanwhile."""
        if not self._roles.gpu_sharing.shared:
            await work
            return
        await self._roles.gpu_sharing.acquire_for_training()
        await work
        await self._roles.gpu_sharing.acquire_for_generation()

    def _needs(self) -> frozenset[Any]:
        """What must be computed before the update; old log-probabilities only where it is not exactly on-policy."""
        train = self._config.train
        on_policy = train.updates_per_step == 1 and train.epochs_per_step == 1 and train.max_staleness == 0
        return self._algorithm.needs if on_policy else self._algorithm.needs | {"old_logprobs"}

    def _refuse_gap(self, report: StepReport) -> None:
        allowed = self._config.sync.allowed_gap(self._config.policy.dtype)
        mean = report.metrics.get("rollout/logprob_gap_mean")
        if mean is None or allowed.allow(mean=mean.value, quantile=report.gap_quantile):
            return
        raise LogprobGapError(
            f"step {self._step + 1}: generator and trainer differ in a token's log-probability at the same weights by "
            f"{mean.value:.3g} on average (allowed: {allowed.mean:.3g}, sync.max_mean_logprob_gap) and by "
            f"{report.gap_quantile:.3g} or more in one token of {ONE_IN} (allowed: {allowed.quantile:.3g}, "
            f"sync.max_logprob_gap), at most by {report.gap_max:.3g}, in sample {report.gap_sample}; what was "
            "generated is not what would be trained on"
        )


def make_controller(config: RunConfig, *, coef: float | None = None) -> FixedKL | AdaptiveKL:
    """The KL controller of the config, at its first or at a restored coefficient."""
    kl = config.algorithm.kl
    start = kl.coef if coef is None else coef
    if kl.controller == "adaptive":
        assert kl.target is not None, "the config refuses this"
        return AdaptiveKL(start, kl.target, kl.horizon)
    return FixedKL(start)


def _advantage(sample: TrainSample) -> float:
    """The mean over the tokens that the policy chose (GRPO's is the same for all)."""
    chosen = sample.advantages[sample.sample.mask]
    return float(chosen.mean()) if len(chosen) else 0.0
