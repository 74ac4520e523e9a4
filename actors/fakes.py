"""Fakes of every protocol in `protocols.py`, shipped with the interface: a small world in memory, always the same.

The policy is one number. With weight w the logits of the three tokens "a", "b" and end are 0, w and −1, whatever
precedes them. Generators draw from it with the seeds that they are given, learners train it with the run's own
algorithm and packing, a weight sync copies it. No clock is looked at. `World.events` is what happened, in order, and
`World.interfere` is awaited at every event: there a test fails, delays or hangs a role, or stops the run.

It knows `trainers`, the protocols and torch; no engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from actors.messages import GroupScores, Proof, ScoreFailure, ScoreRequest, StepReport, UpdateOptions, UpdateReport
from actors.protocols import Roles
from trainers.algorithms.base import ActorCritic, Algorithm, Mean, Need, PolicyTokens, Totals, ValueTokens
from trainers.config import SamplingConfig, TrainConfig
from trainers.logprob_gap import gap_quantile
from trainers.packing import MicroBatch, OptimizerStep, pack_updates
from trainers.rewards import RunningNormalizer
from trainers.schedule import learning_rate_factor
from trainers.types import AnnotatedSample, Completion, Float32Array, Sample, TokenPrompt, TrainSample

END: Final = 2  # the token that ends a completion
_TEXT: Final = ("a", "b", "")
_MOMENTUM: Final = 0.5  # so that the optimizer has a state that a checkpoint can lose
_STATE: Final = "learner.json"


class Event(NamedTuple):
    """Something that a role was asked to do, as it begins (`written`, `scored`: as it ends)."""

    kind: str  # generate, written, score, scored, turn, annotate, update, publish, save, load, export
    what: str | int  # a prompt's id or line, whose turn, needs, optimizer steps before, a version, a directory's name


async def _nothing(event: Event) -> None:
    del event


@dataclass
class World:
    """What the fakes share: the policy at both of its places, and what happened."""

    weight: float = 0.0  # as the learners have it
    held: float | None = None  # as the generators have it; None before the first sync
    version: int = -1  # of `held`
    interfere: Callable[[Event], Awaitable[None]] = _nothing
    events: list[Event] = field(default_factory=list)

    async def note(self, kind: str, what: str | int) -> None:
        """Something happens."""
        event = Event(kind, what)
        self.events.append(event)
        await self.interfere(event)


def distribution(weight: Tensor | float, *, temperature: float) -> Tensor:
    """The log-probabilities of the three tokens, float64 `[3]`.

    >>> [round(p, 3) for p in distribution(0.0, temperature=1.0).exp().tolist()]
    [0.422, 0.422, 0.155]
    """
    w = torch.as_tensor(weight, dtype=torch.float64)
    return torch.stack([torch.zeros_like(w), w, -torch.ones_like(w)]).div(temperature).log_softmax(dim=0)


def _exact(seed: int, tokens: int) -> float:
    del seed, tokens
    return 0.0


class FakeGenerators:
    """Implements `protocols.Generators`. Raises RuntimeError before the first sync."""

    def __init__(self, world: World) -> None:
        self._world = world
        # added to what is reported, given the seed and the count of tokens: rounding, or weights other than the world's
        self.logprob_error: Callable[[int, int], Float32Array | float] = _exact

    async def generate(
        self, prompt: TokenPrompt, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> tuple[Completion, ...]:
        """See `protocols.Generators`."""
        await self._world.note("generate", prompt.id)
        if self._world.held is None:
            raise RuntimeError("asked to write before any weights were published")
        logprobs = distribution(self._world.held, temperature=sampling.temperature).numpy()
        completions = tuple(self._draw(logprobs, sampling.max_tokens, seed) for seed in seeds)
        await self._world.note("written", prompt.id)
        return completions

    def _draw(self, logprobs: np.ndarray[Any, Any], max_tokens: int, seed: int) -> Completion:
        uniform = np.random.default_rng(seed).random(max_tokens)
        tokens = np.searchsorted(np.exp(logprobs).cumsum()[:-1], uniform).astype(np.int32)
        ends = np.flatnonzero(tokens == END)
        tokens = tokens[: ends[0] + 1] if len(ends) else tokens
        return Completion(
            tokens=tokens,
            logprobs=(logprobs[tokens] + self.logprob_error(seed, len(tokens))).astype(np.float32),
            text="".join(_TEXT[t] for t in tokens),
            finish_reason="stop" if len(ends) else "length",
            policy_version=self._world.version,
        )


class FakeLearners:
    """Implements `protocols.Learners`: one rank, gradient descent with momentum on the one weight.

    An algorithm that needs values gets a critic of one number, the value of every state, that learns by plain descent.
    """

    def __init__(self, world: World, algorithm: Algorithm, *, train: TrainConfig, sampling: SamplingConfig) -> None:
        self._world = world
        self._algorithm = algorithm
        self._train = train
        self._sampling = sampling
        self._reference = world.weight
        self._velocity = 0.0
        self.value = 0.0
        self._optimizer_steps = 0
        self.seeds: list[tuple[int, ...]] = []  # of each update

    async def annotate(self, samples: Sequence[Sample], needs: frozenset[Need]) -> list[AnnotatedSample]:
        """See `protocols.Learners`."""
        await self._world.note("annotate", ",".join(sorted(needs)))
        return [
            AnnotatedSample(
                sample=s,
                old_logprobs=self._logprobs(s, self._world.weight) if "old_logprobs" in needs else None,
                ref_logprobs=self._logprobs(s, self._reference) if "ref_logprobs" in needs else None,
                values=np.where(s.mask, np.float32(self.value), np.float32(0)) if "values" in needs else None,
            )
            for s in samples
        ]

    async def update(self, samples: Sequence[TrainSample], order: UpdateOptions, *, seed: Sequence[int]) -> StepReport:
        """See `protocols.Learners`."""
        await self._world.note("update", self._optimizer_steps)
        self.seeds.append(tuple(seed))
        train, report = self._train, UpdateReport()
        (steps,) = pack_updates(
            samples,
            updates=train.updates_per_step,
            epochs=train.epochs_per_step,
            shards=1,
            max_tokens=train.max_tokens_per_microbatch,
            seed=seed,
        )
        for number, step in enumerate(steps):
            self._optimizer_step(step, order.kl_coef, report, at_rollout_weights=number == 0)
        return StepReport(
            metrics=report.metrics,
            loss=sum(report.losses) / len(steps),
            grad_norm=sum(report.grad_norms) / len(steps),
            learning_rate=report.learning_rate,
            gap_max=report.gap_max,
            gap_sample=samples[report.gap_at].sample.id if report.gap_at >= 0 else "",
            gap_quantile=gap_quantile(report.gaps),
        )

    async def save(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self._world.note("save", Path(directory).name)
        state = {
            "weight": self._world.weight,
            "velocity": self._velocity,
            "value": self.value,
            "optimizer_steps": self._optimizer_steps,
        }
        _write(directory, _STATE, state)

    async def load(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self._world.note("load", Path(directory).name)
        state = _read(directory, _STATE)
        self._world.weight, self._velocity = state["weight"], state["velocity"]
        self.value = state.get("value", 0.0)  # not in checkpoints from before there was a critic
        self._optimizer_steps = state["optimizer_steps"]

    async def export(self, directory: str) -> None:
        """Write the weight as JSON."""
        await self._world.note("export", Path(directory).name)
        _write(directory, "model.json", {"weight": self._world.weight})

    def _logprobs(self, sample: Sample, weight: float) -> Float32Array:
        logprobs = distribution(weight, temperature=self._sampling.temperature).numpy()
        found: Float32Array = np.where(sample.mask, logprobs[np.where(sample.mask, sample.tokens, 0)], 0).astype("f4")
        return found

    def _optimizer_step(
        self, step: OptimizerStep, kl_coef: float, report: UpdateReport, *, at_rollout_weights: bool
    ) -> None:
        weight = torch.tensor(self._world.weight, dtype=torch.float64, requires_grad=True)
        value = torch.tensor(self.value, dtype=torch.float64, requires_grad=True)
        totals = Totals(tokens=step.total_tokens, sequences=step.total_sequences, max_tokens=self._sampling.max_tokens)
        loss = 0.0
        for batch in step.micro_batches:
            view = self._view(batch, weight)
            output = self._algorithm.loss(view, totals=totals, kl_coef=kl_coef)
            output.loss.backward()
            loss += float(output.loss.detach())
            for name, mean in output.metrics.items():
                report.add(name, mean)
            if "values" in self._algorithm.needs:
                judged = cast("ActorCritic", self._algorithm).value_loss(_value_view(batch, value), totals=totals)
                judged.loss.backward()
                report.add_all(judged.metrics)
            if at_rollout_weights:
                _note_gap(report, view, batch)
        assert weight.grad is not None
        self._velocity = _MOMENTUM * self._velocity + float(weight.grad)
        report.learning_rate = self._learning_rate()
        report.losses.append(loss)
        report.grad_norms.append(abs(float(weight.grad)))
        self._world.weight -= report.learning_rate * self._velocity
        if value.grad is not None:
            self.value -= report.learning_rate * float(value.grad)
        self._optimizer_steps += 1

    def _view(self, batch: MicroBatch, weight: Tensor) -> PolicyTokens:
        mask, tokens = torch.from_numpy(batch.mask), torch.from_numpy(batch.tokens).long()
        probable = distribution(weight, temperature=self._sampling.temperature)
        logprobs = torch.where(mask, probable[torch.where(mask, tokens, 0)], 0.0).float()
        entropy = -(probable.exp() * probable).sum().detach()
        assert batch.advantages is not None
        return PolicyTokens(
            logprobs=logprobs,
            entropy=entropy.float().expand_as(logprobs),
            mask=mask,
            sequence_ids=torch.arange(len(tokens))[:, None].expand_as(tokens),
            rollout_logprobs=torch.from_numpy(batch.rollout_logprobs),
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else torch.from_numpy(batch.old_logprobs),
            ref_logprobs=None if batch.ref_logprobs is None else torch.from_numpy(batch.ref_logprobs),
            advantages=torch.from_numpy(batch.advantages),
        )

    def _learning_rate(self) -> float:
        train = self._train
        return train.learning_rate * learning_rate_factor(
            self._optimizer_steps,
            schedule=train.lr_schedule,
            warmup_steps=train.warmup_steps,
            total_steps=train.steps * train.updates_per_step * train.epochs_per_step,
        )


def _write(directory: str, name: str, state: dict[str, Any]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, name).write_text(json.dumps(state))


def _read(directory: str, name: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(Path(directory, name).read_text())
    return state


def _value_view(batch: MicroBatch, value: Tensor) -> ValueTokens:
    mask = torch.from_numpy(batch.mask)
    assert batch.old_values is not None
    assert batch.returns is not None
    return ValueTokens(
        values=torch.where(mask, value, 0.0).float(),
        old_values=torch.from_numpy(batch.old_values),
        returns=torch.from_numpy(batch.returns),
        mask=mask,
        sequence_ids=torch.arange(len(mask))[:, None].expand_as(mask),
    )


def _note_gap(report: UpdateReport, view: PolicyTokens, batch: MicroBatch) -> None:
    gap = torch.where(view.mask, (view.logprobs.detach() - view.rollout_logprobs).abs(), 0.0)
    report.add("rollout/logprob_gap_mean", Mean(float(gap.sum()), float(view.mask.sum())))
    report.gaps.append(gap[view.mask].float().numpy())
    for row, worst in enumerate(gap.amax(dim=1).tolist()):
        if not (worst <= report.gap_max or math.isnan(report.gap_max)):  # so that a NaN is taken, and kept
            report.gap_max, report.gap_at = worst, int(batch.order[row])


class FakeWeightSync:
    """Implements `protocols.WeightSync`: a copy of one number, stamped with its version."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def publish(self, version: int) -> Proof:
        """See `protocols.WeightSync`."""
        await self._world.note("publish", version)
        self._world.held, self._world.version = self._world.weight, version
        return Proof(version=version, bytes=8, canary_gap=0.0)


def _scored(request: ScoreRequest, index: int) -> str | None:
    del request, index
    return None


class FakeScorer:
    """Implements `protocols.Scorer`: the share of "b" in a completion.

    `cause_of(request, index)` names why a completion cannot be scored, None where it can. With `normalize` the score
    that is trained on is normalized by those of the steps before, as the reward service does it.
    """

    def __init__(self, world: World, *, normalize: bool = False) -> None:
        self._world = world
        self._normalize = normalize
        self._statistics = RunningNormalizer()
        self.cause_of: Callable[[ScoreRequest, int], str | None] = _scored

    async def score(self, request: ScoreRequest) -> GroupScores:
        """See `protocols.Scorer`."""
        await self._world.note("score", request.prompt.line)
        causes = [self.cause_of(request, i) for i in range(len(request.completions))]
        shares = tuple(
            text.count("b") / max(len(text), 1) if cause is None else None
            for text, cause in zip(request.texts, causes, strict=True)
        )
        await self._world.note("scored", request.prompt.line)
        return GroupScores(
            rewards={"share": shares},
            reward=tuple(self._trained(share) for share in shares),
            failures=tuple(ScoreFailure("share", cause) for cause in causes if cause is not None),
        )

    def end_step(self, rewards: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """See `protocols.Scorer`."""
        self._statistics = self._statistics.updated(score for group in rewards for score in group["share"])

    def state(self) -> dict[str, Any]:
        """See `protocols.Scorer`."""
        return {"statistics": self._statistics.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `protocols.Scorer`."""
        self._statistics = RunningNormalizer.from_state(state["statistics"])

    def _trained(self, share: float | None) -> float | None:
        return self._statistics.normalized(share) if share is not None and self._normalize else share


class FakeGpuSharing:
    """Implements `protocols.GpuSharing`: only records whose turn it is."""

    shared = False

    def __init__(self, world: World) -> None:
        self._world = world

    async def acquire_for_training(self) -> None:
        """See `protocols.GpuSharing`."""
        await self._world.note("turn", "learners")

    async def acquire_for_generation(self) -> None:
        """See `protocols.GpuSharing`."""
        await self._world.note("turn", "generators")


def fake_roles(world: World, algorithm: Algorithm, *, train: TrainConfig, sampling: SamplingConfig) -> Roles:
    """All roles of a run in one world."""
    return Roles(
        generators=FakeGenerators(world),
        learners=FakeLearners(world, algorithm, train=train, sampling=sampling),
        weights=FakeWeightSync(world),
        scorer=FakeScorer(world),
        gpu_sharing=FakeGpuSharing(world),
    )
