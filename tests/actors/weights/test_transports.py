"""The table of weight transports: what `auto` takes, what is refused, and that it is complete."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest

from actors.config import SyncConfig, Transport
from actors.weights.transports import TRANSPORTS, choose_transport, transport_problem


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"placement": "split", "gpus": True, "adapter": False}, "nccl"),
        ({"placement": "colocated", "gpus": True, "adapter": False}, "ipc"),
        ({"placement": "split", "gpus": False, "adapter": False}, "ray"),
        ({"placement": "colocated", "gpus": False, "adapter": False}, "ray"),
        ({"placement": "split", "gpus": True, "adapter": True}, "ray"),
        ({"placement": "colocated", "gpus": True, "adapter": True}, "ray"),
    ],
)
def test_auto_takes_what_fits(run: dict[str, Any], expected: str) -> None:
    assert choose_transport("auto", **run) == expected


def test_the_wanted_one_is_taken() -> None:
    assert choose_transport("ray", placement="split", gpus=True, adapter=False) == "ray"


@pytest.mark.parametrize(
    ("wanted", "placement", "adapter", "message"),
    [
        ("nccl", "colocated", False, "use ipc"),
        ("ipc", "split", False, "requires placement: colocated"),
        ("nccl", "split", True, "transport: nccl cannot send an adapter; use auto or ray"),
        ("nccl", "split", False, None),
        ("ray", "colocated", True, None),
        ("auto", "colocated", True, None),
    ],
)
def test_what_a_run_cannot_use(wanted: Any, placement: Any, adapter: bool, message: str | None) -> None:
    found = transport_problem(wanted, placement=placement, adapter=adapter)
    assert (found is None) if message is None else (found is not None and message in found)


def test_the_table_and_the_config_name_the_same_transports() -> None:
    assert set(TRANSPORTS) == set(get_args(Transport))
    schema = SyncConfig.model_json_schema()["properties"]["transport"]
    assert set(schema["enum"]) == {"auto", *TRANSPORTS}


def test_reading_the_table_loads_no_engine() -> None:
    code = "import sys, actors.weights.transports; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "torch", "vllm"} & set(loaded)
