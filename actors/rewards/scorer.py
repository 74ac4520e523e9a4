"""The reward service as the driver sees it: asks every reward for a group's scores, and makes the sum of them.

Models and functions run as Ray Serve applications of this run; servers are asked over HTTP from here. A score that
could not be had is None with a cause, never 0 and never an exception. It knows asyncio and the kinds of reward.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.messages import GroupScores, ScoreFailure, ScoreRequest
from actors.rewards.checks import function_file, model_name, validate_rewards
from actors.rewards.circuit_breaker import Breaker
from actors.rewards.config import FunctionReward, HttpReward, ModelReward, RewardConfig, reward_names
from actors.rewards.function_pool import IMPORT_S, FunctionReplica, read_function
from actors.rewards.http import MAX_CONNECTIONS, HttpScorer
from actors.rewards.model_replica import ModelReplica
from actors.rewards.ray_serve import Ask, RewardApps, ServedReward, last_line
from actors.rewards.score import Answer, PassingError, RewardError, unscored
from actors.runtime.actor_group import RoleError
from trainers.errors import Problem, UserError
from trainers.rewards import RunningNormalizer, clipped, weighted_sum

__all__ = ["GroupScores", "ScoreFailure", "ScoreRequest", "Scorer", "validate_rewards"]

BACKOFF_S = 0.25  # before the first further try; doubled for each one after it
SLACK_S = 1.0  # a client's own time limit comes first and says more
LARGEST = 3e38  # the learner's arithmetic is float32


@dataclass(slots=True, kw_only=True)
class _Source:
    """One reward and how it is going."""

    name: str
    config: RewardConfig
    ask: Ask | None = None  # once started
    waiting: int = 0  # calls that it has not answered yet
    breaker: Breaker = field(default_factory=Breaker)
    statistics: RunningNormalizer = field(default_factory=RunningNormalizer)

    def calls(self, n: int) -> int:
        """What n completions cost: functions are called (at most) once for each, models and servers once."""
        return n if isinstance(self.config, FunctionReward) else 1

    def limit_s(self) -> float:
        """Time for the answer to a group that is sent now: its time limit, with what is queued before it."""
        if isinstance(self.config, FunctionReward):
            return IMPORT_S + self.config.timeout_s * max(self.waiting / self.config.workers, 1)
        parallel = self.config.replicas if isinstance(self.config, ModelReward) else MAX_CONNECTIONS
        return SLACK_S + self.config.timeout_s * max(self.waiting / parallel, 1)

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
        self._sources = [
            _Source(name=name, config=config) for name, config in zip(reward_names(configs), configs, strict=True)
        ]
        self._clients: list[HttpScorer] = []
        self._apps = RewardApps(prefix=f"rlhf-{run_id}", cpus_per_replica=cpus_per_replica)

    async def start(self, *, deadline_s: float) -> None:
        """Start all rewards, and try every model and function.

        Raises:
            UserError: a file, function or model that cannot be used; all of them.
            RoleError: not ready by the deadline, with what was still missing.
        """
        if problems := validate_rewards([source.config for source in self._sources], self._base_dir):
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
        rows = await asyncio.gather(*(self._answers(source, request) for source in self._sources))
        raw = {source.name: tuple(a.value for a in row) for source, row in zip(self._sources, rows, strict=True)}
        trained = [[source.trained(score) for score in raw[source.name]] for source in self._sources]
        failures = [
            ScoreFailure(source.name, str(answer.cause))
            for source, row in zip(self._sources, rows, strict=True)
            for answer in row
            if answer.value is None
        ]
        return GroupScores(
            rewards=raw,
            reward=weighted_sum(trained, [source.config.weight for source in self._sources]),
            failures=tuple(failures),
        )

    def end_step(self, rewards: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """Take the raw scores of a step's groups into the running statistics of `normalize`.

        Within a step the statistics stay as they are, so that a group's reward does not depend on which group was
        finished first; scores of evaluations are never given.
        """
        for source in self._sources:
            if source.config.normalize:
                scores = [score for group in rewards for score in group[source.name] if score is not None]
                source.statistics = source.statistics.updated(scores)

    def state(self) -> dict[str, Any]:
        """The running statistics of every reward with `normalize`, by name; plain JSON."""
        return {source.name: source.statistics.state() for source in self._sources if source.config.normalize}

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back; ValueError where it is not of the same rewards."""
        normalized = [source for source in self._sources if source.config.normalize]
        if set(state) != {source.name for source in normalized}:
            wanted = sorted(source.name for source in normalized)
            raise ValueError(f"the state holds statistics of the rewards {sorted(state)}, but {wanted} are normalized")
        for source in normalized:
            source.statistics = RunningNormalizer.from_state(state[source.name])

    async def close(self, *, end_service: bool = True) -> None:
        """End what `start` began; Serve itself only if this Scorer started it and nobody else uses it.

        Without `end_service` the service is left to the end of the whole Ray instance: ending it takes seconds.
        """
        for client in self._clients:
            await client.close()
        self._clients = []
        if end_service:
            await self._apps.remove()

    async def _start(self) -> None:
        served = [source for source in self._sources if not isinstance(source.config, HttpReward)]
        for source in self._sources:
            if isinstance(source.config, HttpReward):
                client = HttpScorer(source.config.url, timeout_s=source.config.timeout_s)
                self._clients.append(client)
                source.ask = client.score
        answers = await self._apps.deploy([self._served(source) for source in served]) if served else []
        problems: list[Problem] = []
        for source, (ask, wrong) in zip(served, answers, strict=True):
            source.ask = ask
            problems += [Problem(f"rewards.{self._sources.index(source)}", wrong)] if wrong else []
        if problems:
            raise UserError(problems)

    def _served(self, source: _Source) -> ServedReward:
        config = source.config
        if isinstance(config, FunctionReward):
            spec = read_function(function_file(config, self._base_dir), config.function, timeout_s=config.timeout_s)
            return ServedReward(source.name, FunctionReplica, (spec, config.workers))
        assert isinstance(config, ModelReward)
        found = config.model_copy(update={"model": model_name(config.model, self._base_dir)})
        return ServedReward(source.name, ModelReplica, (found,), replicas=config.replicas, gpus=config.gpus)

    async def _answers(self, source: _Source, request: ScoreRequest) -> list[Answer]:
        n = len(request.completions)
        if refusal := source.breaker.refusal():
            return unscored(refusal, n)
        cause = ""
        for attempt in range(source.config.retries + 1):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                answers = await self._ask(source, request)
            except PassingError as error:
                cause = str(error)
                continue
            except Exception as error:  # noqa: BLE001 — the boundary to the rewards: recorded as the group's failure
                cause = last_line(error)
                break
            source.breaker.succeeded()
            return [_usable(answer) for answer in answers]
        source.breaker.failed(cause)
        return unscored(cause, n)

    async def _ask(self, source: _Source, request: ScoreRequest) -> list[Answer]:
        assert source.ask is not None, "score before start"
        calls = source.calls(len(request.completions))
        source.waiting += calls
        limit = source.limit_s()
        try:
            async with asyncio.timeout(limit):
                return await source.ask(request.prompt, request.completions)
        except TimeoutError:
            raise RewardError(f"no answer within {limit:g} s") from None
        finally:
            source.waiting -= calls


def _usable(answer: Answer) -> Answer:
    if answer.value is None or (math.isfinite(answer.value) and abs(answer.value) <= LARGEST):
        return answer
    return Answer(None, f"the score is {answer.value}; expected a finite number within float32")
