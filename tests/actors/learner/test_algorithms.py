"""PPO's and GKD's updates on real DeepSpeed ranks against a plain float64 loop, two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from actors.config import LoraConfig
from actors.learner.actor import Learner
from actors.learner.deepspeed_engine import GatheredWeights
from actors.learner.group import LearnerGroup
from actors.messages import LearnerSpec, StepReport, UpdateOptions
from actors.modeling.quantized import quantized_layers
from tests.support import tiny
from tests.support.learning import (
    CLIP,
    FACTORS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TEMPERATURE,
    WEIGHT_DECAY,
    Cut,
    Ranks,
    learner_spec,
    make_samples,
    on_policy,
    sequence_logprobs,
    shuffled,
)
from tests.support.tiny_adapters import make_adapter
from trainers.adapter_folder import read_adapter
from trainers.algorithms.config import CriticConfig, GKDConfig, PPOConfig, PPOKLConfig, TeacherConfig
from trainers.tiny_models import make_random_reward_model
from trainers.types import AnnotatedSample, TopLogprobs, TrainSample

pytestmark = pytest.mark.integration

CRITIC_RATE, VALUE_CLIP, BETA, JSD_TEMPERATURE = 1e-3, 0.2, 0.3, 1.3
CUTS = [Cut(1, 1, 1000, 0), Cut(2, 2, 40, 2), Cut(3, 2, 24, 3)]


@dataclass(frozen=True)
class Trained:
    """What the learners under test did."""

    reports: list[StepReport]
    after: list[AnnotatedSample]


def train(spec: LearnerSpec, cut: Cut, samples: list[list[TrainSample]], out: Path, ranks: Ranks) -> Trained:
    needs = frozenset({"old_logprobs", *(["values"] if spec.algorithm.type == "ppo" else [])})
    with ranks.learners(spec, cut, out) as group:
        order = UpdateOptions(kl_coef=0.0)
        reports = [tiny.run(group.update(shuffled(batch, cut), order, seed=(0,))) for batch in samples]
        return Trained(reports, tiny.run(group.annotate([s.sample for s in samples[0]], needs)))  # type: ignore[arg-type]


def optimizer(parameters: Any, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)


def one_step(loss: torch.Tensor, chosen: torch.optim.AdamW, rate: float) -> float:
    parameters = chosen.param_groups[0]["params"]
    chosen.param_groups[0]["lr"] = rate
    chosen.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    chosen.step()
    return norm


def assert_logprobs(after: list[AnnotatedSample], model: Any, samples: list[TrainSample]) -> None:
    for row, logprobs in zip(after, sequence_logprobs(model, samples), strict=True):
        np.testing.assert_allclose(row.old_logprobs, logprobs, rtol=0, atol=1e-4)


# --- PPO --------------------------------------------------------------------------------------------------------------


def plain_values(critic: Any, bias: torch.Tensor, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
    """`[T]`: at each token the head's output at the one before it, 0 at the first."""
    hidden = critic.model(input_ids=torch.tensor(tokens)[None].long()).last_hidden_state[0]
    values = critic.score(hidden)[:-1, 0] + bias
    return torch.cat([values.new_zeros(1), values])


def judged(critic: Any, samples: list[TrainSample], *, seed: int) -> list[TrainSample]:
    """The samples with values and returns around those of the critic as it begins, some beyond the clip."""
    rng = np.random.default_rng(seed)
    found = []
    for train in samples:
        with torch.no_grad():
            now = plain_values(critic, torch.zeros(1, dtype=torch.float64), train.sample.tokens).numpy()
        mask = train.sample.mask
        old, returns = (np.where(mask, now + rng.normal(0, 0.4, len(now)), 0).astype(np.float32) for _ in range(2))
        found.append(replace(train, annotated=replace(train.annotated, values=old), returns=returns))
    return found


def ppo_loss(model: Any, samples: list[TrainSample]) -> torch.Tensor:
    terms = []
    for train in samples:
        mask = torch.from_numpy(train.sample.mask)
        logprobs = tiny.plain_logprobs(model, train.sample.tokens, temperature=TEMPERATURE)[mask]
        given = train.annotated.old_logprobs
        old = logprobs.detach() if given is None else torch.from_numpy(given).double()[mask]
        advantage = torch.from_numpy(train.advantages).double()[mask]
        ratio = (logprobs - old).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
    return torch.cat(terms).mean()


def critic_loss(critic: Any, bias: torch.Tensor, samples: list[TrainSample]) -> torch.Tensor:
    terms = []
    for train in samples:
        mask = torch.from_numpy(train.sample.mask)
        values = plain_values(critic, bias, train.sample.tokens)[mask]
        assert train.annotated.values is not None
        assert train.returns is not None
        old, returns = (torch.from_numpy(a).double()[mask] for a in (train.annotated.values, train.returns))
        clipped = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
        terms.append(0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2))
    return torch.cat(terms).mean()


def ppo(critic: CriticConfig) -> PPOConfig:
    """The algorithm whose losses `ppo_loss` and `critic_loss` are."""
    kl = PPOKLConfig(coef=0.0)
    return PPOConfig(type="ppo", kl=kl, clip_low=CLIP, clip_high=CLIP, value_clip=VALUE_CLIP, critic=critic)


def assert_ppo_steps(
    trained: Trained,
    samples: list[list[TrainSample]],
    model: Any,
    critic: Any,
    bias: torch.Tensor,
    *,
    learnt: list[Any],
    judging: list[Any],
) -> None:
    """The same steps in the plain models: losses, gradient norms, log-probabilities and values."""
    chosen = optimizer(learnt, LEARNING_RATE), optimizer(judging, CRITIC_RATE)
    for report, batch, factor in zip(trained.reports, samples, FACTORS, strict=True):
        loss, value = ppo_loss(model, batch), critic_loss(critic, bias, batch)
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
        assert report.metrics["value/loss"].value == pytest.approx(float(value.detach()), rel=1e-5)
        assert report.grad_norm == pytest.approx(one_step(loss, chosen[0], LEARNING_RATE * factor), rel=1e-5)
        one_step(value, chosen[1], CRITIC_RATE * factor)
    assert_logprobs(trained.after, model, samples[0])
    for row, sample in zip(trained.after, samples[0], strict=True):
        with torch.no_grad():
            expected = plain_values(critic, bias, sample.sample.tokens)
        np.testing.assert_allclose(row.values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [replace(CUTS[0], on_ray=True), *CUTS[1:]], ids=str)
def test_ppo_trains_policy_and_critic_as_the_plain_loop_does(cut: Cut, ranks: Ranks, tmp_path: Path) -> None:
    policy = tiny.make_policy(tmp_path / "policy", tied=True)
    make_random_reward_model(tmp_path / "reward")
    model = tiny.load_plain(policy)
    critic: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float64)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    samples = [
        judged(critic, make_samples(model, seed=1), seed=3),
        judged(critic, on_policy(make_samples(model, seed=2)), seed=4),
    ]
    config = ppo(CriticConfig(model=str(tmp_path / "reward"), learning_rate=CRITIC_RATE))
    trained = train(learner_spec(policy, config, cut), cut, samples, tmp_path, ranks)
    judging = [*critic.parameters(), bias]
    assert_ppo_steps(trained, samples, model, critic, bias, learnt=[*model.parameters()], judging=judging)


# --- PPO, the critic an adapter ---------------------------------------------------------------------------------------

LORA = LoraConfig(r=3, alpha=6.0)
ADAPTED = [("lora", CUTS[0]), ("lora", CUTS[2]), ("qlora", CUTS[2])]


class Watched(Learner):
    """A learner that shows its critic."""

    def critic_weights(self) -> dict[str, torch.Tensor]:
        """Every full weight; the 4-bit ones as they are in memory."""
        critic = self._models.critic
        assert critic is not None
        packed = {f"{name}.packed": layer.weight.data for name, layer in quantized_layers(critic.module).items()}
        whole = dict(GatheredWeights(list(critic.module.named_parameters())))
        return {name: tensor.cpu().clone() for name, tensor in (packed | whole).items()}


tiny.by_value(__name__)


@dataclass(frozen=True)
class Judged:
    """Two optimizer steps of a critic, a checkpoint between them."""

    spec: LearnerSpec
    reward: Path
    samples: list[list[TrainSample]]
    reports: list[StepReport]
    weights: list[dict[str, torch.Tensor]]  # before, and after the second step
    after: list[AnnotatedSample]
    checkpoint: Path


def critic_weights(group: LearnerGroup) -> dict[str, torch.Tensor]:
    found = tiny.run(group.actors.each("test", lambda a, _: a.critic_weights.remote(), deadline_s=60.0))
    return found[0]


def base_critic(reward: Path, kind: str) -> Any:
    """In float64; for QLoRA with the weights that transformers makes of its own 4-bit ones."""
    if kind == "lora":
        return AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float64)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        reward, dtype=torch.float32, quantization_config=quantized
    )
    return model.dequantize().double()


def judge(kind: Any, cut: Cut, out: Path, ranks: Ranks) -> Judged:
    policy = tiny.make_policy(out / "policy", tied=True)
    make_random_reward_model(out / "reward")
    model, critic = tiny.load_plain(policy), base_critic(out / "reward", kind)
    samples = [judged(critic, make_samples(model, seed=n), seed=n + 2) for n in (1, 2)]
    config = ppo(CriticConfig(model=str(out / "reward"), train_type=kind, learning_rate=CRITIC_RATE))
    spec = learner_spec(policy, config, cut, train_type=kind, lora=LORA)
    order = UpdateOptions(kl_coef=0.0)
    with ranks.learners(spec, cut, out, cls=Watched) as group:
        weights = [critic_weights(group)]
        reports = [tiny.run(group.update(shuffled(samples[0], cut), order, seed=(0,)))]
        tiny.run(group.save(str(out / "checkpoint")))
        reports.append(tiny.run(group.update(shuffled(samples[1], cut), order, seed=(0,))))
        weights.append(critic_weights(group))
        after = tiny.run(group.annotate([s.sample for s in samples[0]], frozenset({"values"})))
    return Judged(spec, out / "reward", samples, reports, weights, after, out / "checkpoint")


@pytest.fixture(scope="module")
def judgements(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Cut], Judged]:
    return cache(lambda kind, cut: judge(kind, cut, tmp_path_factory.mktemp(f"critic-{kind}-{cut}"), ranks))


@pytest.mark.parametrize(("kind", "cut"), ADAPTED, ids=str)
def test_a_critic_with_an_adapter_learns_as_pefts_does(
    kind: str, cut: Cut, judgements: Callable[[str, Cut], Judged]
) -> None:
    """Head and adapter by PEFT and torch alone, from the adapter that the learners drew."""
    done = judgements(kind, cut)
    critic = base_critic(done.reward, kind)
    config = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear")
    peft.get_peft_model(critic.model, config).double()  # in place
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad} | {"score.bias": bias}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(done.weights[0][name])
    chosen = optimizer(trained.values(), CRITIC_RATE)
    for report, batch, factor in zip(done.reports, done.samples, FACTORS, strict=True):
        loss = critic_loss(critic, bias, batch)
        assert report.metrics["value/loss"].value == pytest.approx(float(loss.detach()), rel=1e-5)
        one_step(loss, chosen, CRITIC_RATE * factor)
    first, last = done.weights
    for name, parameter in trained.items():
        torch.testing.assert_close(last[name].double(), parameter.detach(), rtol=0, atol=1e-5)
        assert not torch.equal(first[name], last[name]), name
    for row, sample in zip(done.after, done.samples[0], strict=True):
        with torch.no_grad():
            expected = plain_values(critic, bias, sample.sample.tokens)
        np.testing.assert_allclose(row.values, expected, rtol=0, atol=1e-5)
    frozen = first.keys() - trained.keys()
    assert len(frozen) > 14
    assert all(torch.equal(first[name], last[name]) for name in frozen)


@pytest.mark.parametrize(("kind", "cut"), ADAPTED[:2], ids=str)
def test_a_critic_with_an_adapter_continues_bit_for_bit(
    kind: str, cut: Cut, judgements: Callable[[str, Cut], Judged], ranks: Ranks, tmp_path: Path
) -> None:
    done = judgements(kind, cut)
    with ranks.learners(done.spec, cut, tmp_path, cls=Watched) as group:
        tiny.run(group.load(str(done.checkpoint)))
        order = UpdateOptions(kl_coef=0.0)
        report = tiny.run(group.update(shuffled(done.samples[1], cut), order, seed=(0,)))
        again = critic_weights(group)
    assert report == done.reports[1]
    assert again.keys() == done.weights[1].keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in done.weights[1].items())


def test_ppos_critic_of_a_continued_policy_begins_as_a_copy_of_it(ranks: Ranks, tmp_path: Path) -> None:
    """Base and adapter in one, trained in full, below a head that predicts 0; the policy keeps training its adapter."""
    policy = tiny.make_policy(tmp_path / "policy", tied=True)
    sft = make_adapter(policy, tmp_path / "sft")
    model = peft.PeftModel.from_pretrained(tiny.load_plain(policy), sft, is_trainable=True).double().eval()
    copy = peft.PeftModel.from_pretrained(tiny.load_plain(policy), sft).double().merge_and_unload()
    critic = SimpleNamespace(model=copy.model, score=torch.nn.Linear(64, 1, bias=False, dtype=torch.float64))
    torch.nn.init.zeros_(critic.score.weight)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    judging = [*critic.model.requires_grad_(True).parameters(), critic.score.weight, bias]
    samples = [judged(critic, make_samples(model, seed=1), seed=3), judged(critic, make_samples(model, seed=2), seed=4)]
    config = ppo(CriticConfig(learning_rate=CRITIC_RATE))
    spec = learner_spec(policy, config, CUTS[2], train_type="lora")
    spec = replace(spec, adapter=read_adapter(sft, where="policy.model"))
    trained = train(spec, CUTS[2], samples, tmp_path, ranks)
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert_ppo_steps(trained, samples, model, critic, bias, learnt=learnt, judging=judging)


# --- GKD --------------------------------------------------------------------------------------------------------------


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """β·KL(T‖M) + (1 − β)·KL(S‖M), M = β·T + (1 − β)·S (arXiv 2306.13649, eq. 1), of two `[T, V]` of logits."""
    s, t = (torch.softmax(logits / JSD_TEMPERATURE, dim=-1) for logits in (student, teacher))
    middle = BETA * t + (1 - BETA) * s
    return (BETA * t * (t / middle).log() + (1 - BETA) * s * (s / middle).log()).sum(-1)


def gkd_loss(model: Any, teacher: Any, samples: list[TrainSample]) -> torch.Tensor:
    terms = []
    for train in samples:
        ids = torch.tensor(train.sample.tokens)[None].long()
        with torch.no_grad():
            taught = teacher(input_ids=ids).logits[0, :-1]
        divergence = jsd(model(input_ids=ids).logits[0, :-1], taught)
        terms.append(divergence[torch.from_numpy(train.sample.mask)[1:]])
    return torch.cat(terms).mean()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_gkd_moves_the_policy_towards_the_teacher_as_the_plain_loop_does(
    cut: Cut, ranks: Ranks, tmp_path: Path
) -> None:
    policy = tiny.make_policy(tmp_path / "policy", tied=True)
    teacher = tiny.make_policy(tmp_path / "teacher", tied=True, seed=7)
    model, taught = tiny.load_plain(policy), tiny.load_plain(teacher)
    samples = [make_samples(model, seed=1), on_policy(make_samples(model, seed=2))]
    config = GKDConfig(type="gkd", teacher=TeacherConfig(model=str(teacher)), beta=BETA, temperature=JSD_TEMPERATURE)
    trained = train(learner_spec(policy, config, cut), cut, samples, tmp_path, ranks)
    chosen = optimizer(model.parameters(), LEARNING_RATE)
    for report, batch, factor in zip(trained.reports, samples, FACTORS, strict=True):
        loss = gkd_loss(model, taught, batch)
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.metrics["distill/jsd"].value == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.grad_norm == pytest.approx(one_step(loss, chosen, LEARNING_RATE * factor), rel=1e-5)
    assert_logprobs(trained.after, model, samples[0])


def with_taught(teacher: Any, samples: list[TrainSample], k: int) -> list[TrainSample]:
    """What an engine of the teacher would send: its k likeliest tokens wherever the policy chose one."""
    found = []
    for train in samples:
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor(train.sample.tokens)[None].long()).logits[0, :-1]
        best, ids = logits.log_softmax(-1)[torch.from_numpy(train.sample.mask)[1:]].topk(k)
        taught = TopLogprobs(ids.numpy().astype(np.int32), best.numpy().astype(np.float32))
        found.append(replace(train, annotated=replace(train.annotated, teacher_top_logprobs=taught)))
    return found


def topk_loss(model: Any, samples: list[TrainSample]) -> torch.Tensor:
    """The divergence over the teacher's k tokens and the rest as one, over the tokens of the step."""
    terms = []
    for train in samples:
        taught = train.annotated.teacher_top_logprobs
        assert taught is not None
        logits = model(input_ids=torch.tensor(train.sample.tokens)[None].long()).logits[0, :-1]
        s = torch.softmax(logits[torch.from_numpy(train.sample.mask)[1:]], -1).gather(
            1, torch.tensor(taught.ids).long()
        )
        t = torch.tensor(taught.logprobs).double().exp()
        s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (s, t))
        middle = BETA * t + (1 - BETA) * s
        terms.append((BETA * t * (t / middle).log() + (1 - BETA) * s * (s / middle).log()).sum(-1))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("cut", CUTS[:2], ids=str)
def test_gkd_learns_from_what_an_engine_of_the_teacher_sent(cut: Cut, ranks: Ranks, tmp_path: Path) -> None:
    """There is no teacher in the learners: its folder does not even exist."""
    policy = tiny.make_policy(tmp_path / "policy", tied=True)
    model = tiny.load_plain(policy)
    taught = tiny.load_plain(tiny.make_policy(tmp_path / "teacher", tied=True, seed=7))
    plain = [make_samples(model, seed=1), on_policy(make_samples(model, seed=2))]
    samples = [with_taught(taught, batch, 12) for batch in plain]
    teacher = TeacherConfig(model="nowhere", served=True)
    config = GKDConfig(type="gkd", teacher=teacher, beta=BETA, top_k=12)
    trained = train(learner_spec(policy, config, cut), cut, samples, tmp_path, ranks)
    chosen = optimizer(model.parameters(), LEARNING_RATE)
    for report, batch, factor in zip(trained.reports, samples, FACTORS, strict=True):
        loss = topk_loss(model, batch)
        assert report.metrics["distill/jsd"].value == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.grad_norm == pytest.approx(one_step(loss, chosen, LEARNING_RATE * factor), rel=1e-5)
    assert_logprobs(trained.after, model, samples[0])
