"""A browser's page with what it did wrong: requests of other servers, errors in the console."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page

WAIT = 30_000  # ms until something that is waited for must be there; on a busy machine too


class Watched:
    """A page with what it did wrong."""

    def __init__(self, page: Page, base: str) -> None:
        self.page, self.base = page, base
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.expected: list[str] = []  # parts of errors that a test provokes
        page.set_default_timeout(WAIT)
        page.set_default_navigation_timeout(WAIT)
        page.on("request", lambda request: None if request.url.startswith(base) else self.foreign.append(request.url))
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def open(self, address: str = "#/runs") -> Page:
        self.page.goto(f"{self.base}/{address}")
        return self.page

    def check(self) -> None:
        assert self.foreign == []
        assert [error for error in self.errors if not any(part in error for part in self.expected)] == []


Open = Callable[..., Watched]
