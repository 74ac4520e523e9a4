"""The service asked in-process; no Ray: nothing listens at its cluster's address."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

from cluster.jobs.ray_cluster import RayCluster
from cluster.service.app import make_app
from cluster.service.settings import Settings

TREE: dict[str, Any] = {
    "policy": {"model": "org/policy"},
    "data": {"prompts": "/nowhere/prompts.jsonl"},
    "rewards": [{"type": "http", "url": "http://judge/score"}],
    "algorithm": {"type": "grpo"},
}


def serving(settings: Settings) -> TestClient:
    """The service as a browser on this machine would ask it."""
    app = make_app(settings, RayCluster(settings.private, "http://127.0.0.1:9"))
    return TestClient(app, base_url="http://127.0.0.1:8080", raise_server_exceptions=False)
