"""What routes take beside their own parameters: the parts of the service, and a run's id."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fastapi import Depends, Path, Request

from cluster.service.run_view import ID
from cluster.service.state import AppState

RunId: TypeAlias = Annotated[str, Path(pattern=f"^{ID}$")]


def _app_state(request: Request) -> AppState:
    found = request.app.state.parts
    assert isinstance(found, AppState)
    return found


AppStateDep: TypeAlias = Annotated[AppState, Depends(_app_state)]
