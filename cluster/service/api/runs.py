"""Routes of the runs: make, list, show, stop, resume, clone, delete, diagnose."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from cluster.service.api.dependencies import AppStateDep, RunId
from cluster.service.api.run_details import diagnosis, run_details
from cluster.service.exceptions import InvalidRequestError, ServiceError
from cluster.service.queue import placed
from cluster.service.run_creation import (
    changed_config,
    check_tree,
    create,
    differences,
    make_plan,
)
from cluster.service.run_view import Run, matching, view
from cluster.service.schemas import Clone, PlanAnswer, RunAnswer, RunDetails, RunList
from cluster.service.state import AppState
from cluster.service.vetting import redacted

State = Literal["queued", "running", "paused", "succeeded", "failed", "stopped", "unreadable"]

router = APIRouter(prefix="/runs")


class ListQuery(BaseModel):
    """Which runs."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=50, ge=1, le=1000)
    after: str | None = Field(default=None, max_length=100)
    state: list[State] = []
    q: str = Field(default="", max_length=500)


IdempotencyKey = Annotated[str | None, Header(max_length=255)]


@router.post("", status_code=201, responses={200: {"model": RunAnswer}})
async def make(
    parts: AppStateDep,
    tree: Annotated[dict[str, Any], Body(description="A config; GET /api/v1/schema/config has its schema.")],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> RunAnswer:
    """Put a new run into the queue."""
    check_tree(tree)
    run, new = await create(parts, tree, key=idempotency_key)
    response.status_code = 201 if new else 200
    return RunAnswer(run=run)


@router.get("")
async def listed(parts: AppStateDep, query: Annotated[ListQuery, Query()]) -> RunList:
    """Runs, newest first."""
    return await asyncio.to_thread(_page, parts, query)


@router.get("/{run_id}")
async def one(parts: AppStateDep, run_id: RunId) -> RunDetails:
    """One run with the contents of its directory."""
    return await asyncio.to_thread(run_details, parts, run_id)


@router.delete("/{run_id}", status_code=204)
async def delete(parts: AppStateDep, run_id: RunId, confirm: Annotated[str, Query(max_length=100)] = "") -> None:
    """Remove a run's directory; the id must be given twice."""
    if confirm != run_id:
        raise InvalidRequestError("confirm: give the run's id, as this cannot be undone")
    await parts.queue.delete(parts.runs.directory(run_id))


@router.post("/{run_id}/stop", status_code=202)
async def stop(parts: AppStateDep, run_id: RunId) -> RunAnswer:
    """Save a checkpoint and end."""
    await parts.queue.ask(parts.runs.directory(run_id), "stop")
    return RunAnswer(run=parts.runs.show(run_id))


@router.post("/{run_id}/pause", status_code=202)
async def pause(parts: AppStateDep, run_id: RunId) -> RunAnswer:
    """Save a checkpoint and give the resources back until a resume."""
    await parts.queue.ask(parts.runs.directory(run_id), "pause")
    return RunAnswer(run=parts.runs.show(run_id))


@router.post("/{run_id}/resume", status_code=202)
async def resume(parts: AppStateDep, run_id: RunId) -> RunAnswer:
    """Continue from the newest checkpoint."""
    directory = parts.runs.directory(run_id)
    await parts.queue.resume(directory)
    return RunAnswer(run=view(directory))


@router.post("/{run_id}/clone", status_code=201, responses={200: {"model": RunAnswer}})
async def clone(
    parts: AppStateDep,
    run_id: RunId,
    response: Response,
    wanted: Clone | None = None,
    idempotency_key: IdempotencyKey = None,
) -> RunAnswer:
    """A new run with this one's config and some changes."""
    wanted = wanted or Clone()
    source, tree = changed_config(parts, run_id, wanted.changes, wanted.name)
    run, new = await create(parts, tree, key=idempotency_key, trusted=source)
    response.status_code = 201 if new else 200
    return RunAnswer(run=run)


@router.post("/{run_id}/clone/plan")
async def clone_plan(parts: AppStateDep, run_id: RunId, wanted: Clone | None = None) -> PlanAnswer:
    """What a clone would do."""
    wanted = wanted or Clone()
    source, tree = changed_config(parts, run_id, wanted.changes, wanted.name)
    plan = await make_plan(parts, tree, gpus=None, trusted=source)
    changes = differences(source, plan.config or tree)
    return plan.model_copy(update={"config": redacted(plan.config), "yaml": redacted(plan.yaml), "changes": changes})


@router.get("/{run_id}/diagnosis")
async def diagnosed(parts: AppStateDep, run_id: RunId) -> dict[str, Any]:
    """The doctor's findings."""
    return await asyncio.to_thread(diagnosis, parts, run_id)


def _page(parts: AppState, query: ListQuery) -> RunList:
    waiting = parts.queue.waiting()
    every: list[Run] = []
    for run_id in parts.runs.ids():
        try:
            every.append(placed(parts.runs.show(run_id), waiting))
        except ServiceError:
            continue  # deleted meanwhile
    found = matching(every, states=query.state, text=query.q)
    rest = [run for run in found if query.after is None or run.id < query.after]
    return RunList(
        runs=rest[: query.limit],
        total=len(found),
        next=rest[query.limit - 1].id if len(rest) > query.limit else None,
        counts=dict(Counter(run.state for run in every)),
    )
