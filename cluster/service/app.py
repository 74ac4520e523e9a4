"""The HTTP application: routes, errors, security, the page, and what lives as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.staticfiles import StaticFiles

from cluster.jobs.ray_cluster import RayCluster
from cluster.models.catalog import Models
from cluster.service import errors
from cluster.service.api import datasets as api_data
from cluster.service.api import results as api_results
from cluster.service.api import runs as api_runs
from cluster.service.api.docs_page import docs_page
from cluster.service.data.datasets import Datasets
from cluster.service.data.lengths import Lengths
from cluster.service.queue import Queue
from cluster.service.remote_catalog import RemoteCatalog
from cluster.service.results.metrics import MetricsReader
from cluster.service.run_view import Runs
from cluster.service.schemas import ErrorAnswer
from cluster.service.security import Attempts, Guard
from cluster.service.settings import PREFIX, Settings
from cluster.service.state import AppState
from cluster.service.tickets import Tickets
from cluster.service.workers.pool import Helper

_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer, "description": "What went wrong."}}


def make_app(settings: Settings, cluster: RayCluster) -> FastAPI:
    """The service over a root and a cluster; it connects to the cluster when it starts, and never waits for it."""
    parts = make_parts(settings, cluster)
    app = FastAPI(
        title="rlhf-online",
        version=version("rlhf-online"),
        description="Online RLHF as a service. docs/service.md says what every answer means.",
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.parts = parts
    errors.install(app)
    for router in (api_data.router, api_runs.router, api_results.router):
        app.include_router(router, prefix=PREFIX, responses=_ERRORS)
    app.add_middleware(Guard, token_sha256=settings.token_sha256, attempts=Attempts(), tickets=parts.tickets)
    _add_pages(app, settings)
    return app


def make_parts(settings: Settings, cluster: RayCluster) -> AppState:
    """Everything that the routes use."""
    runs = Runs(settings.root)
    return AppState(
        settings=settings,
        runs=runs,
        cluster=cluster,
        queue=Queue(runs, cluster, max_concurrent_runs=settings.max_concurrent_runs),
        models=Models(settings.model_roots, settings.root),
        stored_models=RemoteCatalog(settings.model_stores),
        datasets=Datasets(settings.datasets, most=settings.max_uploads_bytes),
        metrics=MetricsReader(),
        tickets=Tickets(),
        lengths=Lengths(settings.root),
        planner=Helper(),
        checker=Helper(),
        reader=Helper(),
        chat_worker=Helper(),
    )


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts: AppState = app.state.parts
    await asyncio.to_thread(parts.datasets.sweep)
    tasks = [asyncio.create_task(parts.cluster.stay_connected()), asyncio.create_task(parts.queue.run())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for helper in (parts.lengths, parts.planner, parts.checker, parts.reader, parts.chat_worker):
            await helper.close()


def _add_pages(app: FastAPI, settings: Settings) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    if (settings.page / "index.html").is_file():
        app.mount("/", StaticFiles(directory=settings.page, html=True), name="page")
        return

    @app.get("/", include_in_schema=False)
    async def no_page() -> PlainTextResponse:
        return PlainTextResponse("rlhf-online: the API is under /api/v1, described at /docs\n")
