"""vLLM's weight-transfer API, both sides of it, in this file alone (it has moved several times).

Receiving: an engine for each transport, registered under `rlhf_*` by vLLM's plugin entry point (`vllm_transfer.py`),
each keeping a digest of every tensor at the moment that the model loads it. Sending: vLLM's own trainer engines for
nccl and ipc, fed from our gathered weights. The object-store transport's sender is in `transfer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightTransferEngine,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer import WeightSource as VllmWeightSource
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.weights.transfer import (
    GeneratorClient,
    Route,
    SentWeights,
    TensorInfo,
    WeightSource,
    tensor_digest,
    unpack_chunk,
)

_BUFFER_BYTES = 256 << 20  # a sender and each of its workers hold one


class _Recorder:
    """Stands before the model while weights arrive: digests each tensor, then loads it."""

    def __init__(self, model: Any, received: dict[str, str]) -> None:
        self._model = model
        self._received = received

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._digested(weights))

    def _digested(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self._received[name] = tensor_digest(tensor)
            yield name, tensor


class Proved:
    """Mixed into a receiving engine: keeps what was received, and repairs what a CPU reload leaves stale."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received: dict[str, str] = {}

    def start_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        self.received = {}
        if current_platform.is_cpu():
            repack_experts(self.model)
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        """See `WeightTransferEngine`; every tensor is digested as the model loads it."""
        model = self.model
        self.model = _Recorder(model, self.received)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        super().finish_weight_update()  # type: ignore[misc]
        if current_platform.is_cpu():
            repack_embeddings(self.model)


def repack_experts(model: nn.Module) -> None:
    """Have the experts of a mixture packed again when their weights come: vLLM packs them for its CPU kernel only when
    it makes that kernel, and a reload would write plain weights where the kernel reads packed ones."""
    for layer in model.modules():
        if isinstance(layer, RoutedExperts) and isinstance(layer.quant_method, UnquantizedFusedMoEMethod):
            layer.quant_method.moe_kernel = None


def repack_embeddings(model: nn.Module) -> None:
    """Repack embeddings and output heads: on the CPU a layer-wise reload leaves a tied head's packed copy stale."""
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One chunk, see `transfer.pack_chunk`."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    buffers: list[np.ndarray[Any, Any]]


class ObjectStoreTransfer(WeightTransferEngine):
    """Receives complete tensors as bytes in the update call itself."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """See `WeightTransferEngine`."""
        del init_info

    def start_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """See `WeightTransferEngine`."""
        chunk = unpack_chunk(update_info.names, update_info.dtype_names, update_info.shapes, update_info.buffers)
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in chunk)

    def finish_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


class ObjectStoreEngine(Proved, ObjectStoreTransfer):
    """Receives through Ray's object store."""


class NCCLEngine(Proved, NCCLWeightTransferEngine):
    """Receives by NCCL broadcast from learner rank 0."""


class IPCEngine(Proved, IPCWeightTransferEngine):
    """Receives through CUDA memory shared by a learner on the same GPU."""


class WorkerExtension:
    """Methods that every vLLM worker gets beside its own (`worker_extension_cls`)."""

    weight_transfer_engine: Any

    def received_digests(self) -> dict[str, str]:
        """Digest by name of each tensor that the last transfer loaded."""
        return dict(self.weight_transfer_engine.received)


class _DigestingSource(VllmWeightSource):
    """Our gathered weights in the form that vLLM's trainer engines iterate; digests what passes."""

    def __init__(self, source: WeightSource, *, is_sender: bool) -> None:
        self._source = source
        self._is_sender = is_sender
        self.digests: dict[str, str] = {}
        self.bytes = 0

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(info.name, info.dtype, info.shape) for info in self._source.infos()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digests, self.bytes = {}, 0
        for name, tensor in self._source:
            if self._is_sender:
                self.digests[name] = tensor_digest(tensor)
                self.bytes += tensor.nbytes
            yield name, tensor


def buffer_bytes(infos: Iterable[TensorInfo]) -> int:
    """Of the buffer that ipc packs tensors into: a chunk's worth, or as much as the largest tensor, which goes whole.

    >>> buffer_bytes([TensorInfo("head", torch.bfloat16, (152_064, 3584)), TensorInfo("norm", torch.bfloat16, (3584,))])
    1089994752
    """
    return max([_BUFFER_BYTES, *(math.prod(info.shape) * info.dtype.itemsize for info in infos)])


class VllmSender:
    """nccl and ipc: vLLM's trainer engine over our gathered weights. Made on every learner rank."""

    def __init__(self, route: Route, source: WeightSource, client: GeneratorClient, *, rank: int) -> None:
        self._source = _DigestingSource(source, is_sender=rank == 0)
        info: NCCLTrainerInitInfo | IPCTrainerInitInfo
        if route.transport == "nccl":
            info = NCCLTrainerInitInfo(
                rank=rank,
                master_address=route.host,
                master_port=route.port,
                world_size=route.world_size,
                packed=True,
            )
        else:
            info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes(source.infos()))
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self) -> SentWeights:
        """See `transfer.WeightSender`."""
        self._engine.send_weights()
        torch.accelerator.synchronize()
        return SentWeights(dict(self._source.digests), self._source.bytes)
