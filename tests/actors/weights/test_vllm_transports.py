"""vLLM's side of the transports, as far as it can be seen without a GPU, in the process that has imported vLLM."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from actors.weights.transfer import Route, TensorInfo
from tests.support import tiny
from tests.support.engine_host import Engine, EngineHost

pytestmark = pytest.mark.integration
tiny.by_value(__name__)

HEAD = TensorInfo("lm_head", torch.bfloat16, (152_064, 3_584))  # Qwen2.5-7B's
NORM = TensorInfo("norm", torch.bfloat16, (3_584,))


class Outlines:
    """Weights of which only the shapes are asked."""

    def __init__(self, infos: list[TensorInfo]) -> None:
        self._infos = infos

    def infos(self) -> list[TensorInfo]:
        return self._infos


def ipc_buffer(host: EngineHost, infos: list[TensorInfo]) -> int:
    """What our sender asks of vLLM, whose trainer engine is not made: it would open CUDA."""
    from actors.weights import vllm_transports

    del host
    source: Any = Outlines(infos)
    client: Any = None
    with mock.patch.object(vllm_transports.WeightTransferTrainerFactory, "trainer_init") as made:
        vllm_transports.VllmSender(Route(transport="ipc", deadline_s=1.0), source, client, rank=0)
    return int(made.call_args.args[0].packed_buffer_size_bytes)


@pytest.mark.parametrize(
    ("infos", "expected"), [([NORM, HEAD], 152_064 * 3_584 * 2), ([NORM], 256 << 20), ([], 256 << 20)]
)
def test_the_ipc_buffer_holds_the_largest_tensor(engine: Engine, infos: list[TensorInfo], expected: int) -> None:
    """That head is larger than the gibibyte that vLLM takes by itself, and vLLM refuses a tensor that does not fit."""
    assert engine(ipc_buffer, infos) == expected
