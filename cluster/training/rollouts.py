"""Groups: one prompt written by the generators and scored by the reward service. Failed scores are counted here.

It sees the roles through `actors/protocols.py` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Literal, Protocol, TypeAlias

import numpy as np

from actors.messages import GroupScores, ScoreRequest
from actors.protocols import Roles
from actors.rewards.config import reward_names
from cluster.config.run import RunConfig
from trainers.errors import Problem, UserError
from trainers.seeds import derive_seed
from trainers.types import AnnotatedSample, Completion, Prompt, Rollout, TokenPrompt

Writer: TypeAlias = Literal["policy", "teacher", "data"]


class RewardsFailedError(RuntimeError):
    """Too many scores of a step could not be had."""


class Encoder(Protocol):
    """The chat template and tokenizer."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, ready for the model to answer."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Token ids of an answer, its end included."""
        ...


class GroupProducer:
    """Writes and scores groups; remembers when the last was written, and what could not be scored."""

    def __init__(self, config: RunConfig, roles: Roles, encoder: Encoder) -> None:
        self._config = config
        self._roles = roles
        self._encoder = encoder
        self._causes: dict[str, list[str]] = {}  # why scores of a group could not be had, by its id
        names = reward_names(config.rewards)
        self._trained = {name for name, r in zip(names, config.scored_rewards, strict=True) if r.weight}
        self.written_at = 0.0  # monotonic time of the latest completion

    @property
    def trains_on_rewards(self) -> bool:
        """Whether any reward has a weight."""
        return bool(self._trained)

    async def produce(self, id: str, prompt: Prompt, *, n: int, writer: Writer = "policy", version: int = 0) -> Rollout:
        """One group of `n`; its draws depend on the run's seed and `id` alone.

        `version` stamps what someone else than the policy writes.
        """
        tokens = np.asarray(self._encoder.encode(prompt), dtype=np.int32)
        token_prompt = TokenPrompt(id=id, prompt=prompt, tokens=tokens)
        seeds = [derive_seed(self._config.seed, "sample", id, i) for i in range(n)]
        completions = await self._write(token_prompt, seeds, writer, version)
        self.written_at = monotonic()
        scores = await self._score(ScoreRequest(prompt=prompt, prompt_tokens=tokens, completions=completions))
        self._causes[id] = [f"{f.name}: {f.cause}" for f in scores.failures if f.name in self._trained]
        return Rollout(prompt=token_prompt, completions=completions, rewards=scores.rewards, reward=scores.reward)

    async def _write(
        self, prompt: TokenPrompt, seeds: Sequence[int], writer: Writer, version: int
    ) -> tuple[Completion, ...]:
        sampling = self._config.sampling
        if writer == "policy":
            return await self._roles.generators.generate(prompt, sampling, seeds)
        if writer == "data":
            return (self._from_data(prompt.prompt, version),) * len(seeds)
        assert self._roles.teacher is not None, "this run has no teacher that writes"
        written = await self._roles.teacher.generate(prompt, sampling, seeds)
        return tuple(replace(completion, policy_version=version) for completion in written)

    def _from_data(self, prompt: Prompt, version: int) -> Completion:
        """The response that the data holds, as if it had been written; its log-probabilities are never read."""
        if prompt.response is None:
            raise UserError([Problem(f"{prompt.source}:{prompt.line}", "holds no response text to learn from")])
        tokens = np.asarray(self._encoder.encode_response(prompt.response), dtype=np.int32)
        limit = self._config.sampling.max_tokens
        return Completion(
            tokens=tokens[:limit],
            logprobs=np.zeros(min(len(tokens), limit), dtype=np.float32),
            text=prompt.response,
            finish_reason="stop" if len(tokens) <= limit else "length",
            policy_version=version,
        )

    async def teacher_top_logprobs(self, samples: Sequence[AnnotatedSample], k: int) -> list[AnnotatedSample]:
        """The samples with the teacher's `k` likeliest tokens."""
        teacher = self._roles.teacher
        assert teacher is not None, "this run has no engine of its teacher"
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(teacher.top_logprobs(annotated.sample, k)) for annotated in samples]
        return [
            replace(annotated, teacher_top_logprobs=task.result())
            for annotated, task in zip(samples, asked, strict=True)
        ]

    def refuse_failed(self, rollouts: Sequence[Rollout], *, step: int) -> None:
        """Raise `RewardsFailedError` with the first cause where too many of the rollouts trained on have no score."""
        causes = [cause for rollout in rollouts for cause in self._causes.get(rollout.prompt.id, ())]
        self._causes = {}
        total = sum(len(r.reward) for r in rollouts)
        failed = sum(reward is None for r in rollouts for reward in r.reward)
        allowed = self._config.train.max_failed_fraction
        if not self._trained:
            return
        too_few = total - failed < self._config.train.updates_per_step
        if too_few or failed == total or failed > allowed * total:
            raise RewardsFailedError(
                f"{failed} of {total} samples of step {step} could not be scored (allowed: {allowed:.0%} of a step, "
                f"train.max_failed_fraction); first cause: {causes[0] if causes else 'unknown'}"
            )

    async def _score(self, request: ScoreRequest) -> GroupScores:
        if not self._config.rewards:
            return GroupScores(rewards={}, reward=(0.0,) * len(request.completions))
        deadline = self._config.timeouts.reward_s
        try:
            async with asyncio.timeout(deadline):
                return await self._roles.scorer.score(request)
        except TimeoutError:
            message = f"the reward service gave no answer within {deadline:g} s (timeouts.reward_s)"
            raise RewardsFailedError(message) from None
