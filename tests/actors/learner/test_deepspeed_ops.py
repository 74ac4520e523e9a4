"""DeepSpeed's compiled op: found where set-up put it, the same sums with and without it, no wait for a dead lock."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from actors.learner import deepspeed_ops
from tests.support import tiny
from tests.support.forked_ranks import ForkServer, Loopback


def test_extensions_lie_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert deepspeed_ops.extensions_dir() == Path(sys.prefix) / "torch_extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert deepspeed_ops.extensions_dir() == tmp_path
    assert not deepspeed_ops.is_built()


def test_only_a_dead_lock_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / deepspeed_ops.OP_NAME / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        deepspeed_ops._remove_dead_lock()
        assert lock.exists()
    deepspeed_ops._remove_dead_lock()
    assert not lock.exists()


class Summing:
    """A rank that sums with DeepSpeed."""

    def total(self, environment: dict[str, str], rank: int) -> tuple[bool, torch.Tensor]:
        """Whether the op was loaded; 0, 1, 2, … on rank 0 and twice as much on rank 1, summed."""
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        deepspeed_ops.use_built_ops()
        import deepspeed

        deepspeed.init_distributed("gloo")
        values = torch.arange(1000, dtype=torch.float32) * (rank + 1)
        deepspeed.comm.all_reduce(values)
        op = deepspeed.comm.comm.cdb.shm_comm_op
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{environment['MASTER_PORT']}_{rank}"):
            buffer.unlink()  # it would stay: the rank is killed
        return op is not None, values


tiny.by_value(__name__)


@pytest.mark.integration
@pytest.mark.parametrize("built", [True, False])
def test_two_ranks_sum_with_and_without_the_op(built: bool, fork_server: ForkServer, tmp_path: Path) -> None:
    """0·3, 1·3, …: rank 0 has k, rank 1 has 2k."""
    if built and not deepspeed_ops.is_built():
        pytest.skip("the op is not compiled here (make setup; it needs the Python headers)")
    environment = {
        "HOME": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(deepspeed_ops.extensions_dir() if built else tmp_path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(Loopback().free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
    }
    with fork_server.group([Summing, Summing], [tmp_path / f"{rank}.log" for rank in range(2)]) as ranks:
        found = tiny.run(ranks.each("sum", lambda a, r: a.total.remote(environment, r), deadline_s=240))
    for loaded, total in found:
        assert loaded == built
        assert torch.equal(total, torch.arange(1000, dtype=torch.float32) * 3)
    assert not any(tmp_path.rglob("*.so"))  # nothing is compiled in a run
