"""What a kind of reward is to the rest of the program. Each kind has a file of its own and a line in `catalog.SOURCES`.

Importing it loads no engine: the plan checks every source before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainers.errors import Problem

if TYPE_CHECKING:
    from actors.messages import ScoreRequest
    from actors.rewards.ray_serve import RewardApps
    from actors.rewards.score import Answer

SLACK_S = 1.0  # a client's own time limit comes first and its message explains more


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many calls a source works on at once, and what a group costs: the scorer's time limits come from it."""

    parallel: int = 1
    slack_s: float = SLACK_S  # beside the config's timeout_s
    per_completion: bool = False  # one call for each completion, not one for the group


class RewardSource(Protocol):
    """One reward of a run. `start` comes first, `close` always."""

    @property
    def pace(self) -> Pace:
        """See `Pace`."""
        ...

    def check(self) -> Problem | None:
        """What can be found wrong before anything starts; `where` is the key within the reward's config."""
        ...

    async def start(self, apps: RewardApps) -> str | None:
        """Make ready to score, on Ray Serve by `apps` or without it; what is wrong with the user's input, if anything.

        Raises:
            RoleError: it cannot start for another reason.
        """
        ...

    async def score(self, request: ScoreRequest) -> list[Answer]:
        """An answer for each completion, in order.

        Raises:
            PassingError: no completion could be scored, and another try may help.
            RewardError: no completion could be scored.
        """
        ...

    async def close(self) -> None:
        """Release what `start` took; the applications on Ray Serve are removed by the scorer."""
        ...
