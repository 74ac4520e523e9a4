"""vLLM's plugin entry point: makes the receiving side of every weight transport known in every vLLM process."""

from __future__ import annotations

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from actors.weights.transports import TRANSPORTS


def register() -> None:
    """Register each receiver of the table as `rlhf_<transport>`; vLLM calls it when it loads its plugins."""
    for name, transport in TRANSPORTS.items():
        receiver = transport.receiver()
        WeightTransferEngineFactory.register_engine(f"rlhf_{name}", receiver.__module__, receiver.__name__)
