"""What a generator needs of its inference engine, and the one engine that there is: the seam that vLLM is behind.

Results are futures, so that an engine may run in a thread or a process of its own. Importing this loads no engine.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from actors.messages import EngineSpec, GenerateRequest, TopLogprobsRequest
from trainers.types import Completion, TopLogprobs


class Engine(Protocol):
    """A running engine. Methods may be called from any thread; after a failure every pending and later call fails."""

    @property
    def ready(self) -> Future[None]:
        """Done when the engine is loaded; carries the exception if it could not be."""
        ...

    def draw(self, request: GenerateRequest) -> list[Future[Completion]]:
        """Start writing a group, batched with whatever else the engine works on; one future for each seed."""
        ...

    def top_logprobs(self, request: TopLogprobsRequest) -> Future[TopLogprobs]:
        """Start reading a sequence: the likeliest tokens at the requested places."""
        ...

    def pause(self) -> Future[None]:
        """Stop generating; requests keep their place."""
        ...

    def resume(self, policy_version: int) -> Future[None]:
        """Continue, with weights of that version; nothing that was cached under older weights is used."""
        ...

    def sleep(self) -> Future[None]:
        """Leave the GPU: weights to host memory, key-value cache dropped."""
        ...

    def wake_up(self) -> Future[None]:
        """Take the GPU back."""
        ...

    def init_transfer(self, info: dict[str, Any]) -> Future[Any]:
        """Rendezvous with the sender of weights, if the transport has one."""
        ...

    def start_update(self) -> Future[Any]:
        """Make ready for new weights of the complete model."""
        ...

    def load_weights(self, chunk: dict[str, Any]) -> Future[Any]:
        """Load one chunk of them."""
        ...

    def finish_update(self) -> Future[Any]:
        """Use the new weights from the next token on."""
        ...

    def loaded_digests(self) -> Future[list[dict[str, str]]]:
        """Digest by name of each tensor that the last update loaded, for each worker of the engine."""
        ...

    def use_adapter(self, id: int, directory: str) -> Future[None]:
        """Write with the adapter in `directory` from now on, instead of the one before; `id` is used once only."""
        ...

    def close(self) -> None:
        """Stop the engine and its workers."""
        ...


def make_engine(spec: EngineSpec) -> Engine:
    """The engine of this process, loading."""
    from actors.generator.vllm_engine import VllmEngine  # importing vLLM takes ten seconds

    return VllmEngine(spec)


def engine_environment(*, threads: int) -> dict[str, str]:
    """Environment variables of the process that `make_engine` is called in."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
