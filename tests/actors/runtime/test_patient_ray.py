"""Ray's node may take its time to register."""

from __future__ import annotations

import pytest
from ray._private import services

from actors.runtime import patient_ray as module
from actors.runtime.patient_ray import patient_ray


def test_a_node_that_registers_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    asked: list[str] = []

    def get_node(address: str, node: str) -> str:
        asked.append(address)
        if len(asked) < 5:
            raise RuntimeError("no such node yet")
        return f"{node} is there"

    monkeypatch.setattr(services, "get_node", get_node)
    with patient_ray():
        assert services.get_node("gcs", "n1") == "n1 is there"
    assert asked == ["gcs"] * 5
    assert services.get_node is get_node


def test_one_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)

    def get_node(address: str) -> str:
        raise RuntimeError(f"nobody at {address}")

    monkeypatch.setattr(services, "get_node", get_node)
    with pytest.raises(RuntimeError, match="nobody at gcs"), patient_ray():
        services.get_node("gcs")
