"""Rewards as Ray Serve applications: deploy, ask, remove. Ray Serve is named here only.

One application for each reward; its name begins with the run's, so that several runs share a cluster. There is no
HTTP proxy: what is asked is asked through handles.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from actors.rewards.score import Answer, PassingError
from actors.runtime.actor_group import RoleError
from trainers.types import Prompt

log = logging.getLogger(__name__)

Ask: TypeAlias = Callable[[Prompt, Sequence[str]], Awaitable[list[Answer]]]

CLOSE_S = 60.0
POLL_S = 0.05
MAX_ONGOING = 10_000  # the replicas queue by themselves
LONGEST_TEXT = 500
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"  # Ray Serve's own, one in a cluster


@dataclass(frozen=True, slots=True)
class ServedReward:
    """What one application is made of: a class with `check` and `score`, and its arguments."""

    name: str
    replica: type
    arguments: tuple[Any, ...]
    replicas: int = 1
    gpus: float = 0  # of one replica


class RewardApps:
    """The Serve applications of one run."""

    def __init__(self, *, prefix: str, cpus_per_replica: float) -> None:
        self._prefix, self._cpus = prefix, cpus_per_replica
        self._names: list[str] = []
        self._started_serve = False
        self._deploying = asyncio.Lock()

    async def deploy(self, reward: ServedReward) -> tuple[Ask, str | None]:
        """Start one application: how to ask it, and what its `check` found wrong. Several may be started at once.

        Raises:
            RoleError: Serve gave it up.
        """
        name = f"{self._prefix}-{reward.name}"
        target = serve.RunTarget(self._application(reward), name=name, route_prefix=None)
        async with self._deploying:
            if not self._names:
                self._started_serve = not _serve_runs()
            self._names.append(name)
            handle = await asyncio.to_thread(_deploy, target)
        while not self._running(name):  # noqa: ASYNC110 — Serve can only be polled
            await asyncio.sleep(POLL_S)
        return _asks(handle), await _check(handle)

    def states(self) -> str:
        """How far each application is, in words."""
        try:
            found = serve.status().applications
        except (RayError, RayServeException) as error:
            return last_line(error)
        states = [f"{name}: {found[name].status.value} {found[name].message}" for name in self._names if name in found]
        return "; ".join(state.strip() for state in states) or "Ray Serve has not started"

    async def remove(self) -> None:
        """End the applications; Serve itself only if it was started here and no other run uses it."""
        names, self._names = self._names, []
        if not names:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.to_thread(_remove, names, with_serve=self._started_serve)
        except (TimeoutError, RayError, RayServeException) as error:  # a cluster that is gone needs no cleaning
            log.warning("the rewards' applications %s were not removed: %r", ", ".join(names), error)

    def _application(self, reward: ServedReward) -> serve.Application:
        deployment = serve.deployment(
            num_replicas=reward.replicas,
            ray_actor_options={"num_cpus": self._cpus, "num_gpus": reward.gpus},
            max_ongoing_requests=MAX_ONGOING,
            max_constructor_retry_count=2,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=2,
            logging_config=_logging(),
        )(reward.replica)
        return deployment.bind(*reward.arguments)

    def _running(self, name: str) -> bool:
        found = serve.status().applications.get(name)
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            rank, message = self._names.index(name), f"{name}: {found.message}"
            raise RoleError(role="reward", rank=rank, phase="start", kind="DeployFailed", message=message)
        return found is not None and found.status == ApplicationStatus.RUNNING


async def _check(handle: DeploymentHandle) -> str | None:
    found: str | None = await handle.check.remote()
    return found


def _asks(handle: DeploymentHandle) -> Ask:
    async def ask(prompt: Prompt, completions: Sequence[str]) -> list[Answer]:
        response = handle.score.remote(prompt, completions)
        try:
            answers: list[Answer] = await response
            return answers
        except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
            raise PassingError(f"its replica is gone: {last_line(error)}") from error
        except asyncio.CancelledError:
            response.cancel()
            raise

    return ask


def last_line(error: Exception) -> str:
    """What happened, in one line: Ray's errors hold a complete traceback, whose last line is the exception."""
    lines = str(error).strip().splitlines()
    return (lines[-1] if isinstance(error, RayError) and lines else f"{type(error).__name__}: {error}")[:LONGEST_TEXT]


def _logging() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _serve_runs() -> bool:
    try:
        ray.get_actor(CONTROLLER, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _deploy(target: serve.RunTarget) -> DeploymentHandle:
    """Blocking. Starts Serve, without its HTTP proxy, unless it runs."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=_logging())
    handles: list[DeploymentHandle] = serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    return handles[0]


def _remove(names: Sequence[str], *, with_serve: bool) -> None:
    """Blocking."""
    others = set(serve.status().applications) - set(names)
    if with_serve and not others:
        serve.shutdown()
        return
    for name in names:
        serve.delete(name)
