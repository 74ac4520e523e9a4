"""Weights on their way from learners to generators: what is sent, its digest, and the object-store transport.

It knows torch and Ray, not vLLM (importing that takes a learner ten seconds that it can do without); the receiving
side and the transports that vLLM brings (nccl, ipc) are in `vllm_transports.py`, which exist in `transports.py`.

A transfer is: `start` on every generator, chunks of complete tensors one after the other, `finish`. The sender keeps a
digest of every tensor that it hands over, the receiver of every tensor that it loads; `compare_digests` names the
first one that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from actors.config import Transport
from actors.runtime.actor_group import RoleError, explain

_DIGEST_CHUNK = 1 << 22  # elements widened to int64 at a time: 32 MiB
_TRANSFER_CHUNK_BYTES = 64 << 20
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightSyncError(RuntimeError):
    """The generators do not hold what the learners trained."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name (Hugging Face format), type and full shape of one tensor of the policy."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How weights travel from the learners to the generators."""

    transport: Transport
    deadline_s: float
    host: str = ""  # nccl: where learner rank 0 waits for the generators
    port: int = 0
    world_size: int = 0  # nccl: learner rank 0 and every generator worker


class WeightSource(Protocol):
    """The policy's tensors, gathered one at a time; every rank iterates, since gathering is collective."""

    def infos(self) -> Sequence[TensorInfo]:
        """What iteration will yield, in order, without gathering."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh pass over `(name, full tensor)`."""
        ...


@dataclass(frozen=True, slots=True)
class SentWeights:
    """What the sending rank handed over: digest by tensor name, and bytes."""

    digests: Mapping[str, str]
    bytes: int


class WeightSender(Protocol):
    """One transport's sending side; `send` is called on every learner rank."""

    def send(self) -> SentWeights:
        """Push all weights to all generators; empty on ranks that do not send."""
        ...


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's type, shape and bits, computed on the tensor's device.

    Sum and position-weighted sum of the bits as integers modulo 2^64: any single changed element and any swap of
    two different ones changes it. It guards against faults, not against an attacker.

    >>> tensor_digest(torch.tensor([1, 2])) == tensor_digest(torch.tensor([2, 1]))
    False
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    plain = torch.zeros((), dtype=torch.int64, device=tensor.device)
    weighted = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _DIGEST_CHUNK):
        part = bits[start : start + _DIGEST_CHUNK].to(torch.int64)
        position = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=part.device)
        plain += part.sum()
        weighted += (part * position).sum()
    shape = "x".join(map(str, tensor.shape))
    sums = [int(s.item()) & (2**64 - 1) for s in (plain, weighted)]
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{sums[0]:x}:{sums[1]:x}"


def compare_digests(sent: Mapping[str, str], received: Mapping[str, str], *, replica: str) -> None:
    """Raise `WeightSyncError` naming the first tensor that is missing or differs."""
    for name, digest in sent.items():
        if name not in received:
            raise WeightSyncError(f"{replica} never received tensor {name!r}; its weights are not the policy's")
        if received[name] != digest:
            raise WeightSyncError(
                f"{replica} loaded a tensor {name!r} that differs from what was sent "
                f"(sent {digest}, received {received[name]}): corrupted in transit"
            )
    if extra := sorted(set(received) - set(sent)):
        raise WeightSyncError(f"{replica} received tensor {extra[0]!r}, which was never sent")


class GeneratorClient:
    """The generators' weight-transfer calls, each to all replicas at once, each with a deadline.

    All waits of one transfer together take at most `deadline_s`, which is shorter than what the driver gives the
    learner: a generator that hangs or fails is then named, not the learner that waits for it. Has the method names of
    vLLM's own `VLLMWeightSyncClient`, whose trainer engines drive it for nccl and ipc.
    """

    def __init__(self, generators: Sequence[ActorHandle], *, deadline_s: float) -> None:
        self._generators = list(generators)
        self._deadline_s = deadline_s
        self._ends_at = 0.0  # monotonic

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell every replica how to receive (nccl: each is given its own rank offset)."""
        self._ends_at = monotonic() + self._deadline_s
        refs, offset = [], init_info.get("rank_offset")
        workers = self._workers_per_replica(init_info)
        for i, generator in enumerate(self._generators):
            info = init_info if offset is None else {**init_info, "rank_offset": offset + i * workers}
            refs.append(generator.init_weight_transfer.remote(info))
        self._wait("connect", refs)

    def start_weight_update(self) -> None:
        """Pause generation and make every replica ready for new weights."""
        self._ends_at = monotonic() + self._deadline_s
        self._wait("start weight update", [g.start_weight_update.remote() for g in self._generators])

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Hand one chunk to every replica."""
        ref = ray.put(update_info)
        self._wait("load weights", [g.update_weights.remote(ref) for g in self._generators])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the new weights the ones that write."""
        del weight_version  # the driver stamps the version when the proof has passed
        self._wait("finish weight update", [g.finish_weight_update.remote() for g in self._generators])

    def _workers_per_replica(self, init_info: dict[str, Any]) -> int:
        world_size = init_info.get("world_size")
        return 0 if world_size is None else (world_size - 1) // len(self._generators)

    def _wait(self, phase: str, refs: list[Any]) -> None:
        """Wait for every replica. Raises `RoleError` naming the first that fails, or does not answer in time."""
        waiting = {ref: rank for rank, ref in enumerate(refs)}
        while waiting:
            left = max(0.0, self._ends_at - monotonic())
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not done:
                message = f"no answer within {self._deadline_s:g} s"
                raise RoleError(
                    role="generator", rank=min(waiting.values()), phase=phase, kind="Timeout", message=message
                )
            rank = waiting.pop(done[0])
            try:
                ray.get(done[0])
            except RayError as error:
                kind, message = explain(error)
                raise RoleError(role="generator", rank=rank, phase=phase, kind=kind, message=message) from None


class ObjectStoreSender:
    """Sends through Ray's object store: any device, any node; the transport of CPUs."""

    def __init__(self, source: WeightSource, client: GeneratorClient, *, rank: int) -> None:
        self._source = source
        self._client = client
        self._is_sender = rank == 0

    def send(self) -> SentWeights:
        """See `WeightSender`."""
        if not self._is_sender:
            for _ in self._source:  # gathering is collective
                pass
            return SentWeights({}, 0)
        digests: dict[str, str] = {}
        total = 0
        self._client.start_weight_update()
        for chunk in _chunks(self._source):
            digests |= {name: tensor_digest(tensor) for name, tensor in chunk}
            total += sum(tensor.nbytes for _, tensor in chunk)
            self._client.update_weights(pack_chunk(chunk))
        self._client.finish_weight_update()
        return SentWeights(digests, total)


def _chunks(source: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in source:
        if chunk and size + tensor.nbytes > _TRANSFER_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk


def pack_chunk(chunk: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Whole tensors as bytes that Ray hands over without copying; the inverse is `unpack_chunk`."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
        "buffers": [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, tensor in chunk],
    }


def unpack_chunk(
    names: Sequence[str],
    dtype_names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    buffers: Sequence[np.ndarray[Any, Any]],
) -> list[tuple[str, Tensor]]:
    """The tensors of `pack_chunk`, each in memory of its own (Ray's is read-only)."""
    return [
        (name, torch.from_numpy(buffer.copy()).view(getattr(torch, dtype_name)).view(tuple(shape)))
        for name, dtype_name, shape, buffer in zip(names, dtype_names, shapes, buffers, strict=True)
    ]
