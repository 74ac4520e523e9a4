"""The reward source `http`: a server of the user's, asked from the driver's process.

It loads the standard library only until `start`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actors.rewards.config import HttpReward
from actors.rewards.source import Pace

if TYPE_CHECKING:
    from actors.messages import ScoreRequest
    from actors.rewards.http import HttpScorer
    from actors.rewards.ray_serve import RewardApps
    from actors.rewards.score import Answer
    from trainers.errors import Problem

CONNECTIONS = 64  # at once


class HttpSource:
    """Implements `RewardSource`."""

    def __init__(self, config: HttpReward, name: str, base_dir: Path) -> None:
        del name, base_dir  # it has no files, and no application of its own
        self._config = config
        self._client: HttpScorer | None = None

    @property
    def pace(self) -> Pace:
        """See `RewardSource`."""
        return Pace(parallel=CONNECTIONS)

    def check(self) -> Problem | None:
        """See `RewardSource`: the server may be started later."""
        return None

    async def start(self, apps: RewardApps) -> str | None:
        """See `RewardSource`."""
        from actors.rewards.http import HttpScorer

        del apps
        self._client = HttpScorer(self._config.url, timeout_s=self._config.timeout_s, connections=CONNECTIONS)
        return None

    async def score(self, request: ScoreRequest) -> list[Answer]:
        """See `RewardSource`."""
        assert self._client is not None, "score before start"
        return await self._client.score(request.prompt, request.texts)

    async def close(self) -> None:
        """See `RewardSource`."""
        if self._client is not None:
            await self._client.close()
            self._client = None
