"""What is sent as it happens: a run's changes and metrics, and the pieces of a chat, as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent

from cluster.models.remote import as_run
from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.directory import RunDirectory
from cluster.service.exceptions import ConflictError, InvalidRequestError, NotFoundError, ServiceError
from cluster.service.queue import placed
from cluster.service.results.metrics import step_of
from cluster.service.run_creation import config_of
from cluster.service.run_view import Run, view
from cluster.service.schemas import ChatRequest
from cluster.service.state import AppState
from cluster.service.workers.messages import ChatPiece, ChatWork
from trainers.errors import UserError

POLL_S, PING_S = 0.5, 15
CHAT_S = 120.0
_GOING = ("queued", "running")


def stream(events: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    """A long-lived answer, with a comment now and then so that proxies keep the connection open."""
    return EventSourceResponse(events, ping=PING_S, headers={"Cache-Control": "no-store"})


async def run_events(parts: AppState, directory: RunDirectory, since: int | None) -> AsyncIterator[ServerSentEvent]:
    """A run's changes and every step after `since`, until it has ended (or its directory is gone)."""
    shown: Run | None = None
    last = since
    while True:
        try:
            run, rows = await asyncio.to_thread(_look, parts, directory)
        except (RunDirectoryError, ServiceError):
            yield JSONServerSentEvent({"state": "unreadable"}, event="end")
            return
        if run != shown:
            yield JSONServerSentEvent(run.model_dump(mode="json"), event="run")
            shown = run
        newest = step_of(rows[-1]) if rows else None
        if last is not None and newest is not None and newest < last:
            yield JSONServerSentEvent({"last": newest}, event="reset")
            last = newest
        for row in rows if last is None else rows[bisect_right(rows, last, key=step_of) :]:
            last = step_of(row)
            yield JSONServerSentEvent(row, event="metrics", id=str(last))
        if run.state not in _GOING:
            yield JSONServerSentEvent({"state": run.state}, event="end")
            return
        await asyncio.sleep(POLL_S)


def _look(parts: AppState, directory: RunDirectory) -> tuple[Run, list[dict[str, Any]]]:
    """The run first: what it had recorded when it ended is then among the rows."""
    if not directory.path.is_dir():
        raise NotFoundError("the run is gone")
    run = placed(view(directory), parts.queue.waiting())
    return run, parts.metrics.read(directory.metrics)


def chat_work(parts: AppState, run_id: str, asked: ChatRequest) -> ChatWork:
    """What the worker is asked. Raises ServiceError if there is no model to talk to."""
    directory = parts.runs.directory(run_id)
    if not directory.model.is_dir():
        raise NotFoundError("the run has no model yet")
    histories = {"trained": [turn.model_dump() for turn in asked.trained]}
    models = {"trained": str(directory.model)}
    if asked.base is not None:
        _, config = config_of(directory)
        if config is None:
            raise ConflictError("the run's config cannot be read, so its base is not known")
        histories |= {"base": [turn.model_dump() for turn in asked.base]}
        models |= {"base": as_run(config, directory).policy.model}
    if any(history[-1].role != "user" for history in (asked.trained, asked.base) if history is not None):
        raise InvalidRequestError("each history must end with a user turn")
    return ChatWork(
        models=models,
        histories=histories,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        system=asked.system,
    )


async def chat_events(parts: AppState, work: ChatWork) -> AsyncIterator[ServerSentEvent]:
    """The pieces of the answers; an error is the last event where one comes."""
    try:
        async with contextlib.aclosing(parts.chat_worker.stream(work, deadline_s=CHAT_S)) as answers:
            async for kind, value in answers:
                if kind == "result":
                    break
                yield _chat_event(ChatPiece.model_validate(value))
    except UserError as error:
        problem = error.problems[0]
        yield JSONServerSentEvent({"code": "invalid_request", "message": problem.message}, event="error")
    except ServiceError as error:
        yield JSONServerSentEvent({"code": error.code, "message": error.message}, event="error")
    else:
        yield JSONServerSentEvent({}, event="done")


def _chat_event(piece: ChatPiece) -> ServerSentEvent:
    match piece.kind:
        case "state":
            return JSONServerSentEvent({"message": piece.text}, event="state")
        case "missing":
            return JSONServerSentEvent({"who": piece.who, "message": piece.text}, event="missing")
        case "end":
            return JSONServerSentEvent({"who": piece.who}, event="end")
    return JSONServerSentEvent({"who": piece.who, "text": piece.text}, event="piece")
