"""The ways on which weights travel from learners to generators: one table of what each can do, sends and receives by.

Reading the table loads neither torch nor an engine, so that a config can be checked against it; a transport's sides
are imported when they are made. A new transport is a file with its two sides, its name in `actors.config.Transport`
and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from actors.config import Placement, Transport

if TYPE_CHECKING:
    from actors.weights.transfer import GeneratorClient, Route, WeightSender, WeightSource

Sender: TypeAlias = "Callable[[Route, WeightSource, GeneratorClient, int], WeightSender]"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTransport:
    """One way of moving weights."""

    sender: Sender  # of a route, the weights, the generators and a learner's rank; made on every rank
    receiver: Callable[[], type]  # vLLM's WeightTransferEngine for it
    placements: frozenset[Placement]
    refusal: str = ""  # why another placement is refused
    needs_gpus: bool = True
    adapters: bool = False  # whether an adapter's tensors can travel on it, not only a complete model's
    rendezvous: bool = False  # whether learner rank 0 waits for every generator worker at an address

    def fits(self, placement: Placement, *, gpus: bool, adapter: bool) -> bool:
        """Whether it can serve such a run."""
        return placement in self.placements and (gpus or not self.needs_gpus) and (self.adapters or not adapter)


def _object_store(route: Route, source: WeightSource, client: GeneratorClient, rank: int) -> WeightSender:
    from actors.weights.transfer import ObjectStoreSender

    del route
    return ObjectStoreSender(source, client, rank=rank)


def _vllm(route: Route, source: WeightSource, client: GeneratorClient, rank: int) -> WeightSender:
    from actors.weights.vllm_transports import VllmSender  # importing vLLM takes ten seconds that "ray" does without

    return VllmSender(route, source, client, rank=rank)


def _object_store_engine() -> type:
    from actors.weights.vllm_transports import ObjectStoreEngine

    return ObjectStoreEngine


def _nccl_engine() -> type:
    from actors.weights.vllm_transports import NCCLEngine

    return NCCLEngine


def _ipc_engine() -> type:
    from actors.weights.vllm_transports import IPCEngine

    return IPCEngine


TRANSPORTS: dict[Transport, WeightTransport] = {  # `auto` takes the first one that fits
    "nccl": WeightTransport(
        sender=_vllm,
        receiver=_nccl_engine,
        placements=frozenset({"split"}),
        refusal="transport: nccl cannot connect two processes on one GPU; use ipc or auto",
        rendezvous=True,
    ),
    "ipc": WeightTransport(
        sender=_vllm,
        receiver=_ipc_engine,
        placements=frozenset({"colocated"}),
        refusal="transport: ipc requires placement: colocated (the same GPU); use nccl or auto",
    ),
    "ray": WeightTransport(
        sender=_object_store,
        receiver=_object_store_engine,
        placements=frozenset({"split", "colocated"}),
        needs_gpus=False,
        adapters=True,
    ),
}


def choose_transport(
    wanted: Transport | Literal["auto"], *, placement: Placement, gpus: bool, adapter: bool
) -> Transport:
    """The transport of a run: the wanted one, or the first of the table that fits.

    >>> choose_transport("auto", placement="split", gpus=True, adapter=False)
    'nccl'
    >>> choose_transport("auto", placement="split", gpus=True, adapter=True)
    'ray'
    """
    if wanted != "auto":
        return wanted
    return next(name for name, t in TRANSPORTS.items() if t.fits(placement, gpus=gpus, adapter=adapter))


def transport_problem(wanted: Transport | Literal["auto"], *, placement: Placement, adapter: bool) -> str | None:
    """Why a run cannot use the wanted transport; None: it can."""
    if wanted == "auto":
        return None
    transport = TRANSPORTS[wanted]
    if adapter and not transport.adapters:
        able = [name for name, other in TRANSPORTS.items() if other.adapters]
        return f"transport: {wanted} cannot send an adapter; use auto or {' or '.join(able)}"
    return None if placement in transport.placements else transport.refusal


def make_sender(route: Route, source: WeightSource, client: GeneratorClient, *, rank: int) -> WeightSender:
    """The sending side of a route, on every learner rank."""
    return TRANSPORTS[route.transport].sender(route, source, client, rank)
