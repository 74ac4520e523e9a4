"""The learner on real DeepSpeed ranks against a plain float64 loop: the same numbers however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from actors.config import LearnerConfig
from actors.messages import LearnerSpec, UpdateOptions
from tests.support import tiny
from tests.support.learning import (
    CLIP,
    FACTORS,
    KL_COEF,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Cut,
    Ranks,
    Trained,
    annotated,
    grpo,
    grpo_terms,
    learner_spec,
    make_samples,
    on_policy,
    sequence_logprobs,
    step,
    two_steps,
)
from trainers.config import ImportanceConfig
from trainers.errors import UserError
from trainers.packing import pack_updates
from trainers.types import Float32Array, TrainSample

pytestmark = pytest.mark.integration

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


CUTS = [Cut(0, 1, 1000, 0), Cut(0, 2, 30, 5), Cut(1, 2, 24, 1), Cut(2, 2, 60, 2), Cut(3, 1, 16, 3)]
CUTS += [Cut(3, 2, 40, 4, on_ray=True)]


@dataclass(frozen=True)
class Truth:
    """What the plain loop computes."""

    samples: tuple[list[TrainSample], list[TrainSample]]
    losses: list[float]
    sizes: list[float]  # mean size of the loss's terms: what its rounding is relative to
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]  # after both steps
    before: list[torch.Tensor]  # log-probabilities of the first samples by the initial weights
    after: list[torch.Tensor]  # and by the final ones


def plain_training(path: Path) -> Truth:
    model = tiny.load_plain(path)
    samples = make_samples(model, seed=1), on_policy(make_samples(model, seed=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    truth = Truth(samples, [], [], [], {}, sequence_logprobs(model, samples[0]), [])
    for batch, factor in zip(samples, FACTORS, strict=True):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        terms = grpo_terms(model, batch)
        terms.mean().backward()
        truth.losses.append(float(terms.detach().mean()))
        truth.sizes.append(float(terms.detach().abs().mean()))
        truth.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
    truth.weights.update(model.state_dict())
    truth.after.extend(sequence_logprobs(model, samples[0]))
    return truth


def spec(model: Path, cut: Cut, *, dtype: str = "float32") -> LearnerSpec:
    return learner_spec(model, grpo(), cut, dtype=dtype, chat_template=CHAT_TEMPLATE)


def train(model: Path, truth: Truth, cut: Cut, out: Path, ranks: Ranks, *, dtype: str = "float32") -> Trained:
    with ranks.learners(spec(model, cut, dtype=dtype), cut, out) as group:
        return two_steps(group, truth.samples, cut, out)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def truth(policy: Path) -> Truth:
    return plain_training(policy)


@pytest.fixture(scope="module")
def trainings(
    policy: Path, truth: Truth, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Cut], Trained]:
    """Each cut is trained once, when it is first asked for."""
    return cache(lambda cut: train(policy, truth, cut, tmp_path_factory.mktemp(str(cut)), ranks))


@pytest.fixture(params=CUTS, ids=str)
def trained(request: pytest.FixtureRequest, trainings: Callable[[Cut], Trained]) -> Trained:
    return trainings(request.param)


def test_oracle_clips_and_penalises(truth: Truth) -> None:
    """The case is not a trivial one: ratios beyond the clip, gradients beyond the norm."""
    pairs = zip(truth.before, truth.samples[0], strict=True)
    ratios = [np.exp(now.numpy() - old_logprobs(s))[s.sample.mask] for now, s in pairs]
    beyond = np.concatenate(ratios) > 1 + CLIP
    assert beyond.any()
    assert not beyond.all()
    assert min(truth.grad_norms) > 2 * MAX_GRAD_NORM


def old_logprobs(sample: TrainSample) -> Float32Array:
    assert sample.annotated.old_logprobs is not None
    return sample.annotated.old_logprobs


def test_loss_and_gradient_norm_are_those_of_the_plain_loop(trained: Trained, truth: Truth) -> None:
    for k, report in enumerate(trained.reports):
        assert report.loss == pytest.approx(truth.losses[k], rel=0, abs=1e-6 * truth.sizes[k])
        assert report.grad_norm == pytest.approx(truth.grad_norms[k], rel=1e-6)
        assert report.learning_rate == pytest.approx(LEARNING_RATE * FACTORS[k], rel=1e-12)


def test_reported_gap_is_the_largest_before_the_update(trained: Trained, truth: Truth) -> None:
    for report, samples in zip(trained.reports[:1], truth.samples[:1], strict=True):
        gaps = [
            np.abs(now.numpy() - s.sample.rollout_logprobs)[s.sample.mask]
            for now, s in zip(truth.before, samples, strict=True)
        ]
        worst = max(range(len(gaps)), key=lambda i: gaps[i].max())
        assert report.gap_max == pytest.approx(gaps[worst].max(), abs=1e-5)
        assert report.gap_sample == samples[worst].sample.id
        assert report.gap_quantile == pytest.approx(np.concatenate(gaps).max(), abs=1e-5)  # of so few tokens
        assert report.metrics["rollout/logprob_gap_mean"].value == pytest.approx(np.concatenate(gaps).mean(), abs=1e-5)


def test_exported_weights_are_those_of_the_plain_loop(trained: Trained, truth: Truth) -> None:
    """And they load in transformers, the output head tied as it was, tokenizer and chat template beside them."""
    model = tiny.load_plain(trained.exported, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert set(state) == set(truth.weights)
    for name, expected in truth.weights.items():
        torch.testing.assert_close(state[name].double(), expected, rtol=0, atol=1e-5, msg=name)
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(trained.exported)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("37+48=").input_ids == tiny.make_tokenizer()("37+48=").input_ids


def test_annotations_are_the_policys_now_and_the_reference_as_it_began(trained: Trained, truth: Truth) -> None:
    for rows, now in ((trained.before, truth.before), (trained.after, truth.after)):
        for row, policy, reference in zip(rows, now, truth.before, strict=True):
            np.testing.assert_allclose(row.old_logprobs, policy, rtol=0, atol=1e-4)
            np.testing.assert_allclose(row.ref_logprobs, reference, rtol=0, atol=1e-4)


def test_learning_shows(truth: Truth) -> None:
    """What the test above can distinguish: the two steps moved log-probabilities by far more than its tolerance."""
    assert max(float((a - b).abs().max()) for a, b in zip(truth.before, truth.after, strict=True)) > 0.01


@pytest.mark.parametrize("cut", [CUTS[3], CUTS[4]], ids=str)
def test_a_loaded_checkpoint_continues_bit_for_bit(
    cut: Cut,
    trainings: Callable[[Cut], Trained],
    policy: Path,
    truth: Truth,
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    """New processes load what was saved after the first step; their second step is the uninterrupted one."""
    trained = trainings(cut)
    with ranks.learners(spec(policy, cut), cut, tmp_path) as group:
        tiny.run(group.load(str(trained.checkpoint)))
        report = step(group, truth.samples[1], cut)
        rows = annotated(group, truth.samples[0])
        tiny.run(group.export(str(tmp_path / "model")))
    assert report == trained.reports[1]
    for row, expected in zip(rows, trained.after, strict=True):
        np.testing.assert_array_equal(row.old_logprobs, expected.old_logprobs)
        np.testing.assert_array_equal(row.ref_logprobs, expected.ref_logprobs)
    expected_state = tiny.load_plain(trained.exported, dtype=torch.float32).state_dict()
    for name, tensor in tiny.load_plain(tmp_path / "model", dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name


def test_several_updates_and_passes_are_those_of_the_plain_loop(
    policy: Path, truth: Truth, ranks: Ranks, tmp_path: Path
) -> None:
    """Two passes of two updates: the packing decides who is in which, and has tests of its own."""
    cut, seed, samples = Cut(2, 2, 40, 0), (5,), truth.samples[0]
    made = spec(policy, cut)
    changes = {"updates_per_step": 2, "epochs_per_step": 2, "lr_schedule": "constant", "warmup_steps": 0}
    made = replace(made, train=made.train.model_copy(update=changes))
    with ranks.learners(made, cut, tmp_path) as group:
        tiny.run(group.update(samples, UpdateOptions(kl_coef=KL_COEF), seed=seed))
        after = tiny.run(group.annotate([s.sample for s in samples], frozenset({"old_logprobs"})))
    model = tiny.load_plain(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    (steps,) = pack_updates(samples, updates=2, epochs=2, shards=1, max_tokens=cut.budget, seed=seed)
    for update in steps:
        chosen = [int(i) for batch in update.micro_batches for i in batch.order]
        optimizer.zero_grad()
        grpo_terms(model, [samples[i] for i in chosen]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    assert len(steps) == 4
    for row, expected in zip(after, sequence_logprobs(model, samples), strict=True):
        np.testing.assert_allclose(row.old_logprobs, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    path = tiny.make_policy(tmp_path_factory.mktemp("untied"), tied=False, dtype=torch.bfloat16)
    return path, plain_training(path)


@pytest.mark.parametrize("cut", [Cut(1, 1, 1000, 1), Cut(2, 1, 40, 2), Cut(3, 1, 40, 3)], ids=str)
def test_bfloat16_trains_and_exports(cut: Cut, untied: tuple[Path, Truth], ranks: Ranks, tmp_path: Path) -> None:
    """Near the float64 loop, within bfloat16; what is exported has an output head of its own."""
    path, truth = untied
    trained = train(path, truth, cut, tmp_path, ranks, dtype="bfloat16")
    for k, report in enumerate(trained.reports):
        assert report.loss == pytest.approx(truth.losses[k], rel=0, abs=0.05 * truth.sizes[k])
        assert report.grad_norm == pytest.approx(truth.grad_norms[k], rel=0.05)
    model = tiny.load_plain(trained.exported, dtype=torch.bfloat16)
    initial = tiny.load_plain(path, dtype=torch.bfloat16).state_dict()
    assert model.config.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    same = changed = count = 0
    for name, tensor in model.state_dict().items():
        expected = truth.weights[name].bfloat16()
        same += int((tensor == expected).sum())
        changed += int((expected != initial[name]).sum())
        count += tensor.numel()
    assert same / count > 0.98  # rounded alike but for those next to a boundary
    assert changed / count > 0.1
    for row, logprobs in zip(trained.after, sequence_logprobs(model, truth.samples[0]), strict=True):
        np.testing.assert_allclose(row.old_logprobs, logprobs, rtol=0, atol=0.1)


def test_a_band_waits_for_no_rank_that_has_no_sample(policy: Path, truth: Truth, ranks: Ranks, tmp_path: Path) -> None:
    """Updates of one sample each over two ranks: one of them has nothing that the band could keep."""
    cut = Cut(2, 2, 1000, 0)
    made = spec(policy, cut)
    correction = ImportanceConfig(band=(0.0, 1e6))
    train = made.train.model_copy(update={"updates_per_step": 7, "importance_correction": correction})
    with ranks.learners(replace(made, train=train), cut, tmp_path) as group:
        report = step(group, truth.samples[0], cut)
    assert report.metrics["importance/kept"].value == 1
    assert report.metrics["importance/kept"].count == sum(int(s.sample.mask.sum()) for s in truth.samples[0])


def test_bfloat16_without_zero_is_refused() -> None:
    """DeepSpeed's optimizer for that takes a step with zero gradients when it is made: wrong by a quarter of a step."""
    from actors.learner.deepspeed_engine import engine_config

    with pytest.raises(UserError, match=r"learners\.zero_stage: 0 keeps no float32 master weights"):
        engine_config(LearnerConfig(zero_stage=0), dtype="bfloat16", max_grad_norm=1.0)
