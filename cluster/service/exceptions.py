"""Why the service does not do what it was asked: domain errors, which know nothing of HTTP.

`errors.py` gives each its status, in one place. A `UserError`, or a subclass, is about what the user wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from trainers.errors import Problem


class ServiceError(Exception):
    """The base of them all: a code for programs, a message for people, and single fields where they are at fault."""

    code: ClassVar[str]

    def __init__(self, message: str, *, details: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)


class MalformedError(ServiceError):
    """What came cannot be read as what it claims to be, or broke off."""

    code = "bad_request"


class NotFoundError(ServiceError):
    """There is nothing of this name."""

    code = "not_found"


class ConflictError(ServiceError):
    """The state of a run or a file forbids it."""

    code = "conflict"


class TooLargeError(ServiceError):
    """More than there is room for, or than the operator allows."""

    code = "too_large"


class UnsupportedFormatError(ServiceError):
    """Not a format that the service reads."""

    code = "unsupported_media_type"


class InvalidRequestError(ServiceError):
    """A parameter that cannot be used."""

    code = "invalid_request"


class InvalidConfigError(ServiceError):
    """A config that cannot be used, with every problem.

    >>> InvalidConfigError([Problem("train.steps", "expected 1 or more")]).message
    '1 problem found'
    """

    code = "invalid_config"

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = tuple(problems)
        super().__init__(f"{len(found)} problem{'' if len(found) == 1 else 's'} found", details=found)


class BusyError(ServiceError):
    """Others are being served; it works in a moment."""

    code = "busy"


class DeadlineError(ServiceError):
    """It took too long, or ended without an answer."""

    code = "deadline"


class StorageError(ServiceError):
    """A stored file is damaged."""

    code = "storage"


class InternalError(ServiceError):
    """Our fault; the log has the cause."""

    code = "internal"

    def __init__(self) -> None:
        super().__init__("something is wrong with the service itself; its log says what")


def printable(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate from a client's JSON is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
