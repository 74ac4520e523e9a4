"""Routes of what a run has recorded: curves, samples, logs, events, its model, and a chat with it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse
from starlette.responses import JSONResponse, StreamingResponse

from cluster.models.remote import as_run
from cluster.service.api.dependencies import AppStateDep, RunId
from cluster.service.api.streaming import chat_events, chat_work, run_events, stream
from cluster.service.exceptions import BusyError, NotFoundError
from cluster.service.results.downloads import archive, archive_size, list_logs, tail
from cluster.service.results.metrics import columns, select, step_of, tag
from cluster.service.results.samples import Kind, SampleTokens, find_samples, sample_tokens
from cluster.service.results.samples import Query as SampleQuery
from cluster.service.run_creation import config_of
from cluster.service.schemas import ChatRequest, LogAnswer, Ticket
from cluster.service.settings import PREFIX
from cluster.service.state import AppState
from trainers.adapter_folder import tokenizer_source

_MOST_STEPS = 1 << 53

router = APIRouter(prefix="/runs/{run_id}")


class MetricsQuery(BaseModel):
    """Which steps and which metrics."""

    model_config = ConfigDict(extra="forbid")

    since: int | None = Field(default=None, ge=-1, lt=_MOST_STEPS)
    keys: list[str] = Field(default=[], max_length=200)
    points: int = Field(default=0, ge=0, le=1_000_000)
    format: Literal["rows", "columns"] = "rows"


class SamplesQuery(BaseModel):
    """Which samples, in which order."""

    model_config = ConfigDict(extra="forbid")

    step: int | None = Field(default=None, ge=0, lt=_MOST_STEPS)
    kind: Kind = "step"
    q: str = Field(default="", max_length=500)
    group: int | None = Field(default=None, ge=-(1 << 62), lt=1 << 62)
    sort: str = Field(default="group", max_length=100)
    order: Literal["asc", "desc"] = "asc"
    limit: int = Field(default=50, ge=1, le=1000)
    offset: int = Field(default=0, ge=0, lt=1 << 31)


class TokensQuery(BaseModel):
    """Which sample's tokens."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(ge=0, lt=_MOST_STEPS)
    sample: str = Field(max_length=500)
    kind: Kind = "step"


@router.get("/metrics", response_model=dict[str, Any])
async def metrics(
    parts: AppStateDep, request: Request, run_id: RunId, query: Annotated[MetricsQuery, Query()]
) -> Response:
    """Metrics by step."""
    path = parts.runs.directory(run_id).metrics
    etag = tag(path)
    headers = {"ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)

    def answer() -> Response:
        rows = parts.metrics.read(path)
        chosen = select(rows, since=query.since, keys=query.keys, points=query.points)
        shown = columns(chosen) if query.format == "columns" else {"metrics": chosen}
        return JSONResponse({**shown, "last": step_of(rows[-1]) if rows else None, "total": len(rows)}, headers=headers)

    return await asyncio.to_thread(answer)


@router.get("/events", response_class=EventSourceResponse)
async def events(
    parts: AppStateDep,
    run_id: RunId,
    since: Annotated[int | None, Query(ge=-1, lt=_MOST_STEPS)] = None,
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> EventSourceResponse:
    """The run's changes and metrics as they come."""
    directory = parts.runs.directory(run_id)
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
        since = int(last_event_id)
    return stream(run_events(parts, directory, since))


@router.get("/samples")
async def samples(parts: AppStateDep, run_id: RunId, query: Annotated[SamplesQuery, Query()]) -> dict[str, Any]:
    """A page of one step's samples."""
    wanted = SampleQuery(
        kind=query.kind,
        step=query.step,
        text=query.q,
        group=query.group,
        sort=query.sort,
        descending=query.order == "desc",
        limit=query.limit,
        offset=query.offset,
    )
    return asdict(await asyncio.to_thread(find_samples, parts.runs.directory(run_id).rollouts, wanted))


@router.get("/samples/tokens")
async def tokens(parts: AppStateDep, run_id: RunId, query: Annotated[TokensQuery, Query()]) -> dict[str, Any]:
    """One sample's tokens with their log-probabilities."""
    return asdict(await asyncio.to_thread(_tokens, parts, run_id, query))


def _tokens(parts: AppState, run_id: str, query: TokensQuery) -> SampleTokens:
    directory = parts.runs.directory(run_id)
    _, config = config_of(directory)
    folders = [directory.model]
    if config is not None:
        folders.append(Path(tokenizer_source(as_run(config, directory).policy.model)))
    tokenizer = next((file for folder in folders if (file := folder / "tokenizer.json").is_file()), None)
    return sample_tokens(
        directory.rollouts, kind=query.kind, step=query.step, sample_id=query.sample, tokenizer=tokenizer
    )


@router.get("/logs")
async def logs(
    parts: AppStateDep,
    run_id: RunId,
    file: Annotated[str | None, Query(max_length=500)] = None,
    lines: Annotated[int, Query(ge=1, le=5000)] = 500,
) -> LogAnswer:
    """The log files, and the end of one."""
    folder = parts.runs.directory(run_id).logs
    found: dict[str, Any] = {"files": await asyncio.to_thread(list_logs, folder)}
    if file is not None:
        found |= await asyncio.to_thread(tail, folder, file, lines=lines)
    return LogAnswer.model_validate(found)


@router.get("/model", response_class=StreamingResponse)
async def model(
    parts: AppStateDep, run_id: RunId, ticket: Annotated[str | None, Query(max_length=100)] = None
) -> StreamingResponse:
    """The trained model as a tar archive; a link carries a ticket instead of the token."""
    folder = _model_folder(parts, run_id)
    headers = {
        "Content-Length": str(await asyncio.to_thread(archive_size, folder, run_id)),
        "Content-Disposition": f'attachment; filename="{run_id}.tar"',
    }
    return StreamingResponse(archive(folder, run_id), media_type="application/x-tar", headers=headers)


@router.post("/model/ticket")
async def model_ticket(parts: AppStateDep, run_id: RunId) -> Ticket:
    """A link for one download."""
    _model_folder(parts, run_id)
    path = f"{PREFIX}/runs/{run_id}/model"
    return Ticket(url=f"{path}?ticket={parts.tickets.issue(path)}", seconds=int(parts.tickets.seconds))


def _model_folder(parts: AppState, run_id: str) -> Path:
    folder = parts.runs.directory(run_id).model
    if not folder.is_dir() or folder.is_symlink():
        raise NotFoundError("the run has no model yet")
    return folder


@router.post("/chat", response_class=EventSourceResponse)
async def chat(parts: AppStateDep, run_id: RunId, asked: ChatRequest) -> EventSourceResponse:
    """Answers of the trained model and of its base."""
    work = chat_work(parts, run_id, asked)
    if parts.chat_worker.busy:
        raise BusyError("another conversation is being answered; try again in a moment")
    return stream(chat_events(parts, work))
