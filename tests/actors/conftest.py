"""What the actors' tests share: a small Ray cluster, a process that learners are forked from, one for all engines.

Each is started by the first test that asks for it; what is heavy to import is imported then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from actors.runtime.actor_group import ActorGroup
    from tests.support.engine_host import Engine
    from tests.support.forked_ranks import ForkServer
    from tests.support.learning import Ranks


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine, eight CPUs by name, for the whole session; whoever uses it removes its own actors."""
    import ray

    from actors.runtime.patient_ray import patient_ray
    from cluster.training.preloading import preloaded_python

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    with preloaded_python() as python:
        with patient_ray():
            ray.init(
                address="local",
                num_cpus=8,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
                runtime_env={"py_executable": python} if python else {},
            )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported what a learner needs."""
    from tests.support.forked_ranks import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest, fork_server: ForkServer) -> Ranks:
    """Forks for learners, and Ray, which only the cuts that ask for it start."""
    from tests.support.learning import Ranks

    return Ranks(fork_server, lambda: request.getfixturevalue("ray_cluster"))


@pytest.fixture(scope="session")
def engines(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActorGroup]:
    """The host of all engines (`EngineHost`), as a group of one generator."""
    from tests.support.engine_host import engine_host

    with engine_host(tmp_path_factory.mktemp("engines")) as group:
        yield group


@pytest.fixture(scope="session")
def engine(engines: ActorGroup) -> Engine:
    """The same host, to run functions in; `use` comes first."""
    from tests.support.engine_host import Engine

    return Engine(engines.actors[0])


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy whose output head is its embedding."""
    from tests.support import tiny

    return tiny.make_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with an output head of its own."""
    from tests.support import tiny

    return tiny.make_policy(tmp_path_factory.mktemp("untied"), tied=False)
