"""What every kind of reward answers with, and how it fails. It knows the standard library only, so that the process
of a function or of a server's client stays small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """The score of one completion, or why there is none."""

    value: float | None
    cause: str | None = None  # given exactly where value is None


class RewardError(RuntimeError):
    """No completion of a group could be scored; trying again would not help."""


class PassingError(RewardError):
    """No completion of a group could be scored, for a cause that may pass: worth another try."""


def unscored(cause: str, n: int) -> list[Answer]:
    """n answers without a score."""
    return [Answer(None, cause)] * n
