"""A step's metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actors.messages import Proof, StepReport
from cluster.training.step_metrics import (
    Clock,
    StepFacts,
    eval_metrics,
    reward_metrics,
    rollout_metrics,
    step_metrics,
    zero_groups,
)
from trainers.algorithms.base import Mean
from trainers.types import (
    AnnotatedSample,
    Completion,
    FinishReason,
    Prompt,
    Rollout,
    TokenPrompt,
    TrainSample,
    to_samples,
)


def group(
    *rewards: float | None,
    lengths: tuple[int, ...],
    version: int = 6,
    finish: FinishReason = "stop",
    watched: tuple[float | None, ...] | None = None,
) -> Rollout:
    prompt = TokenPrompt(
        id="p", prompt=Prompt(messages=(), source="s", line=1), tokens=np.array([1, 2], dtype=np.int32)
    )
    completions = tuple(
        Completion(
            tokens=np.zeros(length, dtype=np.int32),
            logprobs=np.zeros(length, dtype=np.float32),
            text="",
            finish_reason=finish,
            policy_version=version,
        )
        for length in lengths
    )
    sources = {"judge": rewards} | ({"length": watched} if watched is not None else {})
    return Rollout(prompt=prompt, completions=completions, rewards=sources, reward=rewards)


def trained(rollouts: list[Rollout], advantages: list[float]) -> list[TrainSample]:
    return [
        TrainSample(annotated=AnnotatedSample(sample=s), advantages=np.where(s.mask, np.float32(a), np.float32(0)))
        for s, a in zip([s for s in to_samples(rollouts) if s.valid], advantages, strict=True)
    ]


ROLLOUTS = [
    group(1.0, 3.0, lengths=(4, 2), watched=(10.0, None)),
    group(5.0, None, lengths=(1, 3), version=5, finish="length", watched=(20.0, 60.0)),
    group(2.0, 2.0, lengths=(2, 2), watched=(0.0, 10.0)),
]


def facts(**changes: object) -> StepFacts:
    report = StepReport(
        metrics={
            "kl/mean": Mean(6.0, 12.0),
            "policy/entropy": Mean(3.0, 12.0),
            "rollout/logprob_gap_mean": Mean(0.0012, 12.0),
        },
        loss=-0.25,
        grad_norm=1.5,
        learning_rate=1e-5,
        gap_max=0.001,
        gap_sample="p/0",
        gap_quantile=0.0005,
    )
    given: dict[str, object] = {
        "step": 7,
        "version": 6,
        "rollouts": ROLLOUTS,
        "samples": trained(ROLLOUTS, [-0.7, 0.7, 0.0, 0.0, 0.0]),
        "report": report,
        "proof": Proof(version=7, bytes=1024, canary_gap=1e-6),
        "kl_coef": 0.05,
        "clock": Clock(generate=2.0, reward=0.5, annotate=0.25, train=0.75, sync=0.125, step=4.0),
    }
    return StepFacts(**(given | changes))  # type: ignore[arg-type]


def test_a_step_by_hand() -> None:
    assert step_metrics(facts()) == {
        "step": 7,
        "policy/version": 7,
        "reward/mean": pytest.approx(13 / 5),
        "reward/std": pytest.approx(math.sqrt((1.6**2 + 0.4**2 + 2.4**2 + 2 * 0.6**2) / 4)),
        "reward/judge": pytest.approx(13 / 5),
        "reward/length": pytest.approx(100 / 5),
        "reward/failed": 1,
        "kl/coef": 0.05,
        "kl/mean": 0.5,
        "policy/entropy": 0.25,
        "rollout/logprob_gap_mean": pytest.approx(0.0001),
        "policy/loss": -0.25,
        "policy/grad_norm": 1.5,
        "policy/lr": 1e-5,
        "advantage/zero_groups": pytest.approx(2 / 3),
        "rollout/length_mean": pytest.approx(14 / 6),
        "rollout/truncated_fraction": pytest.approx(2 / 6),
        "rollout/samples": 6,
        "rollout/tokens": 14,
        "rollout/staleness_max": 1,
        "rollout/logprob_gap_p999": 0.0005,
        "rollout/logprob_gap_max": 0.001,
        "weights/sync_bytes": 1024,
        "weights/sync_s": 0.125,
        "weights/canary_gap": 1e-6,
        "time/generate_s": 2.0,
        "time/reward_s": 0.5,
        "time/annotate_s": 0.25,
        "time/train_s": 0.75,
        "time/step_s": 4.0,
        "throughput/tokens_per_s": 3.5,
    }


def test_what_does_not_apply_is_absent() -> None:
    report = StepReport(metrics={}, loss=0.0, grad_norm=0.0, learning_rate=0.0, gap_max=0.0, gap_sample="")
    metrics = step_metrics(facts(report=report, kl_coef=None))
    assert [key for key in metrics if key.startswith(("kl/", "importance/", "value/", "distill/", "eval/"))] == []


def test_one_score_has_no_spread_and_no_score_no_mean() -> None:
    one = reward_metrics([group(2.0, None, lengths=(1, 1))])
    assert one == {"reward/mean": 2.0, "reward/judge": 2.0, "reward/failed": 1}
    assert reward_metrics([group(None, None, lengths=(1, 1))]) == {"reward/failed": 2}


def test_a_source_may_have_failed_where_the_sum_has_not() -> None:
    metrics = reward_metrics([group(1.0, 2.0, lengths=(1, 1), watched=(None, None))])
    assert metrics == {
        "reward/mean": 1.5,
        "reward/std": pytest.approx(math.sqrt(0.5)),
        "reward/judge": 1.5,
        "reward/failed": 0,
    }


def test_an_empty_completion_counts() -> None:
    assert rollout_metrics([group(1.0, 1.0, lengths=(0, 3))]) == {
        "rollout/length_mean": 1.5,
        "rollout/truncated_fraction": 0.0,
        "rollout/samples": 2,
        "rollout/tokens": 3,
    }


def test_groups_that_teach_nothing() -> None:
    samples = trained([ROLLOUTS[0], ROLLOUTS[1], ROLLOUTS[2]], [0.0, 0.0, 0.3, 0.0, -1.0])
    assert zero_groups(samples) == pytest.approx(1 / 3)
    assert zero_groups([]) == 0.0


def test_an_evaluation_by_hand() -> None:
    assert eval_metrics(ROLLOUTS) == {
        "eval/reward_mean": pytest.approx(13 / 5),
        "eval/judge": pytest.approx(13 / 5),
        "eval/length": pytest.approx(20),
    }
    assert eval_metrics([group(None, lengths=(1,))]) == {}
