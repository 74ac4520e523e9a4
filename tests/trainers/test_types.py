"""The stage types: alignment of prompt and completion, and shapes that do not fit."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from trainers.types import (
    AnnotatedSample,
    Completion,
    Prompt,
    Rollout,
    Sample,
    TokenPrompt,
    TrainSample,
    to_sample,
    to_samples,
)

ZEROS = np.zeros(5, dtype=np.float32)


def prompt(id: str, *tokens: int) -> TokenPrompt:
    return TokenPrompt(
        id=id, prompt=Prompt(messages=(), source="p.jsonl", line=1), tokens=np.array(tokens, dtype=np.int32)
    )


def completion(*tokens: int, version: int = 3) -> Completion:
    return Completion(
        tokens=np.array(tokens, dtype=np.int32),
        logprobs=np.array([-0.5 * t for t in tokens], dtype=np.float32),
        text="",
        finish_reason="stop",
        policy_version=version,
    )


def sample() -> Sample:
    return to_sample(prompt("p", 7, 8, 9), completion(1, 2), id="p/0", reward=1.0)


def test_a_sample_is_prompt_and_completion_aligned() -> None:
    found = to_sample(prompt("p", 7, 8, 9), completion(1, 2), id="p/1", group=4, reward=0.5)
    assert found.tokens.tolist() == [7, 8, 9, 1, 2]
    assert found.mask.tolist() == [False, False, False, True, True]
    assert found.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -1.0]
    assert (found.tokens.dtype, found.mask.dtype, found.rollout_logprobs.dtype) == (np.int32, np.bool_, np.float32)
    assert (found.id, found.group, found.reward, found.valid, found.policy_version) == ("p/1", 4, 0.5, True, 3)


def test_a_score_that_failed_is_not_zero() -> None:
    found = to_sample(prompt("p", 7), completion(1), id="p/0", reward=None)
    assert not found.valid
    assert math.isnan(found.reward)
    assert to_sample(prompt("p", 7), completion(1), id="p/0", reward=0.0).valid


def test_an_empty_completion_is_a_sample_without_a_chosen_token() -> None:
    found = to_sample(prompt("p", 7, 8), completion(), id="p/0", reward=1.0)
    assert found.tokens.tolist() == [7, 8]
    assert not found.mask.any()


def test_samples_are_numbered_by_rollout() -> None:
    groups = [
        Rollout(
            prompt=prompt(name, 7),
            completions=(completion(1), completion(2, version=2)),
            rewards={"judge": rewards},
            reward=rewards,
        )
        for name, rewards in (("a", (1.0, None)), ("b", (0.0, 2.0)))
    ]
    found = to_samples(groups)
    assert [(s.id, s.group, s.valid, s.policy_version) for s in found] == [
        ("a/0", 0, True, 3),
        ("a/1", 0, False, 2),
        ("b/0", 1, True, 3),
        ("b/1", 1, True, 2),
    ]
    assert [s.reward for s in found if s.valid] == [1.0, 0.0, 2.0]
    assert to_samples([]) == []


@pytest.mark.parametrize(
    ("reward", "judge"), [((1.0,), (1.0, 2.0)), ((1.0, 2.0), (1.0,)), ((1.0, 2.0, 3.0), (1.0, 2.0))]
)
def test_a_rollout_has_as_many_scores_as_completions(reward: tuple[float, ...], judge: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rollout p: rewards and completions differ in number"):
        Rollout(
            prompt=prompt("p", 1),
            completions=(completion(1), completion(2)),
            rewards={"judge": judge},
            reward=reward,
        )


def test_arrays_of_another_length_are_refused_by_name() -> None:
    short = ZEROS[:4]
    with pytest.raises(ValueError, match=r"sample p/0: arrays of shapes \(5,\) and \(4,\)"):
        dataclasses.replace(sample(), rollout_logprobs=short)
    with pytest.raises(ValueError, match="sample p/0"):
        dataclasses.replace(sample(), mask=np.zeros((1, 5), dtype=np.bool_))
    for name in ("old_logprobs", "ref_logprobs", "values"):
        assert AnnotatedSample(sample=sample(), **{name: ZEROS})
        with pytest.raises(ValueError, match="sample p/0"):
            AnnotatedSample(sample=sample(), **{name: short})
    annotated = AnnotatedSample(sample=sample())
    for arrays in ({"advantages": short}, {"advantages": ZEROS, "returns": short}):
        with pytest.raises(ValueError, match="sample p/0"):
            TrainSample(annotated=annotated, **arrays)
    assert TrainSample(annotated=annotated, advantages=ZEROS, returns=ZEROS).sample is annotated.sample


def test_stages_are_frozen_and_closed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().reward = 2.0  # type: ignore[misc]
    assert not hasattr(sample(), "__dict__")
