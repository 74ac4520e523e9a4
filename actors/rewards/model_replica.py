"""The Ray Serve replica of a reward model: batches by tokens over all groups that wait.

It knows asyncio; torch and transformers are imported in the replica's process only, when the model is loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.rewards.config import ModelReward
from actors.rewards.score import Answer, RewardError, unscored
from trainers.errors import UserError
from trainers.types import Prompt

if TYPE_CHECKING:
    from actors.rewards.model import RewardModel


@dataclass(slots=True)
class _Waiting:
    """A group that waits for its scores."""

    chats: list[list[int]]
    scores: asyncio.Future[list[float]]

    @property
    def tokens(self) -> int:
        return sum(len(chat) for chat in self.chats)


class ModelReplica:
    """The model as a Ray Serve deployment: while one batch is scored, the next one gathers."""

    def __init__(self, config: ModelReward) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1)  # torch's number of threads is a thread's own
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._wrong: str | None = None
        try:
            self._model: RewardModel | None = self._thread.submit(_load, config).result()
        except UserError as error:  # reported by `check`; if it were raised here, Serve would only try again
            self._model, self._wrong = None, error.problems[0].message

    async def check(self) -> str | None:
        """What is wrong with the model, if anything."""
        return self._wrong

    def check_health(self) -> None:
        """For Serve, which restarts a replica whose batching has died."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError(f"batching has ended: {self._worker}")

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Answer]:
        """An answer for each completion."""
        if self._model is None:
            return unscored(str(self._wrong), len(completions))
        encoded = [self._model.encode(prompt, completion) for completion in completions]
        waiting = _Waiting([e for e in encoded if isinstance(e, list)], asyncio.get_running_loop().create_future())
        if waiting.chats:
            self._queue.put_nowait(waiting)
            self._worker = self._worker or asyncio.create_task(self._run(self._model))
            try:
                scores = iter(await waiting.scores)
            except RewardError as error:
                return unscored(str(error), len(completions))
        return [e if isinstance(e, Answer) else Answer(next(scores)) for e in encoded]

    async def _run(self, model: RewardModel) -> None:
        loop = asyncio.get_running_loop()
        while True:
            groups = [group for group in await self._gather() if not group.scores.done()]  # done: the caller left
            chats = [chat for group in groups for chat in group.chats]
            try:
                scores = await loop.run_in_executor(self._thread, model.score, chats)
            except (RuntimeError, ValueError, IndexError) as error:  # out of memory, a token that the model lacks
                for group in groups:
                    if not group.scores.done():
                        group.scores.set_exception(RewardError(f"{self._config.model}: {error}"))
                continue
            rest = iter(scores)
            for group in groups:
                own = [next(rest) for _ in group.chats]
                if not group.scores.done():
                    group.scores.set_result(own)

    async def _gather(self) -> list[_Waiting]:
        """Groups up to the token budget: what waits already, and what comes within the waiting time."""
        groups = [await self._queue.get()]
        tokens = groups[0].tokens
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.max_wait_ms / 1000
        while tokens < self._config.max_batch_tokens:
            try:
                async with asyncio.timeout_at(deadline):
                    group = await self._queue.get()
            except TimeoutError:
                break
            groups.append(group)
            tokens += group.tokens
        return groups


def _load(config: ModelReward) -> RewardModel:
    from actors.rewards.model import RewardModel  # ten seconds that a driver can do without

    return RewardModel(config)
