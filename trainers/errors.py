"""Errors that a user can fix. The command line prints them without a traceback and exits with 2.

It imports nothing else of the project, so that every layer may raise and catch them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where (a config path, or file and line), what, and what to do about it."""

    where: str
    message: str


class UserError(ValueError):
    """Input or config that cannot be used; carries every problem found, not only the first.

    >>> print(UserError([Problem("data.prompts", "no such file: p.jsonl")]))
    data.prompts: no such file: p.jsonl
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{p.where}: {p.message}" for p in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        return (type(self), (self.problems,))
