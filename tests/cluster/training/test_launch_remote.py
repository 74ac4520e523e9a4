"""A run whose models lie in a store, up to where Ray would be started."""

from __future__ import annotations

import io
import json
import os
import signal
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from cluster.config.run import parse_config
from cluster.training import launch
from tests.support import remote_stores
from trainers.errors import UserError


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Ending(MemoryFileSystem):
    """A store during whose reading the process is asked to end, once, and which is silent from then on."""

    protocol = "ending"
    ended = threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("ending://", "memory://"))

    def open(self, path, mode="rb", **options):
        if not self.ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.ended.wait(10)
        return super().open(path, mode, **options)


fsspec.register_implementation("ending", Ending, clobber=True)


def config_of(tmp_path, policy, reward):
    models = {"policy": {"model": policy}, "rewards": [reward]}
    return parse_config(
        {"root": str(tmp_path), **models, "data": {"prompts": "p.jsonl"}, "algorithm": {"type": "grpo"}}
    )


def test_a_model_that_cannot_be_had_ends_the_run_before_ray_is_started(tmp_path):
    remote_stores.put_model("memory://models/policy")
    config = config_of(tmp_path, "memory://models/policy", {"type": "model", "model": "memory://models/none"})
    told = io.StringIO()
    with pytest.raises(UserError, match=r"rewards\.0\.model: no such folder: memory://models/none"):
        launch.train(config, console=Console(file=told, width=200))
    assert "fetch models …" in told.getvalue()
    assert "fetching memory://models/policy (" in told.getvalue()
    assert "start Ray" not in told.getvalue()
    (run,) = tmp_path.glob("*/run.json")
    record = json.loads(run.read_text())
    assert (record["state"], record["error"]["type"]) == ("failed", "UserError")


def test_a_termination_while_a_model_is_fetched_stops_the_run(tmp_path):
    remote_stores.put_model("memory://models/policy")
    config = config_of(tmp_path, "ending://models/policy", {"type": "http", "url": "http://judge/score"})
    before = signal.getsignal(signal.SIGTERM)
    outcome = launch.train(config, console=Console(file=io.StringIO()))
    Ending.ended.set()
    assert outcome.exit_code == launch.INTERRUPTED
    assert outcome.run.record().state == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list((tmp_path / ".models").glob("policy-*"))
