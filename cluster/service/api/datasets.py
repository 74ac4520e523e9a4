"""Routes beside the runs: health, what is allowed, cluster, schema, plan, datasets, models."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi import Path as InPath
from starlette.requests import ClientDisconnect

from cluster.config.run import RunConfig
from cluster.models.catalog import Kind
from cluster.models.object_store import is_address
from cluster.service.api.dependencies import AppStateDep
from cluster.service.api.disconnect import while_connected
from cluster.service.data.datasets import suffix_of
from cluster.service.data.uploads import Upload, receive_file
from cluster.service.exceptions import ConflictError, InvalidRequestError, MalformedError
from cluster.service.remote_catalog import outlines
from cluster.service.run_creation import check_tree, make_plan, uses
from cluster.service.schemas import (
    ClusterInfo,
    DatasetAnswer,
    DatasetList,
    Health,
    LengthsAnswer,
    ModelList,
    PlanAnswer,
    RewardFunction,
    ServiceInfo,
    Waiting,
)
from cluster.service.settings import Settings
from cluster.service.vetting import model_problem
from cluster.service.workers.messages import CheckWork, RowsWork

CHECK_S, ROWS_S = 1800.0, 60.0
_MOST_FUNCTIONS, _LONGEST_SOURCE = 500, 1 << 20

router = APIRouter()
DatasetId = Annotated[str, InPath(max_length=100)]
Tree = Annotated[dict[str, Any], Body(description="A config; GET /api/v1/schema/config has its schema.")]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.get("/health")
async def health(parts: AppStateDep) -> Health:
    """Whether the service is there; needs no token."""
    return Health(version=version("rlhf-online"), token_required=parts.settings.token_sha256 is not None)


@router.get("/service")
async def service(parts: AppStateDep) -> ServiceInfo:
    """What the operator allows."""
    settings = parts.settings
    return ServiceInfo(
        version=version("rlhf-online"),
        root=str(settings.root),
        model_roots=_model_roots(settings),
        data_roots=list(settings.data_roots),
        upload_limit_bytes=settings.max_upload_bytes,
        max_concurrent_runs=settings.max_concurrent_runs,
        reward_functions=await asyncio.to_thread(_reward_functions, settings.reward_roots),
    )


@router.get("/cluster")
async def cluster(parts: AppStateDep) -> ClusterInfo:
    """Resources, and which runs go and wait."""
    status = await parts.cluster.status()
    waiting = [Waiting(id=run, **place.model_dump()) for run, place in parts.queue.waiting().items()]
    return ClusterInfo(
        state=status.state,
        message=status.message,
        address=parts.cluster.address,
        nodes=status.nodes,
        resources=dict(status.resources),
        running=parts.queue.going(),
        queue=waiting,
    )


@cache
def _schema() -> tuple[bytes, str]:
    text = json.dumps(RunConfig.model_json_schema()).encode()
    return text, f'"{hashlib.sha256(text).hexdigest()[:32]}"'


@router.get("/schema/config", response_model=dict[str, Any])
async def config_schema(request: Request) -> Response:
    """The config's JSON schema."""
    text, tag = _schema()
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(text, media_type="application/json", headers={"ETag": tag})


@router.post("/plan")
async def plan(parts: AppStateDep, tree: Tree, gpus: bool | None = None) -> PlanAnswer:
    """What a config would do, and everything that is wrong with it."""
    check_tree(tree)
    return await make_plan(parts, tree, gpus=gpus)


@router.get("/models")
async def models(parts: AppStateDep, kind: Kind | None = None) -> ModelList:
    """The models that were found."""
    (found, truncated), (stored, more, problems) = await asyncio.gather(
        asyncio.to_thread(parts.models.find), asyncio.to_thread(parts.stored_models.find)
    )
    wanted = [model for model in (*found, *stored) if kind is None or model.kind == kind]
    roots = _model_roots(parts.settings)
    return ModelList(models=wanted, roots=roots, truncated=truncated or more, problems=problems)


def _model_roots(settings: Settings) -> list[str]:
    return [*map(str, settings.model_roots), *settings.model_stores]


@router.post("/datasets", status_code=201, openapi_extra=_FORM)
async def upload(parts: AppStateDep, request: Request) -> DatasetAnswer:
    """Take a prompts file, and say what it is."""
    datasets, limit = parts.datasets, parts.settings.max_upload_bytes
    coming = Upload(request.headers.get("content-type", ""), _announced_size(request), _chunks(request))
    partial = await asyncio.to_thread(datasets.begin)
    try:
        with datasets.room_for(coming.size, limit=limit) as room:
            name, _ = await receive_file(coming, partial / "upload", limit=room, check_name=suffix_of)
            file = datasets.name_file(partial, partial / "upload", name)
            checking = parts.checker.call(CheckWork(path=str(file)), deadline_s=CHECK_S)
            report = await while_connected(request, checking)
            return datasets.finish(partial, file, name, report)
    finally:
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)


def _announced_size(request: Request) -> int | None:
    """The bytes that an upload announces, with the form's own; None if it does not."""
    length = request.headers.get("content-length", "")
    return int(length[:20]) if length.isascii() and length.isdigit() else None


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise MalformedError("the upload was cut off") from None


@router.get("/datasets")
async def datasets(
    parts: AppStateDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> DatasetList:
    """Uploaded files, newest first."""
    return await asyncio.to_thread(parts.datasets.list, limit=limit, after=after)


@router.get("/datasets/{dataset_id}")
async def dataset(
    parts: AppStateDep,
    dataset_id: DatasetId,
    rows: Annotated[int, Query(ge=0, le=200)] = 0,
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
) -> DatasetAnswer:
    """One file's report, and some of its rows."""
    found = parts.datasets.get(dataset_id)
    shown: list[dict[str, Any]] = []
    if rows:
        shown = await parts.reader.call(RowsWork(path=found.path, count=rows, offset=offset), deadline_s=ROWS_S)
    return found.model_copy(update={"rows": shown})


@router.get("/datasets/{dataset_id}/lengths")
async def lengths(
    parts: AppStateDep,
    request: Request,
    dataset_id: DatasetId,
    model: Annotated[str, Query(min_length=1, max_length=4096)],
    max_prompt_tokens: Annotated[int, Query(ge=1, le=10_000_000)] = 1024,
) -> LengthsAnswer:
    """The prompts' lengths in a model's tokens."""
    found = parts.datasets.get(dataset_id)
    if problem := model_problem(model, parts.settings):
        raise InvalidRequestError(f"model: {problem}")
    if is_address(model):
        model = (await outlines(parts.planner, {"model": model}, parts.settings))[model]
    counting = parts.lengths.count(found.path, model=model, max_prompt_tokens=max_prompt_tokens)
    report = await while_connected(request, counting)
    if report.lengths is None:
        raise ConflictError("the file cannot be read to its end; its report says why")
    return LengthsAnswer(problems=report.problems, problems_total=report.problems_total, **report.lengths.model_dump())


@router.delete("/datasets/{dataset_id}", status_code=204)
async def delete_dataset(parts: AppStateDep, dataset_id: DatasetId) -> None:
    """Remove an upload."""
    found = parts.datasets.get(dataset_id)
    if (run := await asyncio.to_thread(uses, parts, found.path)) is not None:
        raise ConflictError(f"run {run} uses it and has not ended")
    await asyncio.to_thread(parts.datasets.delete, dataset_id)


def _reward_functions(roots: tuple[Path, ...]) -> list[RewardFunction]:
    """The public functions of the allowed files, read, never run."""
    found: list[RewardFunction] = []
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            if file.is_file() and file.resolve().is_relative_to(root) and file.stat().st_size <= _LONGEST_SOURCE:
                found += _functions(file)
    return found[:_MOST_FUNCTIONS]


def _functions(file: Path) -> Iterator[RewardFunction]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            doc = (ast.get_docstring(node) or "").split("\n\n")[0]
            yield RewardFunction(path=f"{file}:{node.name}", name=node.name, doc=" ".join(doc.split()))
