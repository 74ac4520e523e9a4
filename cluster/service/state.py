"""What the service is made of, and how a route gets it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from cluster.jobs.ray_cluster import RayCluster
from cluster.models.catalog import Models
from cluster.service.data.datasets import Datasets
from cluster.service.data.lengths import Lengths
from cluster.service.queue import Queue
from cluster.service.remote_catalog import RemoteCatalog
from cluster.service.results.metrics import MetricsReader
from cluster.service.run_view import Runs
from cluster.service.security import Tickets
from cluster.service.settings import Settings
from cluster.service.workers.pool import Helper


@dataclass(frozen=True, slots=True, kw_only=True)
class AppState:
    """What the service is made of; one of each for the app's whole life."""

    settings: Settings
    runs: Runs
    cluster: RayCluster
    queue: Queue
    models: Models
    stored_models: RemoteCatalog
    datasets: Datasets
    metrics: MetricsReader
    tickets: Tickets
    lengths: Lengths
    planner: Helper
    checker: Helper
    reader: Helper
    chat_worker: Helper
    creating: asyncio.Lock = field(default_factory=asyncio.Lock)


def _app_state(request: Request) -> AppState:
    found = request.app.state.parts
    assert isinstance(found, AppState)
    return found


AppStateDep: TypeAlias = Annotated[AppState, Depends(_app_state)]
