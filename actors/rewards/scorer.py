"""The reward service as the driver sees it: asks every reward for a group's scores, and makes the sum of them.

A score that could not be had is None with a cause, never 0 and never an exception. It knows asyncio and the protocol
of a reward source (`source.py`), not which kinds exist.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.messages import GroupScores, ScoreFailure, ScoreRequest
from actors.rewards.catalog import make_source
from actors.rewards.checks import validate_rewards
from actors.rewards.circuit_breaker import Breaker
from actors.rewards.config import RewardConfig, reward_names
from actors.rewards.ray_serve import RewardApps, last_line
from actors.rewards.score import Answer, PassingError, RewardError, unscored
from actors.rewards.source import RewardSource
from actors.runtime.actor_group import RoleError
from trainers.errors import Problem, UserError
from trainers.rewards import RunningNormalizer, clipped, weighted_sum

BACKOFF_S = 0.25  # before the first further try; doubled for each one after it
LARGEST = 3e38  # the learner's arithmetic is float32


@dataclass(slots=True, kw_only=True)
class _Reward:
    """One reward and how it is doing."""

    name: str
    config: RewardConfig
    source: RewardSource
    waiting: int = 0  # calls that it has not answered yet
    breaker: Breaker = field(default_factory=Breaker)
    statistics: RunningNormalizer = field(default_factory=RunningNormalizer)

    def limit_s(self) -> float:
        """Time for the answer to a group that is sent now: its time limit, including what is queued before it."""
        pace = self.source.pace
        return pace.slack_s + self.config.timeout_s * max(self.waiting / pace.parallel, 1)

    def trained(self, score: float | None) -> float | None:
        """The score as it enters the sum."""
        if score is None:
            return None
        return clipped(self.statistics.normalized(score) if self.config.normalize else score, self.config.clip)


class Scorer:
    """All rewards of a run. Lives in the driver's process and event loop; `start` first, `close` always."""

    def __init__(
        self, configs: Sequence[RewardConfig], *, base_dir: Path, run_id: str, cpus_per_replica: float = 0.1
    ) -> None:
        """`base_dir`: relative paths count from there. `cpus_per_replica`: what Ray sets aside for each replica (the
        threads of a model are its own `threads`). UserError: two rewards of one name."""
        self._base_dir = base_dir
        self._rewards = [
            _Reward(name=name, config=config, source=make_source(config, name=name, base_dir=base_dir))
            for name, config in zip(reward_names(configs), configs, strict=True)
        ]
        self._apps = RewardApps(prefix=f"rlhf-{run_id}", cpus_per_replica=cpus_per_replica)

    async def start(self, *, deadline_s: float) -> None:
        """Start all rewards, and try every model and function.

        Raises:
            UserError: a file, function or model that cannot be used; all of them.
            RoleError: not ready by the deadline, with what was still missing.
        """
        if problems := validate_rewards([reward.config for reward in self._rewards], self._base_dir):
            raise UserError(problems)
        try:
            async with asyncio.timeout(deadline_s):
                await self._start()
        except TimeoutError:
            message = f"not ready within {deadline_s:g} s: {self._apps.states()}"
            await self.close()
            raise RoleError(role="reward", rank=0, phase="start", kind="TimeoutError", message=message) from None
        except BaseException:
            await self.close()
            raise

    async def score(self, request: ScoreRequest) -> GroupScores:
        """The scores of one group; a failed one is None, with its cause among the failures."""
        rows = await asyncio.gather(*(self._answers(reward, request) for reward in self._rewards))
        raw = {reward.name: tuple(a.value for a in row) for reward, row in zip(self._rewards, rows, strict=True)}
        trained = [[reward.trained(score) for score in raw[reward.name]] for reward in self._rewards]
        failures = [
            ScoreFailure(reward.name, str(answer.cause))
            for reward, row in zip(self._rewards, rows, strict=True)
            for answer in row
            if answer.value is None
        ]
        return GroupScores(
            rewards=raw,
            reward=weighted_sum(trained, [reward.config.weight for reward in self._rewards]),
            failures=tuple(failures),
        )

    def end_step(self, rewards: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """Take the raw scores of a step's groups into the running statistics of `normalize`.

        Within a step the statistics stay as they are, so that a group's reward does not depend on which group was
        finished first; scores of evaluations are never given.
        """
        for reward in self._rewards:
            if reward.config.normalize:
                scores = [score for group in rewards for score in group[reward.name] if score is not None]
                reward.statistics = reward.statistics.updated(scores)

    def state(self) -> dict[str, Any]:
        """The running statistics of every reward with `normalize`, by name; plain JSON."""
        return {reward.name: reward.statistics.state() for reward in self._rewards if reward.config.normalize}

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back; ValueError where it is not of the same rewards."""
        normalized = [reward for reward in self._rewards if reward.config.normalize]
        if set(state) != {reward.name for reward in normalized}:
            wanted = sorted(reward.name for reward in normalized)
            raise ValueError(f"the state holds statistics of the rewards {sorted(state)}, but {wanted} are normalized")
        for reward in normalized:
            reward.statistics = RunningNormalizer.from_state(state[reward.name])

    async def close(self, *, end_service: bool = True) -> None:
        """End what `start` began; Serve itself only if this Scorer started it and no other run uses it.

        Without `end_service` the service is left to the end of the Ray instance: ending it takes seconds.
        """
        for reward in self._rewards:
            await reward.source.close()
        if end_service:
            await self._apps.remove()

    async def _start(self) -> None:
        starting = [asyncio.ensure_future(reward.source.start(self._apps)) for reward in self._rewards]
        try:
            found = await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
        if problems := [Problem(f"rewards.{i}", wrong) for i, wrong in enumerate(found) if wrong]:
            raise UserError(problems)

    async def _answers(self, reward: _Reward, request: ScoreRequest) -> list[Answer]:
        n = len(request.completions)
        if refusal := reward.breaker.refusal():
            return unscored(refusal, n)
        cause = ""
        for attempt in range(reward.config.retries + 1):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                answers = await self._ask(reward, request)
            except PassingError as error:
                cause = str(error)
                continue
            except Exception as error:  # noqa: BLE001 — the boundary to the rewards: recorded as the group's failure
                cause = last_line(error)
                break
            reward.breaker.succeeded()
            return [_usable(answer) for answer in answers]
        reward.breaker.failed(cause)
        return unscored(cause, n)

    async def _ask(self, reward: _Reward, request: ScoreRequest) -> list[Answer]:
        calls = len(request.completions) if reward.source.pace.per_completion else 1
        reward.waiting += calls
        limit = reward.limit_s()
        try:
            async with asyncio.timeout(limit):
                return await reward.source.score(request)
        except TimeoutError:
            raise RewardError(f"no answer within {limit:g} s") from None
        finally:
            reward.waiting -= calls


def _usable(answer: Answer) -> Answer:
    if answer.value is None or (math.isfinite(answer.value) and abs(answer.value) <= LARGEST):
        return answer
    return Answer(None, f"the score is {answer.value}; expected a finite number within float32")
