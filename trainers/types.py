"""One frozen type for each stage of the data, from a prompt to what the learner trains on.

    Prompt → Completion → Rollout (scored) → Sample → AnnotatedSample → TrainSample → MicroBatch (packing.py)

A field exists only where it has a value, so that a function's signature shows what it needs. Arrays are numpy
(Ray hands them over without copying, read-only), and every per-token array has the length of `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Message: TypeAlias = dict[str, Any]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompts file, as the user wrote it.

    >>> Prompt(messages=({"role": "user", "content": "Hi"},), columns={"answer": "1"}, source="p.jsonl", line=1).line
    1
    """

    messages: tuple[Message, ...]  # a `prompt` string is one user turn
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other column, for reward functions
    response: str | None = None  # the response in data of format `sft`
    source: str  # the file it comes from
    line: int  # physical line (Parquet: row) from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """A prompt as the model sees it: the chat template applied and tokenized once."""

    id: str  # unique in the run: which occurrence of which prompt
    prompt: Prompt
    tokens: Int32Array  # [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a generator wrote for one prompt; its token ids are carried, never tokenized again."""

    tokens: Int32Array  # [C], with the end-of-sequence token where the model chose it
    logprobs: Float32Array  # [C], of the sampled distribution (temperature included)
    text: str
    finish_reason: FinishReason
    policy_version: int  # oldest weights that wrote any of the tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A group: all completions of one prompt with their scores.

    `rewards[name][i]` is completion i's raw score by that source, None if it could not be scored;
    `reward[i]` is the weighted sum that is trained on, None if any source with a weight failed.
    """

    prompt: TokenPrompt
    completions: tuple[Completion, ...]
    rewards: Mapping[str, tuple[float | None, ...]]
    reward: tuple[float | None, ...]

    def __post_init__(self) -> None:
        n = len(self.completions)
        if len(self.reward) != n or any(len(r) != n for r in self.rewards.values()):
            raise ValueError(f"rollout {self.prompt.id}: rewards and completions differ in number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trainable token sequence, prompt and completion; every array has length T."""

    id: str  # "<prompt id>/<index in the group>"; follows the sample to the Parquet file
    group: int  # samples of one prompt share it
    tokens: Int32Array  # [T]
    mask: BoolArray  # [T] True where the policy chose the token
    rollout_logprobs: Float32Array  # [T] from the generator; 0 where not mask
    reward: float  # NaN only where not valid
    valid: bool  # False: its score failed; it enters no baseline and no loss
    policy_version: int

    def __post_init__(self) -> None:
        _same_length(self.id, self.tokens, self.mask, self.rollout_logprobs)


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """A teacher's K likeliest tokens at each of the n positions that the policy chose, in order."""

    ids: Int32Array  # [n, K]
    logprobs: Float32Array  # [n, K], at temperature 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedSample:
    """A sample with the models' outputs for it. None: this run does not need that quantity."""

    sample: Sample
    old_logprobs: Float32Array | None = None  # [T] the trainer's own before the update; None: exactly on-policy
    ref_logprobs: Float32Array | None = None  # [T]
    values: Float32Array | None = None  # [T]
    teacher_top_logprobs: TopLogprobs | None = None  # from an engine of the teacher

    def __post_init__(self) -> None:
        given = [a for a in (self.old_logprobs, self.ref_logprobs, self.values) if a is not None]
        _same_length(self.sample.id, self.sample.tokens, *given)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """An annotated sample with what the algorithm makes of its reward."""

    annotated: AnnotatedSample
    advantages: Float32Array  # [T], 0 where not mask
    returns: Float32Array | None = None  # [T], where a critic learns

    def __post_init__(self) -> None:
        given = [a for a in (self.advantages, self.returns) if a is not None]
        _same_length(self.annotated.sample.id, self.annotated.sample.tokens, *given)

    @property
    def sample(self) -> Sample:
        """The sample itself."""
        return self.annotated.sample


def _same_length(name: str, tokens: Int32Array, *others: npt.NDArray[Any]) -> None:
    for array in others:
        if array.shape != tokens.shape:
            raise ValueError(
                f"sample {name}: arrays of shapes {tokens.shape} and {array.shape}; all must have length T"
            )


def to_sample(
    prompt: TokenPrompt, completion: Completion, *, id: str, group: int = 0, reward: float | None = None
) -> Sample:
    """Prompt and completion as one sequence; a reward of None makes it a sample without a valid score."""
    length = len(prompt.tokens)
    mask = np.zeros(length + len(completion.tokens), dtype=np.bool_)
    mask[length:] = True
    logprobs = np.zeros(len(mask), dtype=np.float32)
    logprobs[length:] = completion.logprobs
    return Sample(
        id=id,
        group=group,
        tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
        mask=mask,
        rollout_logprobs=logprobs,
        reward=float("nan") if reward is None else reward,
        valid=reward is not None,
        policy_version=completion.policy_version,
    )


def to_samples(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Prompt and completion of every scored completion as one sequence; `group` numbers the rollouts from 0."""
    return [
        to_sample(rollout.prompt, completion, id=f"{rollout.prompt.id}/{i}", group=group, reward=reward)
        for group, rollout in enumerate(rollouts)
        for i, (completion, reward) in enumerate(zip(rollout.completions, rollout.reward, strict=True))
    ]
