"""The learner on real DeepSpeed ranks against a plain float64 loop: the same numbers however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from actors.config import LearnerConfig, PolicyConfig
from actors.groups import LearnerGroup
from actors.messages import LearnerSpec, StepReport
from trainers.algorithms.config import GRPOConfig, KLConfig
from trainers.config import TrainConfig
from trainers.types import AnnotatedSample, Float32Array, Sample, TrainSample

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

TEMPERATURE, KL_COEF, CLIP, MAX_GRAD_NORM, WEIGHT_DECAY = 0.7, 0.1, 0.2, 0.5, 0.1
LEARNING_RATE, FACTORS = 1e-3, (0.5, 1.0)  # linear with two warm-up steps
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@dataclass(frozen=True)
class Cut:
    """How the same work is divided."""

    stage: int
    workers: int
    budget: int  # tokens of a micro-batch
    order: int  # seed of the samples' order, 0 = as they are

    def __str__(self) -> str:
        return f"zero{self.stage}-x{self.workers}"


CUTS = [Cut(0, 1, 1000, 0), Cut(1, 2, 24, 1), Cut(2, 2, 60, 2), Cut(3, 1, 16, 3), Cut(3, 2, 40, 4)]


def make_samples(model: Any, *, seed: int) -> list[TrainSample]:
    """Seven samples of 4 to 16 tokens; old, reference and rollout log-probabilities lie around the initial ones."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate((16, 4, 9, 12, 5, 14, 7)):
        tokens = rng.integers(3, 250, length).astype(np.int32)
        mask = np.arange(length) >= rng.integers(1, length - 1)
        mask[-2] = length < 10  # a token in the middle that the policy did not choose
        with torch.no_grad():
            now = tiny.plain_logprobs(model, tokens, temperature=TEMPERATURE).numpy()
        old, ref, rollout = (
            np.where(mask, now + rng.normal(0, 0.3, length), 0).astype(np.float32) for _ in range(3)
        )
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


def grpo_loss(model: Any, samples: list[TrainSample]) -> torch.Tensor:
    """Clipped surrogate and k3, summed over all tokens of the policy and divided by their number; float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
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
        total = total + (surrogate + KL_COEF * k3).sum()
        count += int(mask.sum())
    return total / count


@dataclass(frozen=True)
class Truth:
    """What the plain loop computes."""

    samples: tuple[list[TrainSample], list[TrainSample]]
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]  # after both steps
    before: list[torch.Tensor]  # log-probabilities of the first samples by the initial weights
    after: list[torch.Tensor]  # and by the final ones


def plain_training(path: Path, *, dtype: torch.dtype = torch.float64) -> Truth:
    model = tiny.load_plain(path, dtype=dtype)
    samples = make_samples(model, seed=1), on_policy(make_samples(model, seed=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    truth = Truth(samples, [], [], {}, sequence_logprobs(model, samples[0]), [])
    for batch, factor in zip(samples, FACTORS, strict=True):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        loss = grpo_loss(model, batch)
        loss.backward()
        truth.losses.append(float(loss.detach()))
        truth.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
    truth.weights.update(model.state_dict())
    truth.after.extend(sequence_logprobs(model, samples[0]))
    return truth


@torch.no_grad()
def sequence_logprobs(model: Any, samples: list[TrainSample]) -> list[torch.Tensor]:
    return [tiny.plain_logprobs(model, s.sample.tokens, temperature=TEMPERATURE) for s in samples]


def spec(model: Path, cut: Cut, *, dtype: str = "float32") -> LearnerSpec:
    return tiny.learner_spec(
        model,
        policy=PolicyConfig(model=str(model), dtype=dtype, chat_template=CHAT_TEMPLATE),
        learners=LearnerConfig(workers=cut.workers, zero_stage=cut.stage),
        algorithm=GRPOConfig(type="grpo", kl=KLConfig(coef=KL_COEF), clip_low=CLIP, clip_high=CLIP),
        train=TrainConfig(
            learning_rate=LEARNING_RATE,
            lr_schedule="linear",
            warmup_steps=2,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            max_tokens_per_microbatch=cut.budget,
        ),
        temperature=TEMPERATURE,
    )


@dataclass(frozen=True)
class Trained:
    """What the learners under test did."""

    cut: Cut
    reports: list[StepReport]
    before: list[AnnotatedSample]
    after: list[AnnotatedSample]
    checkpoint: Path
    exported: Path


def shuffled(samples: list[TrainSample], cut: Cut) -> list[TrainSample]:
    order = np.random.default_rng(cut.order).permutation(len(samples)) if cut.order else range(len(samples))
    return [samples[i] for i in order]


def step(group: LearnerGroup, samples: list[TrainSample], cut: Cut) -> StepReport:
    return tiny.run(group.update(shuffled(samples, cut), kl_coef=KL_COEF, seed=(0,)))


def train(model: Path, truth: Truth, cut: Cut, out: Path, *, dtype: str = "float32") -> Trained:
    needs = frozenset({"old_logprobs", "ref_logprobs"})
    probes = [s.sample for s in truth.samples[0]]
    with tiny.learner_group(spec(model, cut, dtype=dtype), out) as group:
        before = tiny.run(group.annotate(probes, needs))
        reports = [step(group, truth.samples[0], cut)]
        tiny.run(group.save(str(out / "checkpoint")))
        reports.append(step(group, truth.samples[1], cut))
        after = tiny.run(group.annotate(probes, needs))
        tiny.run(group.export(str(out / "model")))
    return Trained(cut, reports, before, after, out / "checkpoint", out / "model")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def truth(policy: Path) -> Truth:
    return plain_training(policy)


@pytest.fixture(scope="module", params=CUTS, ids=str)
def trained(
    request: pytest.FixtureRequest, policy: Path, truth: Truth, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    return train(policy, truth, request.param, tmp_path_factory.mktemp(str(request.param)))


def relative(value: float, expected: float) -> float:
    return abs(value / expected - 1)


def test_oracle_clips_and_penalises(truth: Truth) -> None:
    """The case is not a trivial one: ratios beyond the clip, gradients beyond the norm, a KL term that counts."""
    ratios = [
        np.exp(now.numpy() - s.annotated.old_logprobs)[s.sample.mask]
        for now, s in zip(truth.before, truth.samples[0], strict=True)
        if s.annotated.old_logprobs is not None
    ]
    assert {bool((r > 1.2).any()) for r in ratios} == {True, False}
    assert min(truth.grad_norms) > 2 * MAX_GRAD_NORM


def test_loss_and_gradient_norm_are_those_of_the_plain_loop(trained: Trained, truth: Truth) -> None:
    for k, tolerance in ((0, 1e-6), (1, 1e-5)):  # the second step starts from weights that are rounded to float32
        report = trained.reports[k]
        print(trained.cut, k, relative(report.loss, truth.losses[k]), relative(report.grad_norm, truth.grad_norms[k]))
        assert relative(report.loss, truth.losses[k]) < tolerance
        assert relative(report.grad_norm, truth.grad_norms[k]) < tolerance
        assert report.learning_rate == pytest.approx(LEARNING_RATE * FACTORS[k], rel=1e-12)
        assert report.optimizer_steps == 1


def test_weights_are_those_of_the_plain_loop(trained: Trained, truth: Truth) -> None:
    """Also that what is exported loads in transformers, with its head tied as it was."""
    model = tiny.load_plain(trained.exported, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert set(state) == set(truth.weights)
    for name, expected in truth.weights.items():
        err = float((state[name].double() - expected).abs().max())
        print(name, err)
    for name, expected in truth.weights.items():
        torch.testing.assert_close(state[name].double(), expected, rtol=0, atol=1e-5, msg=name)
