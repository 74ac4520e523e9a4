"""What pydantic found wrong, as a type: one entry for each place. It knows the shape of pydantic's errors only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that pydantic refused.

    >>> from pydantic import TypeAdapter, ValidationError
    >>> try:
    ...     _ = TypeAdapter(list[int]).validate_python([1, "x"])
    ... except ValidationError as error:
    ...     [(found.path, found.kind, found.given) for found in field_errors(error.errors())]
    [('1', 'int_parsing', 'x')]
    """

    location: tuple[str | int, ...]  # keys, numbers in a list, and tags of unions
    kind: str  # pydantic's name for it
    message: str
    given: Any

    @property
    def path(self) -> str:
        """The location, dotted."""
        return ".".join(map(str, self.location))


def field_errors(details: Iterable[Any]) -> list[FieldError]:
    """Of what the `errors()` of a ValidationError returns."""
    return [FieldError(detail["loc"], detail["type"], detail["msg"], detail.get("input")) for detail in details]
