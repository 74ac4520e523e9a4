"""A circuit breaker: a reward that fails again and again is left alone for a while instead of being waited for.

It knows nothing of what it guards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 5
REST_S = 30.0


class Breaker:
    """Opens after `failures` failures in a row, and lets one trial through after each rest of `rest_s` seconds.

    >>> now = 0.0
    >>> breaker = Breaker(failures=2, rest_s=10, clock=lambda: now)
    >>> breaker.failed("refused"), breaker.refusal()
    (None, None)
    >>> breaker.failed("refused"), breaker.refusal()
    (None, 'left alone for 10 s after 2 failures in a row, the last: refused')
    >>> now = 10.0
    >>> breaker.refusal(), breaker.refusal() is not None  # one trial, the others wait for how it ends
    (None, True)
    >>> breaker.succeeded(), breaker.refusal()
    (None, None)
    """

    def __init__(
        self, *, failures: int = FAILURES, rest_s: float = REST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._rest_s, self._clock = failures, rest_s, clock
        self._in_a_row = 0
        self._open_until = 0.0
        self._last = ""

    def refusal(self) -> str | None:
        """Why a call must not be made now; None: make it, and report how it went."""
        if self._in_a_row < self._limit:
            return None
        now = self._clock()
        if now >= self._open_until:
            self._open_until = now + self._rest_s
            return None
        return f"left alone for {self._rest_s:g} s after {self._in_a_row} failures in a row, the last: {self._last}"

    def failed(self, cause: str) -> None:
        """A call failed in a way that the next one is likely to share."""
        self._in_a_row += 1
        self._last = cause
        if self._in_a_row >= self._limit:
            self._open_until = self._clock() + self._rest_s

    def succeeded(self) -> None:
        """A call was answered."""
        self._in_a_row = 0
