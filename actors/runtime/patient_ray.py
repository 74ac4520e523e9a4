"""Ray's start on a machine that does much else.

Ray's node gives itself up where its agents, Python processes that import for seconds, have not written which ports they
listen on within 15 seconds, and `ray.init` where the node has not registered within 30; both are written into Ray's
source. Agents that are told their ports are not waited for, and a node gets two minutes. It knows Ray's internals, in
this one place.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

AGENT_PATIENCE = {"RAY_agent_register_timeout_ms": "120000"}  # environment variables for the node
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_PATIENCE_S = 120.0
_POLL_S = 0.1


@contextmanager
def patient_ray() -> Iterator[None]:
    """Around the `ray.init` that starts a node."""
    from ray._private import parameter, services

    ports = dict(zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True))
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, AGENT_PATIENCE))
        stack.enter_context(patch.object(parameter, "RayParams", _with(parameter.RayParams, ports)))
        stack.enter_context(patch.object(services, "start_ray_process", _told(services.start_ray_process, ports)))
        stack.enter_context(patch.object(services, "get_node", _patient(services.get_node)))
        yield


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _with(make: Callable[..., Any], ports: dict[str, int]) -> Callable[..., Any]:
    return lambda **settings: make(**settings | ports)


def _told(start: Callable[..., Any], ports: dict[str, int]) -> Callable[..., Any]:
    """Starts Ray's processes, and the node's with the one port that Ray tells its agent and not itself."""

    def start_told(command: list[str], process_type: str, *arguments: Any, **more: Any) -> Any:
        if process_type == "raylet":
            command = [*command, f"--dashboard_agent_listen_port={ports['dashboard_agent_listen_port']}"]
        return start(command, process_type, *arguments, **more)

    return start_told


def _patient(ask: Callable[..., Any]) -> Callable[..., Any]:
    """The same question, answered when there is an answer, or after two minutes by its error."""

    def wait(*arguments: Any) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    return wait
