"""What the service is made of: one of each part, which the routes and the domain code share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.jobs.ray_cluster import RayCluster
from cluster.models.catalog import Models
from cluster.service.data.datasets import Datasets
from cluster.service.data.lengths import Lengths
from cluster.service.queue import Queue
from cluster.service.remote_catalog import RemoteCatalog
from cluster.service.results.metrics import MetricsReader
from cluster.service.run_view import Runs
from cluster.service.settings import Settings
from cluster.service.tickets import Tickets
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
