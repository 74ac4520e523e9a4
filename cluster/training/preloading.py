"""The libraries of all roles, imported once for a run on this machine, while its config is still being checked."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.runtime.fork_server import fork_server

LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "pandas",  # what follows is what Ray Serve imports
    "fastapi",
    "grpc.aio",
    "uvicorn",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "transformers.integrations.deepspeed",
    "transformers.integrations.bitsandbytes",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # threads would not survive a fork; each role sets its own number
    "DS_ACCELERATOR": "cpu",  # DeepSpeed would look for a GPU
    "TOKENIZERS_PARALLELISM": "false",
}
ONE_MACHINE = "RLHF_ONE_MACHINE"  # an environment variable: the cluster at RAY_ADDRESS has this machine only
_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@contextmanager
def preloaded_python() -> Iterator[str | None]:
    """The command that workers are to be started with in place of Python; None: Python itself.

    Only where every worker is on this machine, and where there is no GPU: its state does not survive a fork.
    """
    elsewhere = "RAY_ADDRESS" in os.environ and ONE_MACHINE not in os.environ
    running = "ray" in sys.modules and sys.modules["ray"].is_initialized()  # it starts its workers as it was told
    if elsewhere or running or any(Path(device).exists() for device in _GPUS):
        yield None
        return
    with fork_server(LIBRARIES, _ENVIRONMENT) as python:
        yield python


if __name__ == "__main__":  # part of the set-up: Python keeps the byte code of what it imports
    for library in (*LIBRARIES, "cluster.training.launch"):
        importlib.import_module(library)
