"""Permissions for one download each, for links that cannot carry a token. It knows paths and a clock."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic


@dataclass(slots=True)
class Tickets:
    """Permissions for one download each, for links that can carry no token."""

    seconds: float = 60.0
    clock: Callable[[], float] = monotonic
    _open: dict[str, tuple[str, float]] = field(default_factory=dict)

    def issue(self, path: str) -> str:
        """A ticket for one GET of this path."""
        now = self.clock()
        self._open = {ticket: entry for ticket, entry in self._open.items() if entry[1] > now}
        ticket = secrets.token_urlsafe(32)
        self._open[ticket] = (path, now + self.seconds)
        return ticket

    def redeem(self, path: str, ticket: str) -> bool:
        """Whether the ticket is good for the path; it is used up."""
        wanted, until = self._open.pop(ticket, ("", 0.0))
        return wanted == path and until > self.clock()
