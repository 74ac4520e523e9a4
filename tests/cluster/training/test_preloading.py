"""Where libraries are imported beforehand, and where not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.training import preloading
from cluster.training.preloading import ONE_MACHINE, preloaded_python


def test_a_cluster_of_several_machines_starts_its_workers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv(ONE_MACHINE, raising=False)
    with preloaded_python() as python:
        assert python is None


def test_a_gpu_is_left_to_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(preloading, "_GPUS", ("/nowhere", str(tmp_path / "nvidiactl")))
    with preloaded_python() as python:
        assert python is None
