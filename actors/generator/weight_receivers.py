"""What a generator does with weights that arrive: load them into the model, or serve them as its adapter.

It knows the engine by its protocol only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file
from torch import Tensor

from actors.config import PolicyConfig
from actors.messages import EngineSpec
from actors.modeling.peft_adapters import write_plain_adapter
from actors.runtime.scratch_folder import MEMORY, scratch_folder
from actors.weights.transfer import tensor_digest, unpack_chunk

if TYPE_CHECKING:
    from actors.generator.engine import Engine


class Receiver(Protocol):
    """One way of taking weights, between two engine steps, generation paused."""

    async def init(self, info: dict[str, Any]) -> None:
        """Rendezvous with the sender."""
        ...

    async def start(self) -> None:
        """Make ready for new weights."""
        ...

    async def update(self, chunk: dict[str, Any]) -> None:
        """Take one chunk."""
        ...

    async def finish(self) -> None:
        """Make the new weights the ones that write."""
        ...

    async def digests(self) -> list[dict[str, str]]:
        """Of every tensor that is held, for each worker of the engine."""
        ...


def make_receiver(engine: Engine, spec: EngineSpec) -> Receiver:
    """What fits the policy's train type."""
    return ModelReceiver(engine) if spec.adapter is None else AdapterReceiver(engine, spec.adapter)


class ModelReceiver:
    """Loads the complete model's weights, by the engine's side of the transport."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def init(self, info: dict[str, Any]) -> None:
        """See `Receiver`."""
        await asyncio.wrap_future(self._engine.init_transfer(info))

    async def start(self) -> None:
        """See `Receiver`."""
        await asyncio.wrap_future(self._engine.start_update())

    async def update(self, chunk: dict[str, Any]) -> None:
        """See `Receiver`."""
        await asyncio.wrap_future(self._engine.load_weights(chunk))

    async def finish(self) -> None:
        """See `Receiver`."""
        await asyncio.wrap_future(self._engine.finish_update())

    async def digests(self) -> list[dict[str, str]]:
        """See `Receiver`."""
        return await asyncio.wrap_future(self._engine.loaded_digests())


class AdapterReceiver:
    """Keeps the base and serves each version of the adapter as a new one, read from files in memory, or where that
    lacks room on a disk.

    A name is never used twice: the engine would find what it cached under the old weights.
    """

    def __init__(self, engine: Engine, policy: PolicyConfig) -> None:
        self._engine = engine
        self._policy = policy
        self._version = 0
        self._arrived: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}

    async def init(self, info: dict[str, Any]) -> None:
        """See `Receiver`."""

    async def start(self) -> None:
        """See `Receiver`."""
        self._arrived, self._digests = {}, {}

    async def update(self, chunk: dict[str, Any]) -> None:
        """See `Receiver`."""
        self._arrived |= dict(unpack_chunk(**chunk))

    async def finish(self) -> None:
        """See `Receiver`."""
        self._version += 1
        needed = sum(tensor.nbytes for tensor in self._arrived.values())
        with scratch_folder("rlhf-adapter-", MEMORY, needed=needed) as directory:
            write_plain_adapter(directory, self._arrived, self._policy)
            self._arrived = {}
            held = load_file(directory / "adapter_model.safetensors")  # what the engine reads
            self._digests = {name: tensor_digest(tensor) for name, tensor in held.items()}
            await asyncio.wrap_future(self._engine.use_adapter(self._version, str(directory)))

    async def digests(self) -> list[dict[str, str]]:
        """See `Receiver`."""
        return [self._digests]
