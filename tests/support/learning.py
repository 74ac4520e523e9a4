"""What the learner's tests share: samples, cuts of the same work, and GRPO's loss in plain float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.config import LearnerConfig, PolicyConfig
from actors.learner.actor import Learner
from actors.learner.group import LearnerGroup
from actors.messages import LearnerSpec, StepReport, UpdateOptions
from tests.support import tiny
from tests.support.forked_ranks import ForkServer
from trainers.algorithms.config import GRPOConfig, KLConfig
from trainers.config import TrainConfig
from trainers.types import AnnotatedSample, Sample, TrainSample

TEMPERATURE, KL_COEF, CLIP, MAX_GRAD_NORM, WEIGHT_DECAY = 0.7, 0.1, 0.2, 0.5, 0.1
LEARNING_RATE, FACTORS = 2e-4, (0.5, 1.0)  # linear with two warm-up steps


@dataclass(frozen=True)
class Cut:
    """How the same work is divided."""

    stage: int
    workers: int
    budget: int  # tokens of a micro-batch
    order: int  # seed of the samples' order, 0 = as they are
    on_ray: bool = False  # on actors, not on forks of one process

    def __str__(self) -> str:
        return f"zero{self.stage}-x{self.workers}{'-ray' if self.on_ray else ''}"


def make_samples(model: Any, *, seed: int) -> list[TrainSample]:
    """Seven samples of 4 to 16 tokens; old, reference and rollout log-probabilities are around the initial ones."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate((16, 4, 9, 12, 5, 14, 7)):
        tokens = rng.integers(3, 250, length).astype(np.int32)
        mask = np.arange(length) >= rng.integers(1, length - 1)
        mask[-2] = length < 10  # a token in the middle that the policy did not choose
        with torch.no_grad():
            now = tiny.plain_logprobs(model, tokens, temperature=TEMPERATURE).numpy()
        old, ref, rollout = (np.where(mask, now + rng.normal(0, 0.3, length), 0).astype(np.float32) for _ in range(3))
        sample = Sample(
            id=f"p{i // 2}/{i % 2}",
            group=i // 2,
            tokens=tokens,
            mask=mask,
            rollout_logprobs=rollout,
            reward=1.0,
            valid=True,
            policy_version=0,
        )
        samples.append(
            TrainSample(
                annotated=AnnotatedSample(sample=sample, old_logprobs=old, ref_logprobs=ref),
                advantages=np.where(mask, np.float32(rng.normal()), np.float32(0)),
            )
        )
    return samples


def on_policy(samples: list[TrainSample]) -> list[TrainSample]:
    return [replace(s, annotated=replace(s.annotated, old_logprobs=None)) for s in samples]


def grpo_terms(model: Any, samples: list[TrainSample]) -> torch.Tensor:
    """Clipped surrogate and k3 of every token of the policy, one after the other; their mean is the loss. float64."""
    terms = []
    for train in samples:
        mask = torch.from_numpy(train.sample.mask)
        logprobs = tiny.plain_logprobs(model, train.sample.tokens, temperature=TEMPERATURE)[mask]
        old, ref, advantage = (
            logprobs.detach() if values is None else torch.from_numpy(values).double()[mask]
            for values in (train.annotated.old_logprobs, train.annotated.ref_logprobs, train.advantages)
        )
        ratio = (logprobs - old).exp()
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        k3 = (ref - logprobs).exp() - (ref - logprobs) - 1
        terms.append(surrogate + KL_COEF * k3)
    return torch.cat(terms)


@torch.no_grad()
def sequence_logprobs(model: Any, samples: list[TrainSample]) -> list[torch.Tensor]:
    return [tiny.plain_logprobs(model, s.sample.tokens, temperature=TEMPERATURE) for s in samples]


def shuffled(samples: list[TrainSample], cut: Cut) -> list[TrainSample]:
    order = np.random.default_rng(cut.order).permutation(len(samples)) if cut.order else range(len(samples))
    return [samples[i] for i in order]


def learner_spec(model: Path, algorithm: Any, cut: Cut, *, rate: float = LEARNING_RATE, **policy: Any) -> LearnerSpec:
    """Learners for a cut, with clipping, weight decay and a schedule; `policy` are further keys of its config."""
    return tiny.learner_spec(
        model,
        policy=PolicyConfig(**({"model": str(model), "dtype": "float32"} | policy)),
        learners=LearnerConfig(workers=cut.workers, zero_stage=cut.stage, gradient_checkpointing=cut.stage == 3),
        algorithm=algorithm,
        train=TrainConfig(
            learning_rate=rate,
            lr_schedule="linear",
            warmup_steps=2,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            max_tokens_per_microbatch=cut.budget,
        ),
        temperature=TEMPERATURE,
    )


@dataclass(frozen=True)
class Ranks:
    """Where the learners under test run."""

    forks: ForkServer
    start_ray: Callable[[], object]  # at once where it runs

    def learners(
        self, spec: LearnerSpec, cut: Cut, logs: Path, *, cls: type[Learner] = Learner
    ) -> AbstractContextManager[LearnerGroup]:
        """The learners of a cut, started."""
        if cut.on_ray:
            self.start_ray()
        return tiny.learner_group(spec, logs, forks=None if cut.on_ray else self.forks, cls=cls)


@dataclass(frozen=True)
class Trained:
    """What the learners under test did: a step on the first samples, a checkpoint, a step on the second ones."""

    samples: tuple[list[TrainSample], list[TrainSample]]
    reports: list[StepReport]
    before: list[AnnotatedSample]  # of the first samples
    after: list[AnnotatedSample]
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def exported(self) -> Path:
        return self.out / "model"


def step(group: LearnerGroup, samples: list[TrainSample], cut: Cut, *, seed: int = 0) -> StepReport:
    return tiny.run(group.update(shuffled(samples, cut), UpdateOptions(kl_coef=KL_COEF), seed=(seed,)))


def annotated(group: LearnerGroup, samples: list[TrainSample]) -> list[AnnotatedSample]:
    needs = frozenset({"old_logprobs", "ref_logprobs"})
    return tiny.run(group.annotate([s.sample for s in samples], needs))  # type: ignore[arg-type]


def two_steps(
    group: LearnerGroup, samples: tuple[list[TrainSample], list[TrainSample]], cut: Cut, out: Path
) -> Trained:
    before = annotated(group, samples[0])
    made = Trained(samples, [step(group, samples[0], cut)], before, [], out)
    tiny.run(group.save(str(made.checkpoint)))
    made.reports.append(step(group, samples[1], cut))
    made.after.extend(annotated(group, samples[0]))
    tiny.run(group.export(str(made.exported)))
    return made


def grpo() -> GRPOConfig:
    """The algorithm whose loss `grpo_terms` is."""
    return GRPOConfig(type="grpo", kl=KLConfig(coef=KL_COEF), clip_low=CLIP, clip_high=CLIP)
